#include "cuda/launch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/combine.h"
#include "cuda/passes.h"

namespace flashmaps::cuda {

extern template struct Variant<Half, 3>;
extern template struct Variant<Half, 4>;
extern template struct Variant<Half, 5>;
extern template struct Variant<BFloat, 3>;
extern template struct Variant<BFloat, 4>;
extern template struct Variant<BFloat, 5>;

namespace {

int rows_of(const Tiling& tiling) {
  return kWarpRows * tiling.warp_rows;
}
int columns_of(const Tiling& tiling) {
  return kWarpColumns * tiling.warp_columns;
}
int threads_of(const Tiling& tiling) {
  return kWarp * tiling.warp_rows * tiling.warp_columns;
}

// What tile.h lays out: the block's place, kept tokens, stages, terms of columns, then what a
// kernel keeps beside them
// (`beside`). At the end results of warps side by side take the same place (`results`).
template <int SOURCES>
int shared_bytes(const Map (&maps)[SOURCES], const Tiling& tiling, bool one_head, int beside,
                 int results) {
  int dim = 0;
  for (const Map& map : maps) dim = std::max(dim, map.dim);
  const int steps = steps_of(dim);
  std::int64_t pieces = 0;
  for (const Map& map : maps) {
    pieces += std::int64_t(one_head ? 1 : map.heads) * chunks_of(map.dim, steps);
  }
  const int row_bytes = 32 * steps;
  const int rows = rows_of(tiling), columns = columns_of(tiling);
  const std::int64_t kept = tiling.resident ? pieces * rows * row_bytes : 0;
  const int stage = (columns + (tiling.resident ? 0 : rows)) * row_bytes;
  const int terms = kStages * (columns + rows) * int(sizeof(float));
  const std::int64_t all = kept + kStages * stage + terms + beside;
  const std::int64_t most = std::numeric_limits<int>::max();
  return int(std::min(kPlaceBytes + std::max<std::int64_t>(all, results), most));
}

int blocks_for(std::int64_t elements) {
  return int((elements + kElementThreads - 1) / kElementThreads);
}

const Tokens& kept(const Map& map) {
  return map.keys_kept ? map.key : map.query;
}
const Tokens& streamed(const Map& map) {
  return map.keys_kept ? map.query : map.key;
}

template <class Arguments>
Index3 fill_grid(Arguments& a, int parts, int most_threads = kMostThreads) {
  const int warps = a.tiling.warp_rows * a.tiling.warp_columns;
  if (a.tiling.warp_rows < 1 || a.tiling.warp_columns < 1 || warps * kWarp > most_threads) {
    throw std::invalid_argument("flashmaps: no block has " + std::to_string(warps) + " warps");
  }
  const int rows = rows_of(a.tiling), columns = columns_of(a.tiling);
  a.grid.blocks = (kept(a.map[0]).count + rows - 1) / rows;
  a.grid.tiles = (streamed(a.map[0]).count + columns - 1) / columns;
  a.grid.parts = parts;
  if (a.grid.splits < 1 || a.grid.splits > a.grid.tiles) {
    throw std::invalid_argument("flashmaps: " + std::to_string(a.grid.tiles) +
                                " tiles cannot be split among " + std::to_string(a.grid.splits));
  }
  const std::int64_t all = std::int64_t(a.grid.blocks) * a.grid.splits * parts * a.map[0].maps;
  if (all > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("flashmaps: more blocks than a grid can have");
  }
  return {int(all), 1, 1};
}

// f.template operator()<T, steps>() for the type and the size of pieces at hand.
template <class F>
void choose(TokenType type, int dim, F f) {
  const bool half = type == TokenType::Half;
  switch (steps_of(dim)) {
    case 3:
      return half ? f.template operator()<Half, 3>() : f.template operator()<BFloat, 3>();
    case 4:
      return half ? f.template operator()<Half, 4>() : f.template operator()<BFloat, 4>();
    default:
      return half ? f.template operator()<Half, 5>() : f.template operator()<BFloat, 5>();
  }
}

}  // namespace

Limits device_limits(int device) {
  return limits(device);
}

int shared_bytes(const LogSumExpArguments& a) {
  return shared_bytes(a.map, a.tiling, true, 0, 8 * a.tiling.warp_columns * rows_of(a.tiling));
}
int shared_bytes(const StatisticsArguments& a) {
  return shared_bytes(a.map, a.tiling, false, 0,
                      4 * kStateWords * a.tiling.warp_columns * rows_of(a.tiling));
}
int shared_bytes(const ProductArguments& a) {
  const int pitch = int(sizeof(float)) * operand_pitch(a.width);
  return shared_bytes(a.map, a.tiling, false, columns_of(a.tiling) * pitch,
                      rows_of(a.tiling) * pitch);
}
int shared_bytes(const ReturnArguments& a) {
  return shared_bytes(a.map, a.tiling, false, 0, 4 * a.tiling.warp_columns * rows_of(a.tiling));
}

void launch_lse(LogSumExpArguments a, TokenType type, Stream stream) {
  const Index3 grid = fill_grid(a, a.map[0].heads, kLseThreads);
  choose(type, a.map[0].dim, [&]<class T, int S>() {
    Variant<T, S>::lse(a, grid, threads_of(a.tiling), shared_bytes(a), stream);
  });
}
void launch_statistics(StatisticsArguments a, TokenType type, Stream stream) {
  const Index3 grid = fill_grid(a, 1);
  choose(type, a.map[0].dim, [&]<class T, int S>() {
    Variant<T, S>::statistics(a, grid, threads_of(a.tiling), shared_bytes(a), stream);
  });
}
void launch_product(ProductArguments a, TokenType type, Stream stream) {
  if (a.width < 8 || a.width > kOperandWidth || a.width % 8 != 0) {
    throw std::invalid_argument("flashmaps: no part of an operand has " + std::to_string(a.width) +
                                " columns");
  }
  const Index3 grid = fill_grid(a, (a.columns + a.width - 1) / a.width);
  choose(type, a.map[0].dim, [&]<class T, int S>() {
    Variant<T, S>::product(a, grid, threads_of(a.tiling), shared_bytes(a), stream);
  });
}
void launch_return(ReturnArguments a, TokenType type, Stream stream) {
  const Index3 grid = fill_grid(a, 1);
  choose(type, std::max(a.map[0].dim, a.map[1].dim), [&]<class T, int S>() {
    Variant<T, S>::round_trip(a, grid, threads_of(a.tiling), shared_bytes(a), stream);
  });
}

void launch_prepare(const PrepareArguments& a, Stream stream) {
  launch("prepare", prepare_kernel, {blocks_for(a.rows * a.count), 1, 1}, kElementThreads, 0,
         stream, a);
}
void launch_combine(const CombineArguments& a, Stream stream) {
  launch("combine", combine_kernel, {blocks_for(a.count), 1, 1}, kElementThreads, 0, stream, a);
}
void launch_combine_lse(const CombineLseArguments& a, Stream stream) {
  launch("combine_lse", combine_lse_kernel, {blocks_for(a.rows * a.count), 1, 1}, kElementThreads,
         0, stream, a);
}

}  // namespace flashmaps::cuda
