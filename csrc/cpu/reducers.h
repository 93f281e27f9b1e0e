// The statistics. A row reducer is a struct with begin, update (a block of keys of the mean map, R
// queries in the lanes) and write; a column reducer has update (the same block, seen from its keys)
// and write. To add a statistic: add one of them, its pointer in Outputs, and its line in Rows or
// Columns below.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/tile.h"
#include "cpu/typed.h"
#include "shared/arithmetic.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Keys are reduced this many at a time, while they are in the first-level cache. Sums run over a
// block first, then over blocks: rounding grows with the square root of the keys, not with them.
constexpr std::int64_t kBlock = 64;

// Queries i0 .. i0 + valid of map p, in the lanes.
struct Strip {
  std::int64_t map, i0, valid;
};

// Constant through a call: shapes, and what a row must be divided by to be a distribution.
template <class T>
struct Shape {
  std::int64_t queries, keys;
  T inverse_lines;
};

template <class T, class To>
inline void write_lanes(const Lanes<T>& lanes, const Strip& s, std::int64_t queries, To* out,
                        std::int64_t stride = 1) {
  To* to = out + (s.map * queries + s.i0) * stride;
  for (std::int64_t r = 0; r < s.valid; ++r) {
    to[r * stride] = To(lanes[r / kLanes<T>][r % kLanes<T>]);
  }
}

template <class T>
struct Sum {
  Lanes<T> total;
  void begin() {
    for (auto& lane : total) lane = Vec<T>{};
  }
  // term(j, v) for each key of a block and each vector of the lanes.
  template <class F>
  void add(std::int64_t count, F term) {
    Lanes<T> block = {};
    for (std::int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < kWidth; ++v) block[v] += term(j, v);
    }
    for (int v = 0; v < kWidth; ++v) total[v] += block[v];
  }
};

// to[line][R] = the sum of term(j, v) over the keys j of each line.
template <class T, class F>
void sum_lines(const Lines& lines, std::int64_t keys, T* to, F term) {
  const std::int64_t step = lines.wrap ? lines.period : 1;
  const std::int64_t length = keys / lines.count;
  for (std::int64_t line = 0; line < lines.count; ++line, to += kRows<T>) {
    const std::int64_t first = lines.wrap ? line : line * length;
    Sum<T> sum;
    sum.begin();
    for (std::int64_t n = 0; n < length; n += kBlock) {
      sum.add(std::min(kBlock, length - n),
              [&](std::int64_t j, int v) { return term(first + (n + j) * step, v); });
    }
    for (int v = 0; v < kWidth; ++v) store<T>(to + v * kLanes<T>, sum.total[v]);
  }
}

template <class T>
inline Vec<T> at(const T* p, std::int64_t j, int v) {
  return load(p + j * kRows<T> + v * kLanes<T>);
}

template <class T>
struct Entropy {
  T* out = nullptr;
  Sum<T> sum;
  void begin() { sum.begin(); }
  void update(const T* p, std::int64_t count, T inverse_lines) {
    sum.add(count, [&](std::int64_t j, int v) { return xlog2x(at(p, j, v) * inverse_lines); });
  }
  void write(const Strip& s, std::int64_t queries) {
    for (auto& lane : sum.total) lane *= T(-kLn2);
    write_lanes<T>(sum.total, s, queries, out);
  }
};

template <class T>
struct MaxArgmax {
  T* max_out = nullptr;
  std::int64_t* argmax_out = nullptr;
  Lanes<T> top;
  IVec<T> where[kWidth];
  bool wanted() const { return max_out != nullptr || argmax_out != nullptr; }
  void begin() {
    for (auto& lane : top) lane = splat(T(-1));
    for (auto& lane : where) lane = IVec<T>{};
  }
  void update(const T* p, std::int64_t j0, std::int64_t count) {
    using Int = typename Simd<T>::Int;
    for (std::int64_t j = 0; j < count; ++j) {
      const IVec<T> index = IVec<T>{} + Int(j0 + j);
      for (int v = 0; v < kWidth; ++v) {
        keep_better(at(p, j, v), index, top[v], where[v]);
      }
    }
  }
  void write(const Strip& s, std::int64_t queries) {
    if (max_out != nullptr) write_lanes<T>(top, s, queries, max_out);
    if (argmax_out == nullptr) return;
    std::int64_t* to = argmax_out + s.map * queries + s.i0;
    for (std::int64_t r = 0; r < s.valid; ++r) to[r] = where[r / kLanes<T>][r % kLanes<T>];
  }
};

template <class T>
struct Expectation {
  T* out = nullptr;
  const T *x = nullptr, *y = nullptr;  // centres of the key grid, [M] each
  Sum<T> sum_x, sum_y;
  void begin() {
    sum_x.begin();
    sum_y.begin();
  }
  void update(const T* p, std::int64_t j0, std::int64_t count) {
    sum_x.add(count, [&](std::int64_t j, int v) { return at(p, j, v) * x[j0 + j]; });
    sum_y.add(count, [&](std::int64_t j, int v) { return at(p, j, v) * y[j0 + j]; });
  }
  void write(const Strip& s, std::int64_t queries, T inverse_lines) {
    for (auto& lane : sum_x.total) lane *= inverse_lines;
    for (auto& lane : sum_y.total) lane *= inverse_lines;
    write_lanes<T>(sum_x.total, s, queries, out, 2);
    write_lanes<T>(sum_y.total, s, queries, out + 1, 2);
  }
};

template <class T>
struct Diagonal {
  T* out = nullptr;
  void update(const T* p, std::int64_t j0, std::int64_t count, const Strip& s,
              std::int64_t queries) {
    const std::int64_t first = std::max(j0, s.i0);
    const std::int64_t last = std::min(j0 + count, s.i0 + s.valid);
    for (std::int64_t i = first; i < last; ++i) {
      out[s.map * queries + i] = p[(i - j0) * kRows<T> + (i - s.i0)];
    }
  }
};

// sum_j A[i, j] B[j, i], B's columns for these queries in `back`.
template <class T>
struct ReturnProbability {
  T* out = nullptr;
  Sum<T> sum;
  void begin() { sum.begin(); }
  void update(const T* p, const T* back, std::int64_t count) {
    sum.add(count, [&](std::int64_t j, int v) { return at(p, j, v) * at(back, j, v); });
  }
  void write(const Strip& s, std::int64_t queries, T inverse_lines) {
    for (auto& lane : sum.total) lane *= inverse_lines;
    write_lanes<T>(sum.total, s, queries, out);
  }
};

// (A x)[i, c] in held[c][R].
template <class T>
struct Product {
  T* out = nullptr;
  const T* x = nullptr;  // [P, M, C]
  std::int64_t columns = 0;
  Buffer<T> held;
  void begin() { std::fill_n(&held[0], columns * kRows<T>, T(0)); }
  void update(const T* p, std::int64_t map, std::int64_t keys, std::int64_t j0,
              std::int64_t count) {
    const T* b = x + (map * keys + j0) * columns;
    std::int64_t c = 0;
    const auto tile = [&]<int J>() {
      T* to = held + c * kRows<T>;
      multiply_into<T, kWidth, J, false>(p, kRows<T>, b + c, 1, columns, count, to);
      c += J;
    };
    while (c + kTileKeys <= columns) tile.template operator()<kTileKeys>();
    while (c + 2 <= columns) tile.template operator()<2>();
    while (c < columns) tile.template operator()<1>();
  }
  void write(const Strip& s, std::int64_t queries) {
    for (std::int64_t r = 0; r < s.valid; ++r) {
      T* to = out + (s.map * queries + s.i0 + r) * columns;
      for (std::int64_t c = 0; c < columns; ++c) to[c] = held[c * kRows<T> + r];
    }
  }
};

// Rows of the map themselves: to[r][j0 + j] for a block, from lanes.
template <class T>
inline void write_rows(const T* p, std::int64_t count, std::int64_t valid, T* to,
                       std::int64_t stride) {
  for (std::int64_t r = 0; r < valid; ++r) {
    T* row = to + r * stride;
    for (std::int64_t j = 0; j < count; ++j) row[j] = p[j * kRows<T> + r];
  }
}

// The k largest of each row, largest first, the lowest index among equals. Small k: a sorted list
// for each lane, entered only by what beats its last entry. Large k: whole rows, sorted at the end.
template <class T>
struct TopK {
  static constexpr std::int64_t kSmall = 64;
  T* values_out = nullptr;
  std::int64_t* indices_out = nullptr;
  std::int64_t k = 0;
  Buffer<T> values;              // [R][k], or [R][M] where k is large
  Buffer<std::int64_t> indices;  // [R][k], or [M]
  Lanes<T> threshold;
  bool wanted() const { return values_out != nullptr || indices_out != nullptr; }
  bool small() const { return k <= kSmall; }
  void begin() {
    for (auto& lane : threshold) lane = splat(T(-1));
    if (small()) {
      std::fill_n(&values[0], kRows<T> * k, T(-1));
      std::fill_n(&indices[0], kRows<T> * k, std::int64_t(0));
    }
  }
  void update(const T* p, std::int64_t j0, std::int64_t count, const Strip& s, std::int64_t keys) {
    if (!small()) return write_rows(p, count, s.valid, values + j0, keys);
    for (std::int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < kWidth; ++v) {
        const Vec<T> x = at(p, j, v);
        if (!any_greater<T>(x, threshold[v])) continue;
        for (int l = 0; l < kLanes<T>; ++l) {
          if (x[l] > threshold[v][l]) insert(v * kLanes<T> + l, x[l], j0 + j);
        }
      }
    }
  }
  void insert(std::int64_t lane, T value, std::int64_t index) {
    T* list = values + lane * k;
    std::int64_t* which = indices + lane * k;
    std::int64_t to = k - 1;
    for (; to > 0 && list[to - 1] < value; --to) {
      list[to] = list[to - 1];
      which[to] = which[to - 1];
    }
    list[to] = value;
    which[to] = index;
    threshold[lane / kLanes<T>][lane % kLanes<T>] = list[k - 1];
  }
  void write(const Strip& s, std::int64_t queries, std::int64_t keys) {
    for (std::int64_t r = 0; r < s.valid; ++r) {
      const T* row = values + r * (small() ? k : keys);
      std::int64_t* order = small() ? indices + r * k : &indices[0];
      if (!small()) {
        for (std::int64_t j = 0; j < keys; ++j) order[j] = j;
        std::partial_sort(order, order + k, order + keys, [row](std::int64_t a, std::int64_t b) {
          return row[a] > row[b] || (row[a] == row[b] && a < b);
        });
      }
      const std::int64_t to = (s.map * queries + s.i0 + r) * k;
      for (std::int64_t n = 0; n < k; ++n) {
        if (values_out != nullptr) values_out[to + n] = small() ? row[n] : row[order[n]];
        if (indices_out != nullptr) indices_out[to + n] = order[n];
      }
    }
  }
};

template <class T>
struct PooledKeys {
  T* out = nullptr;
  const std::int64_t* cells = nullptr;  // [M]
  std::int64_t num_cells = 0;
  Buffer<T> held;  // [cells][R]
  void begin() { std::fill_n(&held[0], num_cells * kRows<T>, T(0)); }
  // Neighbours of one cell are added to each other first: it is faster, and a sum of some thousand
  // equal numbers would else lose digits to roundings of one sign.
  void update(const T* p, std::int64_t j0, std::int64_t count) {
    for (std::int64_t j = 0, next; j < count; j = next) {
      const std::int64_t cell = cells[j0 + j];
      for (next = j + 1; next < count && cells[j0 + next] == cell;) ++next;
      T* to = held + cell * kRows<T>;
      for (int v = 0; v < kWidth; ++v, to += kLanes<T>) {
        auto sum = at(p, j, v);
        for (std::int64_t k = j + 1; k < next; ++k) sum = sum + at(p, k, v);
        store<T>(to, load(to) + sum);
      }
    }
  }
  void write(const Strip& s, std::int64_t queries) {
    write_rows(&held[0], num_cells, s.valid, out + (s.map * queries + s.i0) * num_cells, num_cells);
  }
};

// Every row reducer that was asked for.
template <class T>
struct Rows {
  Shape<T> shape;
  Entropy<T> entropy;
  MaxArgmax<T> top;
  Expectation<T> expectation;
  Diagonal<T> diagonal;
  ReturnProbability<T> returns;
  T inverse_lines_of_trip = T(1);
  Product<T> product;
  T* dense = nullptr;
  TopK<T> topk;
  PooledKeys<T> pooled;

  void begin() {
    entropy.begin();
    top.begin();
    expectation.begin();
    returns.begin();
    if (product.out != nullptr) product.begin();
    if (topk.wanted()) topk.begin();
    if (pooled.out != nullptr) pooled.begin();
  }
  // Keys j0 .. j0 + count, at most kBlock of them. `back` holds the map back's block, or is null.
  void update(const Strip& s, const T* p, const T* back, std::int64_t j0, std::int64_t count) {
    if (entropy.out != nullptr) entropy.update(p, count, shape.inverse_lines);
    if (top.wanted()) top.update(p, j0, count);
    if (expectation.out != nullptr) expectation.update(p, j0, count);
    if (diagonal.out != nullptr) diagonal.update(p, j0, count, s, shape.queries);
    if (returns.out != nullptr) returns.update(p, back, count);
    if (product.out != nullptr) product.update(p, s.map, shape.keys, j0, count);
    if (dense != nullptr) {
      T* to = dense + (s.map * shape.queries + s.i0) * shape.keys + j0;
      write_rows(p, count, s.valid, to, shape.keys);
    }
    if (topk.wanted()) topk.update(p, j0, count, s, shape.keys);
    if (pooled.out != nullptr) pooled.update(p, j0, count);
  }
  void write(const Strip& s) {
    if (entropy.out != nullptr) entropy.write(s, shape.queries);
    if (top.wanted()) top.write(s, shape.queries);
    if (expectation.out != nullptr) expectation.write(s, shape.queries, shape.inverse_lines);
    if (returns.out != nullptr) returns.write(s, shape.queries, inverse_lines_of_trip);
    if (product.out != nullptr) product.write(s, shape.queries);
    if (topk.wanted()) topk.write(s, shape.queries, shape.keys);
    if (pooled.out != nullptr) pooled.write(s, shape.queries);
  }
};

// Column reducers see strips in order, each key by one thread: the bits do not depend on the
// threads. Lanes without a query hold zeros. Sums over strips are kept in double.
template <class T>
struct Columns {
  T *sum_out = nullptr, *entropy_out = nullptr, *max_out = nullptr;
  std::int64_t* argmax_out = nullptr;
  T* product_out = nullptr;  // [P, M, C], added to in place
  const T* left = nullptr;   // [P, N, C]
  std::int64_t left_columns = 0;
  std::int64_t keys = 0;
  std::int64_t held = 0;       // keys of a slot: all of them, or those of the block at hand
  Buffer<double> mass, plogp;  // [slots][held]
  Buffer<T> top;               // [slots][held]

  bool sums() const { return sum_out != nullptr || entropy_out != nullptr; }
  bool tops() const { return max_out != nullptr || argmax_out != nullptr; }
  bool wanted() const { return sums() || tops() || product_out != nullptr; }
  std::int64_t packed_columns() const {
    return (left_columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  }

  void hold(Workspace& workspace, std::int64_t slots, std::int64_t keys_of_a_slot) {
    held = keys_of_a_slot;
    if (sums()) mass = Buffer<double>(workspace, slots * held);
    if (entropy_out != nullptr) plogp = Buffer<double>(workspace, slots * held);
    if (tops()) top = Buffer<T>(workspace, slots * held);
  }
  // Where key 0 of a slot would be that holds all keys, or those of a block that starts at j0.
  std::int64_t origin(std::int64_t slot, std::int64_t j0) const {
    return slot * held - (held < keys ? j0 : 0);
  }
  // Rows of y for a strip, [R queries][packed columns], zeros where there is none.
  void pack_left(const Strip& s, std::int64_t queries, T* to) const {
    if (product_out == nullptr) return;
    const std::int64_t stride = packed_columns();
    const T* y = left + (s.map * queries + s.i0) * left_columns;
    for (std::int64_t r = 0; r < s.valid; ++r, to += stride, y += left_columns) {
      std::copy_n(y, left_columns, to);
      std::fill_n(to + left_columns, stride - left_columns, T(0));
    }
  }
  void begin(std::int64_t slot, std::int64_t map, std::int64_t j0, std::int64_t j1) {
    const std::int64_t from = origin(slot, j0) + j0, count = j1 - j0;
    if (sums()) std::fill_n(mass + from, count, 0.0);
    if (entropy_out != nullptr) std::fill_n(plogp + from, count, 0.0);
    if (tops()) std::fill_n(top + from, count, T(-1));
    if (argmax_out != nullptr) std::fill_n(argmax_out + map * keys + j0, count, std::int64_t(0));
    if (product_out != nullptr) {
      std::fill_n(product_out + (map * keys + j0) * left_columns, count * left_columns, T(0));
    }
  }
  // p points at key j0 of the strip.
  void update(std::int64_t slot, const Strip& s, const T* p, const T* packed_left, std::int64_t j0,
              std::int64_t j1) {
    constexpr int R = kRows<T>;
    const std::int64_t zero = origin(slot, j0);
    for (std::int64_t j = j0; j < j1; ++j) {
      const T* column = p + (j - j0) * R;
      const std::int64_t here = zero + j;
      if (sums()) mass[here] += double(lane_sum(column));
      if (entropy_out != nullptr) {
        alignas(kVectorBytes) T t[R];
        for (int v = 0; v < kWidth; ++v) store<T>(t + v * kLanes<T>, xlog2x(at(column, 0, v)));
        plogp[here] += kLn2 * double(lane_sum(t));
      }
      if (tops()) {
        const T best = lane_max(column);
        if (best > top[here]) {  // strictly: the lowest query wins ties
          top[here] = best;
          if (argmax_out != nullptr) {
            std::int64_t r = 0;
            while (r < s.valid - 1 && column[r] != best) ++r;
            argmax_out[s.map * keys + j] = s.i0 + r;
          }
        }
      }
    }
    if (product_out != nullptr) multiply_left(s, p, packed_left, j0, j1);
  }
  void multiply_left(const Strip& s, const T* p, const T* packed, std::int64_t j0,
                     std::int64_t j1) {
    const std::int64_t stride = packed_columns();
    std::int64_t c = 0;
    while (c < stride) {
      const std::int64_t vectors = (stride - c) / kLanes<T>;
      if (vectors >= 3) {
        c += columns_left<3>(s, p, packed + c, c, j0, j1);
      } else if (vectors == 2) {
        c += columns_left<2>(s, p, packed + c, c, j0, j1);
      } else {
        c += columns_left<1>(s, p, packed + c, c, j0, j1);
      }
    }
  }
  // Columns c .. c + W vectors of y; returns how many that is. A strip's product is summed by
  // itself before it is added, so that rounding does not grow with the queries.
  template <int W>
  std::int64_t columns_left(const Strip& s, const T* p, const T* packed, std::int64_t c,
                            std::int64_t j0, std::int64_t j1) {
    constexpr int R = kRows<T>, C = W * kLanes<T>;
    const std::int64_t width = std::min<std::int64_t>(C, left_columns - c);
    std::int64_t j = j0;
    const auto tile = [&]<int J>() {
      alignas(kVectorBytes) T t[J * C] = {};
      multiply_into<T, W, J, true>(packed, packed_columns(), p + (j - j0) * R, R, 1, s.valid, t);
      for (int n = 0; n < J; ++n) {
        T* to = product_out + (s.map * keys + j + n) * left_columns + c;
        for (std::int64_t x = 0; x < width; ++x) to[x] += t[n * C + x];
      }
      j += J;
    };
    while (j + kTileKeys <= j1) tile.template operator()<kTileKeys>();
    while (j < j1) tile.template operator()<1>();
    return C;
  }
  void write(std::int64_t slot, std::int64_t map, std::int64_t j0, std::int64_t j1) const {
    const std::int64_t zero = origin(slot, j0);
    for (std::int64_t j = j0; j < j1; ++j) {
      const std::int64_t here = zero + j, to = map * keys + j;
      if (sum_out != nullptr) sum_out[to] = T(mass[here]);
      if (max_out != nullptr) max_out[to] = top[here];
      if (entropy_out != nullptr) {
        const auto log = [](double m) { return std::log(m); };
        entropy_out[to] = T(entropy_of_column(mass[here], plogp[here], log));
      }
    }
  }
};

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
