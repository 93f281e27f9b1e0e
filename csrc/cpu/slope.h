// G = dL/dA on a block of keys of a strip, from its closed form (python/flashmaps/maps/problem.py,
// `Gradient`). What a strip holds for it is packed in lanes once.
#pragma once

#include <algorithm>

#include "cpu/back.h"
#include "cpu/gradient.h"
#include "cpu/reducers.h"
#include "cpu/tile.h"
#include "cpu/typed.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Rows i0 .. i0 + valid of a [P, N, width] tensor, as lanes: [width][R], zeros beyond.
template <class T>
inline void pack_rows(const T* from, const Strip& s, std::int64_t queries, std::int64_t width,
                      T* to) {
  constexpr int R = kRows<T>;
  const T* row = from + (s.map * queries + s.i0) * width;
  for (std::int64_t c = 0; c < width; ++c) {
    for (std::int64_t r = 0; r < R; ++r) to[c * R + r] = r < s.valid ? row[r * width + c] : T(0);
  }
}

template <class T>
inline Vec<T> natural_log(Vec<T> x) {  // 0 where x is
  const Vec<T> found = log2(x) * T(kLn2);
  return x > Vec<T>{} ? found : Vec<T>{};
}

// The terms of one strip.
template <class T>
class Slope {
  static constexpr int R = kRows<T>, L = kLanes<T>;

 public:
  Slope(Workspace& w, const Problem& p, const Gradient& g, const Map<T>* back)
      : problem_(p), given_(g), has_back_(back != nullptr) {
    left_ = Buffer<T>(w, g.left == 0 ? 0 : g.columns * R);
    pooled_ = Buffer<T>(w, g.pooled == 0 ? 0 : g.num_cells * R);
    if (has_back_) back_ = BackTile<T>(w, *back, g.partner_line_mass, UnitShape{});
  }

  void load_strip(const Strip& s) {
    const std::int64_t n = problem_.queries;
    pack_lane(given_.row_log, s, row_log_);
    pack_lane(given_.row_add, s, row_add_);
    pack_lane(given_.row_back, s, row_back_);
    if (given_.left != 0) pack_rows<T>(pointer<const T>(given_.left), s, n, given_.columns, left_);
    if (given_.pooled != 0) {
      pack_rows<T>(pointer<const T>(given_.pooled), s, n, given_.num_cells, pooled_);
    }
    if (has_back_) back_.load(s);
  }

  // Keys j0 .. j1, at most kBlock: g = G of the printed map `a`, both [keys][R].
  void block(const Strip& s, std::int64_t j0, std::int64_t j1, const T* a, T* g, T* convert) {
    const std::int64_t count = j1 - j0;
    const T* add = columns(given_.column_add, s, j0);
    for (std::int64_t j = 0; j < count; ++j) {
      const T column = add == nullptr ? T(0) : add[j];
      for (int v = 0; v < kWidth; ++v) store<T>(g + j * R + v * L, row_add_[v] + column);
    }
    products(s, j0, count, g);
    logarithms(s, j0, count, a, g);
    given_entries(s, j0, count, g);
    if (has_back_) {
      const T* back = back_.block(s, j0, j1, convert);
      const T* column = columns(given_.column_back, s, j0);
      for (std::int64_t j = 0; j < count; ++j) {
        const T c = column == nullptr ? T(0) : column[j];
        for (int v = 0; v < kWidth; ++v) {
          T* here = g + j * R + v * L;
          store<T>(here, load(here) + (row_back_[v] + c) * at(back, j, v));
        }
      }
    }
  }

 private:
  void pack_lane(std::uintptr_t from, const Strip& s, Lanes<T>& to) const {
    for (auto& lane : to) lane = Vec<T>{};
    if (from == 0) return;
    const T* row = pointer<const T>(from) + s.map * problem_.queries + s.i0;
    for (std::int64_t r = 0; r < s.valid; ++r) to[r / L][r % L] = row[r];
  }
  const T* columns(std::uintptr_t from, const Strip& s, std::int64_t j0) const {
    return from == 0 ? nullptr : pointer<const T>(from) + s.map * problem_.keys + j0;
  }

  // left_i . right_j
  void products(const Strip& s, std::int64_t j0, std::int64_t count, T* g) const {
    if (given_.left == 0) return;
    const std::int64_t width = given_.columns;
    const T* right = pointer<const T>(given_.right) + (s.map * problem_.keys + j0) * width;
    std::int64_t j = 0;
    const auto tile = [&]<int J>() {
      multiply_into<T, kWidth, J, true>(left_, R, right + j * width, width, 1, width, g + j * R);
      j += J;
    };
    while (j + kTileKeys <= count) tile.template operator()<kTileKeys>();
    while (j < count) tile.template operator()<1>();
  }

  // -(row_log_i + column_log_j) log A_ij
  void logarithms(const Strip& s, std::int64_t j0, std::int64_t count, const T* a, T* g) const {
    if (given_.row_log == 0 && given_.column_log == 0) return;
    const T* column = columns(given_.column_log, s, j0);
    for (std::int64_t j = 0; j < count; ++j) {
      const T c = column == nullptr ? T(0) : column[j];
      for (int v = 0; v < kWidth; ++v) {
        T* here = g + j * R + v * L;
        store<T>(here, load(here) - (row_log_[v] + c) * natural_log<T>(at(a, j, v)));
      }
    }
  }

  // What was given entry by entry.
  void given_entries(const Strip& s, std::int64_t j0, std::int64_t count, T* g) const {
    if (given_.dense != 0) {
      const T* dense =
          pointer<const T>(given_.dense) + (s.map * problem_.queries + s.i0) * problem_.keys + j0;
      for (std::int64_t r = 0; r < s.valid; ++r, dense += problem_.keys) {
        for (std::int64_t j = 0; j < count; ++j) g[j * R + r] += dense[j];
      }
    }
    if (given_.pooled != 0) {
      const auto* cells = pointer<const std::int64_t>(given_.cells) + j0;
      for (std::int64_t j = 0; j < count; ++j) {
        // Cells that Python could not check (under torch.compile) are held inside.
        const std::int64_t cell = std::clamp<std::int64_t>(cells[j], 0, given_.num_cells - 1);
        for (int v = 0; v < kWidth; ++v) {
          T* here = g + j * R + v * L;
          store<T>(here, load(here) + load(pooled_ + cell * R + v * L));
        }
      }
    }
    if (given_.row_index != 0) {
      const std::int64_t width = given_.entries, first = (s.map * problem_.queries + s.i0) * width;
      const auto* index = pointer<const std::int64_t>(given_.row_index) + first;
      const T* value = pointer<const T>(given_.row_values) + first;
      for (std::int64_t r = 0; r < s.valid; ++r) {
        for (std::int64_t n = r * width; n < (r + 1) * width; ++n) {
          const std::int64_t j = index[n] - j0;
          if (j >= 0 && j < count) g[j * R + r] += value[n];
        }
      }
    }
    if (given_.column_index != 0) {
      const std::int64_t first = s.map * problem_.keys + j0;
      const auto* index = pointer<const std::int64_t>(given_.column_index) + first;
      const T* value = pointer<const T>(given_.column_values) + first;
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t r = index[j] - s.i0;
        if (r >= 0 && r < s.valid) g[j * R + r] += value[j];
      }
    }
  }

  const Problem& problem_;
  const Gradient& given_;
  bool has_back_;
  BackTile<T> back_;
  Lanes<T> row_log_, row_add_, row_back_;
  Buffer<T> left_;    // [columns][R]
  Buffer<T> pooled_;  // [cells][R]
};

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
