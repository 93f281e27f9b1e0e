// A tile of the map back, transposed: A'[j, i] for keys j of the map and the queries i of a strip.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/matrix_unit.h"
#include "cpu/reducers.h"
#include "cpu/tile.h"
#include "cpu/typed.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

template <class T>
inline Target<T> known_target(T* mean, T weight) {
  Target<T> to;
  to.mean = mean;
  for (auto& lane : to.coefficient) lane = splat(weight);
  return to;
}

// The strip's queries are keys i0 .. i0 + valid of the map back, in the lanes, and its queries are
// broadcast. 2^(score - lse) needs no other key of it.
template <class T>
class BackTile {
  static constexpr bool kUnit = !std::is_same_v<UnitOf<T>, NoUnit>;
  static constexpr int R = kRows<T>, L = kLanes<T>;
  // Keys of the map that are made at once.
  static constexpr std::int64_t kBackKeys = kBlock;

 public:
  BackTile() = default;
  // `line_mass`: T [P, M, lines] of the map back, or 0 where it is not normalised.
  // `unit`: of the matrix unit, where it makes the scores.
  BackTile(Workspace& w, const Map<T>& back, std::uintptr_t line_mass, const UnitShape& unit)
      : back_(&back), lines_(back.problem), line_mass_(line_mass) {
    if constexpr (kUnit) {
      if (unit.used()) unit_ = Unit(w, unit, back.problem.heads);
    }
    if (!unit.used()) query_ = Buffer<T>(w, back.problem.heads * back.problem.dim * R);
    tile_ = Buffer<T>(w, kBackKeys * R);
  }

  void load(const Strip& s) {
    const Problem& b = back_->problem;
    const std::int64_t of = back_->key_index(s.map);
    for (std::int64_t h = 0; h < b.heads; ++h) {
      if constexpr (kUnit) {
        if (unit_.shape.used()) {
          unit_.load(back_->key, of, h, s.i0, s.valid);
          continue;
        }
      }
      pack_lanes<T>(back_->key, of, h, s.i0, s.valid, back_->scale, query_ + h * b.dim * R);
    }
    const T* bias = back_->key_bias(s.map);
    for (int r = 0; r < R; ++r) {
      const T x = bias == nullptr ? T(0) : r < s.valid ? bias[s.i0 + r] : T(0);
      // A hidden key of the map back: the largest shift there is takes everything to zero.
      shift_[r / L][r % L] =
          x == -std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::max() : -x;
    }
  }

  // [j1 - j0][R], of the strip loaded; at most kBlock keys.
  const T* block(const Strip& s, std::int64_t j0, std::int64_t j1, T* convert) {
    const Problem& b = back_->problem;
    const std::int64_t count = j1 - j0;
    for (std::int64_t h = 0; h < b.heads; ++h) {
      T negative[kBackKeys];
      for (std::int64_t j = 0; j < count; ++j) {
        // A row of the map back without a visible key goes nowhere: probability 0, not infinity.
        constexpr T kHidden = -std::numeric_limits<T>::infinity();
        const T lse = back_->lse(s.map, h, j0 + j);
        negative[j] = lse == kHidden ? kHidden : -lse;
      }
      SoftmaxLanes<T> lanes;
      for (int v = 0; v < kWidth; ++v) lanes.shift[v] = shift_[v];
      const Target<T> to = known_target<T>(tile_, back_->weight(h));
      if (h == 0) {
        score<Mode::KnownFirst>(s, h, j0, j1, negative - j0, lanes, to, convert);
      } else {
        score<Mode::KnownLater>(s, h, j0, j1, negative - j0, lanes, to, convert);
      }
    }
    if (line_mass_ != 0) normalize(s, j0, count);
    return tile_;
  }

 private:
  template <Mode mode>
  void score(const Strip& s, std::int64_t h, std::int64_t j0, std::int64_t j1, const T* bias,
             SoftmaxLanes<T>& lanes, const Target<T>& to, T* convert) {
    const std::int64_t of = back_->query_index(s.map);
    if constexpr (kUnit) {
      if (unit_.shape.used()) {
        unit_.template score<mode>(back_->query, of, h, j0, j1, back_->scale, bias, lanes, to);
        return;
      }
    }
    score_keys<T, mode>(query_ + h * back_->problem.dim * R, back_->query, of, h, j0, j1, bias,
                        lanes, to, convert);
  }

  void normalize(const Strip& s, std::int64_t j0, std::int64_t count) {
    const T* mass =
        pointer<const T>(line_mass_) + (s.map * back_->problem.queries + j0) * lines_.count;
    for (std::int64_t j = 0; j < count; ++j, mass += lines_.count) {
      for (std::int64_t r = 0; r < s.valid; ++r) {
        tile_[j * R + r] *= inverse_mass(mass[lines_.of(s.i0 + r)]);
      }
    }
  }

  const Map<T>* back_ = nullptr;
  Lines lines_{Problem{}};
  std::uintptr_t line_mass_ = 0;
  Lanes<T> shift_ = {};
  Buffer<T> query_;  // [H][d][R]
  UnitOf<T> unit_;   // or as the matrix unit takes them
  Buffer<T> tile_;   // [kBackKeys][R]
};

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
