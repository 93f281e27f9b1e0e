// The kernels: passes over the map. python/flashmaps/maps/backends/cuda_launches.py decides which
// of them run, and how.
//
// No atomics anywhere: one block writes an output, or a part of one where the streamed tokens are
// split among blocks, and parts are added up in order. The same call gives the same bits.
#pragma once

#include "cuda/reducers.h"
#include "cuda/tile.h"

namespace flashmaps::cuda {

constexpr int kLseThreads = 128;

// minus log-sum-exp of each query and head, and the log-sum-exp itself. One head a block.
template <class T, int S>
FLASHMAPS_KERNEL(kLseThreads, 3)
void lse_kernel(FLASHMAPS_PARAMETER LogSumExpArguments a) {
  const int heads = a.map[0].heads;  // of a place's parts
  Walk<T, S, 1> walk(a.map, a.tiling, a.grid);
  const Side<T>& side = walk.side(0);
  const int keys = side.streamed_tokens().count;
  const int head = walk.place.part;
  const float scale = a.map[0].scale;
  Softmax rows[kThreadRows];
  walk.only_head(head);
  walk.run(
      head, [](int) {},
      [&](int, int, int tile, Tile& products, Shared<float> terms) {
        each_element([&](int m, int n, int e, int, int) { products.at[m][n][e] *= scale; });
        if (side.columns != nullptr) {
          const Shared<float> mine = terms + walk.first_column();
          FLASHMAPS_UNROLL
          for (int n = 0; n < kColumnTiles; ++n) {
            const Float2 term = (mine + 8 * n).template as<Float2>().load(0);
            FLASHMAPS_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
              FLASHMAPS_UNROLL
              for (int e = 0; e < 4; ++e) products.at[m][n][e] += e % 2 == 0 ? term.x : term.y;
            }
          }
        }
        replace_tail(walk, products, tile, keys, kHidden);
        float max[kThreadRows], sum[kThreadRows] = {};
        FLASHMAPS_UNROLL
        for (int r = 0; r < kThreadRows; ++r) max[r] = rows[r].max;
        each_element(
            [&](int m, int n, int e, int r, int) { max[r] = fmaxf(max[r], products.at[m][n][e]); });
        float base[kThreadRows];
        FLASHMAPS_UNROLL
        for (int r = 0; r < kThreadRows; ++r) base[r] = shift_of(max[r], kHidden);
        each_element([&](int m, int n, int e, int r, int) {
          const float score = products.at[m][n][e] - base[r];
          sum[r] += n < FLASHMAPS_POLYNOMIAL ? exp2_polynomial(score) : exp2_fast(score);
        });
        FLASHMAPS_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
          rows[r].sum = rows[r].sum * exp2_fast(rows[r].max - base[r]) + sum[r];
          rows[r].max = max[r];
        }
      },
      [](int) {});

  const Shared<float> scratch = walk.scratch();
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    FLASHMAPS_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      rows[r].join(shuffle_xor(rows[r].max, mask), shuffle_xor(rows[r].sum, mask));
    }
    if (walk.lane % 4 == 0) {
      const Shared<float> to = scratch + 2 * (walk.warp_column * walk.rows + walk.row(r));
      to.store(0, rows[r].max);
      to.store(1, rows[r].sum);
    }
  }
  sync_threads();
  const Standing place;
  const int queries = side.kept_tokens().count;
  for (int row = thread_index(); row < walk.rows; row += block_size()) {
    const int query = place.first_row + row;
    if (query >= queries) break;
    Softmax all;
    for (int w = 0; w < a.tiling.warp_columns; ++w) {
      const Shared<float> from = scratch + 2 * (w * walk.rows + row);
      all.join(from.load(0), from.load(1));
    }
    const float log_sum = all.log_sum();
    const std::int64_t line = std::int64_t(place.map) * heads + place.part;
    if (a.parts != nullptr) {
      const std::int64_t lines = std::int64_t(a.map[0].maps) * heads;
      store_global(a.parts + (place.split * lines + line) * queries + query, log_sum);
    }
    if (a.lse != nullptr) store_global(a.lse + line * queries + query, log_sum * float(kLn2));
    if (a.shift != nullptr) {
      store_global(a.shift + line * a.map[0].shift_pitch + query,
                   log_sum == kHidden ? kHidden : -log_sum);
    }
  }
}

// Row statistics with queries kept, column statistics with keys kept.
template <class T, int S>
FLASHMAPS_KERNEL(kMostThreads, 1)
void statistics_kernel(FLASHMAPS_PARAMETER StatisticsArguments a) {
  Walk<T, S, 1> walk(a.map, a.tiling, a.grid);
  const Side<T>& side = walk.side(0);
  const StatisticsOutputs& out = a.out;
  const bool of_columns = a.map[0].keys_kept;
  const int num_kept = side.kept_tokens().count, num_streamed = side.streamed_tokens().count;
  RowState states[kThreadRows];
  Tile mean;
  mean.clear();
  walk.run(
      0, [](int) {},
      [&](int, int head, int, Tile& products, Shared<float> terms) {
        add_head(walk, side, mean, products, head, terms);
      },
      [&](int tile) {
        replace_tail(walk, mean, tile, num_streamed, 0.0f);
        const int tile_first = tile * walk.columns;
        const int first = tile_first + walk.first_column();
        if (out.total != nullptr || (out.entropy != nullptr && of_columns)) {
          add_mass(states, mean);
        }
        if (out.plogp != nullptr || out.entropy != nullptr) add_plogp(states, mean);
        if (out.top != nullptr || out.argtop != nullptr) take_top(states, mean, first);
        if (out.expectation != nullptr) {
          add_position(states, mean, tile_first, walk.first_column(), a.grid_width, a.grid_height);
        }
        if (out.diagonal != nullptr) {
          const Standing here;
          each_element([&](int m, int n, int e, int r, int column) {
            const int row = here.first_row + walk.row(r);
            if (row == first + column && row < num_kept) {
              store_global(out.diagonal + std::int64_t(here.map) * num_kept + row,
                           mean.at[m][n][e]);
            }
          });
        }
        if (out.dense != nullptr) {
          const Standing here;
          each_element([&](int m, int n, int e, int r, int column) {
            const int row = here.first_row + walk.row(r);
            const std::int64_t line = std::int64_t(here.map) * num_kept + row;
            if (row < num_kept && first + column < num_streamed) {
              store_global(out.dense + line * num_streamed + first + column, mean.at[m][n][e]);
            }
          });
        }
        mean.clear();
      });

  const Shared<float> scratch = walk.scratch();
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    FLASHMAPS_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) states[r].join(from_lane(states[r], mask));
    if (walk.lane % 4 == 0) {
      const int at = walk.warp_column * walk.rows + walk.row(r);
      store_state(scratch + kStateWords * at, states[r]);
    }
  }
  sync_threads();
  const Standing place;
  for (int row = thread_index(); row < walk.rows; row += block_size()) {
    const int index = place.first_row + row;
    if (index >= num_kept) break;
    RowState all;
    for (int w = 0; w < a.tiling.warp_columns; ++w) {
      all.join(load_state(scratch + kStateWords * (w * walk.rows + row)));
    }
    const std::int64_t part = std::int64_t(place.split) * a.map[0].maps + place.map;
    write_state(out, part * num_kept + index, all, of_columns, num_streamed - 1);
  }
}

// A @ x with queries kept, its transpose with keys kept: `width` columns of the operand a block.
//
// Both the map and the operand are split in two numbers of 11 bits each, of whose products the
// smallest is left out: errors are those of float32.
constexpr int kOperandWidth = 32;  // more would not fit the registers
constexpr int kOperandTiles = kOperandWidth / 8;

// Where an element of the operand lies: rows so far apart that a warp reads it without conflicts.
FLASHMAPS_ANYWHERE constexpr int operand_pitch(int width) {
  return width + 4;
}

struct Split {
  std::uint32_t high, low;
  FLASHMAPS_DEVICE explicit Split(float x) : high(round_tf32(x)) {
    low = round_tf32(x - from_bits(high));
  }
};

template <class T, int S>
FLASHMAPS_KERNEL(kMostThreads, 1)
void product_kernel(FLASHMAPS_PARAMETER ProductArguments a) {
  Walk<T, S, 1> walk(a.map, a.tiling, a.grid);
  const Side<T>& side = walk.side(0);
  const int num_kept = side.kept_tokens().count, num_streamed = side.streamed_tokens().count;
  const int pitch = operand_pitch(a.width);
  const Shared<float> tokens = walk.beside();
  const bool one_step = a.map[0].heads * chunks_of(a.map[0].dim, S) == 1;
  Tile mean;
  mean.clear();
  float sums[kRowTiles][kOperandTiles][4] = {};
  walk.run(
      0,
      [&](int tile) {
        const Standing here;
        const int first = here.part * a.width, there = a.columns - first;
        const float* operand = a.operand + here.map * a.operand_stride + first;
        const int each = a.aligned ? 4 : 1;
        const int units = a.width / each;
        for (int i = thread_index(); i < walk.columns * units; i += block_size()) {
          const int row = i / units, column = i % units * each;
          const int token = tile * walk.columns + row;
          const int bytes =
              token < num_streamed ? larger(0, smaller(4 * each, 4 * (there - column))) : 0;
          const float* from = bytes > 0 ? operand + token * a.operand_pitch + column : a.operand;
          const Shared<float> to = tokens + (row * pitch + column);
          if (a.aligned) {
            copy_async_16(to, from, bytes);
          } else {
            copy_async_4(to, from, bytes);
          }
        }
      },
      [&](int, int head, int, Tile& products, Shared<float> terms) {
        add_head(walk, side, mean, products, head, terms);
      },
      [&](int tile) {
        replace_tail(walk, mean, tile, num_streamed, 0.0f);
        if (one_step) {  // else the operand was waited for with a later step's tokens
          wait_copies<0>();
          sync_threads();
        }
        // The sum over a pair of columns 2 t and 2 t + 1 takes the places of t and t + 4: any order
        // will do, if it is the operand's too.
        const Shared<float> mine = tokens + (walk.first_column() * pitch + walk.lane / 4);
        FLASHMAPS_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          std::uint32_t high[kRowTiles][4], low[kRowTiles][4];
          FLASHMAPS_UNROLL
          for (int m = 0; m < kRowTiles; ++m) {
            FLASHMAPS_UNROLL
            for (int e = 0; e < 4; ++e) {
              const Split split(mean.at[m][n][e / 2 + e % 2 * 2]);
              high[m][e] = split.high;
              low[m][e] = split.low;
            }
          }
          FLASHMAPS_UNROLL
          for (int x = 0; x < kOperandTiles; ++x) {
            if (8 * x < a.width) {
              const Split b0(mine.load(8 * n * pitch + 8 * x));
              const Split b1(mine.load((8 * n + 1) * pitch + 8 * x));
              FLASHMAPS_UNROLL
              for (int m = 0; m < kRowTiles; ++m) {
                mma_1688_tf32(sums[m][x], low[m], b0.high, b1.high);
                mma_1688_tf32(sums[m][x], high[m], b0.low, b1.low);
                mma_1688_tf32(sums[m][x], high[m], b0.high, b1.high);
              }
            }
          }
        }
        mean.clear();
      });

  // Warps side by side add up what they have, one after the other.
  const Shared<float> scratch = walk.scratch();
  for (int w = 0; w < a.tiling.warp_columns; ++w) {
    if (walk.warp_column == w) {
      FLASHMAPS_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        FLASHMAPS_UNROLL
        for (int x = 0; x < kOperandTiles; ++x) {
          if (8 * x < a.width) {
            FLASHMAPS_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int at = walk.row(2 * m + e / 2) * pitch + 8 * x + 2 * (walk.lane % 4) + e % 2;
              scratch.store(at, (w == 0 ? 0.0f : scratch.load(at)) + sums[m][x][e]);
            }
          }
        }
      }
    }
    sync_threads();
  }
  const Standing place;
  const std::int64_t part = std::int64_t(place.split) * a.map[0].maps + place.map;
  const int first = place.part * a.width, width = smaller(a.width, a.columns - first);
  for (int i = thread_index(); i < walk.rows * width; i += block_size()) {
    const int row = i / width, column = i % width;
    const int index = place.first_row + row;
    if (index >= num_kept) break;
    store_global(a.out + (part * num_kept + index) * a.out_pitch + first + column,
                 scratch.load(row * pitch + column));
  }
}

// (A_st A_ts)_ii = sum_j A_st[i, j] A_ts[j, i]: source tokens are kept, as queries of the one map
// and as keys of the other, whose tiles so come out transposed. The sum is linear in A_ts: its
// heads go into it one by one, and only A_st's mean is kept.
template <class T, int S>
FLASHMAPS_KERNEL(kMostThreads, 1)
void return_kernel(FLASHMAPS_PARAMETER ReturnArguments a) {
  Walk<T, S, 2> walk(a.map, a.tiling, a.grid);
  const int sources = walk.side(0).kept_tokens().count;
  const int targets = walk.side(0).streamed_tokens().count;
  float sums[kThreadRows] = {};
  Tile there;
  there.clear();
  walk.run(
      0, [](int) {},
      [&](int source, int head, int tile, Tile& products, Shared<float> terms) {
        const Side<T>& side = walk.side(source);
        if (source == 0) {
          add_head(walk, side, there, products, head, terms);
          return;
        }
        to_probabilities(walk, side, products, terms);
        replace_tail(walk, products, tile, targets, 0.0f);
        float sum[kThreadRows] = {};
        each_element([&](int m, int n, int e, int r, int) {
          sum[r] += there.at[m][n][e] * products.at[m][n][e];
        });
        const float weight = side.weight(head);
        FLASHMAPS_UNROLL
        for (int r = 0; r < kThreadRows; ++r) sums[r] += weight * sum[r];
      },
      [&](int) { there.clear(); });

  const Shared<float> scratch = walk.scratch();
  FLASHMAPS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    FLASHMAPS_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) sums[r] += shuffle_xor(sums[r], mask);
    if (walk.lane % 4 == 0) scratch.store(walk.warp_column * walk.rows + walk.row(r), sums[r]);
  }
  sync_threads();
  const Standing place;
  for (int row = thread_index(); row < walk.rows; row += block_size()) {
    const int index = place.first_row + row;
    if (index >= sources) break;
    float all = 0;
    for (int w = 0; w < a.tiling.warp_columns; ++w) all += scratch.load(w * walk.rows + row);
    const std::int64_t part = std::int64_t(place.split) * a.map[0].maps + place.map;
    store_global(a.out + part * sources + index, all);
  }
}

}  // namespace flashmaps::cuda
