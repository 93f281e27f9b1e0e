// The statistics: what a tile of the mean map adds to each of them. A state has begin, update (a
// tile), join (another thread's, or warp's) and is written by what holds it. States see a row's
// columns in ascending order.
#pragma once

#include "cuda/tile.h"

namespace flashmaps::cuda {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// x log2 x with 0 log 0 = 0. Below the smallest normal number x weighs nothing.
FLASHMAPS_DEVICE float xlog2x(float x) {
  return x * log2_fast(fmaxf(x, kLeast<float>));
}

// Running maximum and sum of a softmax over columns, scores in log2 units.
struct Softmax {
  float max = kHidden, sum = 0;

  FLASHMAPS_DEVICE void join(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max);
    const float base = shift_of(both, kHidden);
    sum = sum * exp2_fast(max - base) + other_sum * exp2_fast(other_max - base);
    max = both;
  }
  // log2 of the sum; minus infinity where no column was there.
  FLASHMAPS_DEVICE float log_sum() const {
    // NaN must come through: sum > 0 would not let it.
    return sum == 0.0f ? kHidden : shift_of(max, kHidden) + log2f(sum);
  }
};

// Every statistic of a row. Those that nobody asked for are never touched. A pass has either masses
// (keys kept) or positions (queries kept), and registers are short: they share one.
struct RowState {
  float plogp = 0, top = -1, mass_or_x = 0, y = 0;
  int argtop = 0;

  FLASHMAPS_DEVICE void join(const RowState& other) {
    plogp += other.plogp;
    mass_or_x += other.mass_or_x;
    y += other.y;
    keep_better_of_any(other.top, other.argtop, top, argtop);
  }
};
constexpr int kStateWords = 5;

FLASHMAPS_DEVICE void store_state(Shared<float> to, const RowState& s) {
  to.store(0, s.plogp);
  to.store(1, s.top);
  to.store(2, s.mass_or_x);
  to.store(3, s.y);
  to.store(4, from_bits(std::uint32_t(s.argtop)));
}
FLASHMAPS_DEVICE RowState load_state(Shared<float> from) {
  RowState s;
  s.plogp = from.load(0);
  s.top = from.load(1);
  s.mass_or_x = from.load(2);
  s.y = from.load(3);
  s.argtop = int(as_bits(from.load(4)));
  return s;
}
FLASHMAPS_DEVICE RowState from_lane(const RowState& s, int mask) {
  RowState other;
  other.plogp = shuffle_xor(s.plogp, mask);
  other.top = shuffle_xor(s.top, mask);
  other.mass_or_x = shuffle_xor(s.mass_or_x, mask);
  other.y = shuffle_xor(s.y, mask);
  other.argtop = shuffle_xor(s.argtop, mask);
  return other;
}

// Sums go over a tile first, then over tiles: rounding grows with the square root of the columns.

FLASHMAPS_DEVICE void add_mass(RowState (&state)[kThreadRows], const Tile& p) {
  float sum[kThreadRows] = {};
  each_element([&](int m, int n, int e, int r, int) { sum[r] += p.at[m][n][e]; });
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) state[r].mass_or_x += sum[r];
}

FLASHMAPS_DEVICE void add_plogp(RowState (&state)[kThreadRows], const Tile& p) {
  float sum[kThreadRows] = {};
  each_element([&](int m, int n, int e, int r, int) { sum[r] += xlog2x(p.at[m][n][e]); });
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) state[r].plogp += sum[r];
}

// `first` is the number of the thread's first column among all streamed tokens.
FLASHMAPS_DEVICE void take_top(RowState (&state)[kThreadRows], const Tile& p, int first) {
  float top[kThreadRows];
  int where[kThreadRows] = {};
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) top[r] = -1;
  each_element([&](int m, int n, int e, int r, int column) {
    keep_better(p.at[m][n][e], column, top[r], where[r]);
  });
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    keep_better(top[r], first + where[r], state[r].top, state[r].argtop);
  }
}

// Centres (x, y) of the keys' cells. Divisions are slow: one of whole numbers for the tile's first
// key, and from there floats, which count exactly, times a reciprocal.
FLASHMAPS_DEVICE void add_position(RowState (&state)[kThreadRows], const Tile& p, int tile_first,
                                   int first_column, int grid_width, int grid_height) {
  const int line = tile_first / grid_width;
  const float width = float(grid_width), per_column = 1.0f / width;
  const float per_line = 1.0f / float(grid_height);
  const float along = float(tile_first - line * grid_width + first_column) + 0.5f;
  float x[kThreadRows] = {}, y[kThreadRows] = {};
  each_element([&](int m, int n, int e, int r, int column) {
    const float here = along + float(column);
    const float down = floorf(here * per_column);
    const float value = p.at[m][n][e];
    x[r] += value * ((here - down * width) * per_column);
    y[r] += value * ((float(line) + down + 0.5f) * per_line);
  });
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    state[r].mass_or_x += x[r];
    state[r].y += y[r];
  }
}

// Writes what is asked for of one row, which is the `at`-th of the outputs.
FLASHMAPS_DEVICE void write_state(const StatisticsOutputs& out, std::int64_t at, const RowState& s,
                                  bool of_columns, int last_index) {
  const float plogp = s.plogp * float(kLn2);
  if (out.total != nullptr) store_global(out.total + at, s.mass_or_x);
  if (out.plogp != nullptr) store_global(out.plogp + at, s.plogp);
  if (out.entropy != nullptr) {
    const float of_column = entropy_of_column(s.mass_or_x, plogp, [](float c) { return logf(c); });
    store_global(out.entropy + at, of_columns ? of_column : -plogp);
  }
  if (out.top != nullptr) store_global(out.top + at, s.top);
  // NaN has no maximum; its index must still be one.
  if (out.argtop != nullptr) {
    store_global(out.argtop + at, std::int64_t(smaller(s.argtop, last_index)));
  }
  if (out.expectation != nullptr) {
    store_global(out.expectation + 2 * at, s.mass_or_x);
    store_global(out.expectation + 2 * at + 1, s.y);
  }
}

}  // namespace flashmaps::cuda
