// The tile of the mean map, which all kernels share: a block keeps R tokens of one side (the rows)
// and streams those of the other past them, C at a time (the columns), all heads of a tile in turn.
//
// Scores are made by the matrix units from shared memory, 16 numbers of a head at a time, and stay
// in registers: a warp has 32 rows and 64 columns of a tile. Copies of the next step's tokens run
// while this one is computed. A head of more than 80 numbers comes in several chunks.
//
// The kept tokens of all heads lie in shared memory from beginning to end where they fit. Else they
// are streamed as well, and the second-level cache has (R + C) d numbers to give for each R C
// exponentials in place of C d.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/map.h"
#include "cuda/primitives.h"
#include "shared/arithmetic.h"

namespace flashmaps::cuda {

constexpr int kWarpRows = 32, kWarpColumns = 64;
constexpr int kMostThreads = 256;
constexpr int kStages = 2;

// Of every 8 columns' exponentials, how many groups are made of multiplications and additions: the
// unit for exponentials does 16 a clock, and is what bounds a pass over heads of up to 64 numbers.
#if !defined(FLASHMAPS_POLYNOMIAL)
#define FLASHMAPS_POLYNOMIAL 0
#endif

// How a head is cut: `chunks` pieces of 16 S numbers, S as small as that many chunks allow.
constexpr int kMostSteps = 5, kFewestSteps = 3;
FLASHMAPS_ANYWHERE constexpr int chunks_of(int dim, int steps) {
  return (dim + 16 * steps - 1) / (16 * steps);
}
constexpr int steps_of(int dim) {
  const int chunks = chunks_of(dim, kMostSteps);
  const int steps = (dim + 16 * chunks - 1) / (16 * chunks);
  return steps < kFewestSteps ? kFewestSteps : steps;
}

// Tokens in shared memory, 16 S numbers of each in a row of 2 S units of 16 bytes. Units are
// permuted so that the same unit of eight neighbouring rows lies in eight different groups of banks
// (ldmatrix), and so do eight neighbouring units (the copies).
template <int S>
struct Panel {
  static constexpr int kUnits = 2 * S, kRowBytes = 32 * S;
  FLASHMAPS_DEVICE static int permuted(int row, int unit) {
    if constexpr (S == 4) {
      return unit ^ (row & 7);
    } else {  // an odd number of pairs of banks' groups: two rows collide that are 4 apart
      static_assert(S % 2 == 1);
      return unit ^ (row >> 2 & 1);
    }
  }
  FLASHMAPS_DEVICE static int offset(int row, int unit) {
    return row * kRowBytes + 16 * permuted(row, unit);
  }
};

// A warp's part of a tile, in the accumulators' layout: with g = lane / 4 and t = lane % 4,
// at[m][n][2 i + j] is row 16 m + 8 i + g, column 8 n + 2 t + j. A thread's rows are numbered 2 m +
// i.
constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
constexpr int kThreadRows = 2 * kRowTiles;
struct Tile {
  float at[kRowTiles][kColumnTiles][4];

  FLASHMAPS_DEVICE void clear() {
    FLASHMAPS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      FLASHMAPS_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        FLASHMAPS_UNROLL
        for (int e = 0; e < 4; ++e) at[m][n][e] = 0.0f;
      }
    }
  }
};

// f(m, n, e, row of the thread, column of the warp's without 2 t) for each element that a thread
// has, all indices constants, columns in ascending order for each row.
template <class F>
FLASHMAPS_DEVICE void each_element(F f) {
  FLASHMAPS_UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    FLASHMAPS_UNROLL
    for (int e = 0; e < 4; ++e) {
      FLASHMAPS_UNROLL
      for (int m = 0; m < kRowTiles; ++m) f(m, n, e, 2 * m + e / 2, 8 * n + e % 2);
    }
  }
}

FLASHMAPS_DEVICE constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}
FLASHMAPS_DEVICE constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

// Pairs that Python could not check (under torch.compile) are held inside the batch.
FLASHMAPS_DEVICE std::int64_t batch_index(const Map& map, int index, bool of_key) {
  std::int64_t found = index;
  if (map.pairs != nullptr) found = load_global(map.pairs + 2 * std::int64_t(index) + of_key);
  const std::int64_t last = (of_key ? map.key : map.query).batches - 1;
  return found < 0 ? 0 : found > last ? last : found;
}

// Where a block stands, in shared memory: what is needed seldom takes no registers there.
constexpr int kPlaceBytes = 16;
FLASHMAPS_DEVICE Shared<std::int32_t> standing() {
  return shared_memory().as<std::int32_t>();
}
struct Standing {
  int map = standing().load(0), part = standing().load(1), split = standing().load(2),
      first_row = standing().load(3);
};

// The same as it is found: which map, which kept tokens, which tiles of the streamed ones.
struct Place {
  int map, part, split, first_row, first_tile, last_tile;

  FLASHMAPS_DEVICE Place(const Grid& grid, int rows) {
    int index = block_index().x;
    first_row = index % grid.blocks * rows;
    index /= grid.blocks;
    part = index % grid.parts;
    index /= grid.parts;
    split = index % grid.splits;
    map = index / grid.splits;
    first_tile = int(std::int64_t(grid.tiles) * split / grid.splits);
    last_tile = int(std::int64_t(grid.tiles) * (split + 1) / grid.splits);
  }
  // To be followed by a barrier.
  FLASHMAPS_DEVICE void keep() const {
    if (thread_index() != 0) return;
    standing().store(0, map);
    standing().store(1, part);
    standing().store(2, split);
    standing().store(3, first_row);
  }
};

// One map as a block sees it.
template <class T>
struct Side {
  const Map& map;
  const T* kept;         // of the map's first head
  const T* streamed;     // same
  const float* columns;  // what is added to scores, by streamed token; null: nothing
  const float* rows;     // by kept token; null: nothing

  FLASHMAPS_DEVICE Side(const Map& m, int index) : map(m) {
    const std::int64_t of_query = batch_index(map, index, false);
    const std::int64_t of_key = batch_index(map, index, true);
    const T* queries = static_cast<const T*>(map.query.data) + of_query * map.query.batch_stride;
    const T* keys = static_cast<const T*>(map.key.data) + of_key * map.key.batch_stride;
    kept = map.keys_kept ? keys : queries;
    streamed = map.keys_kept ? queries : keys;
    const float* bias = map.bias == nullptr ? nullptr : map.bias + of_key * map.bias_pitch;
    const float* shift = map.shift == nullptr
                             ? nullptr
                             : map.shift + std::int64_t(index) * map.heads * map.shift_pitch;
    columns = map.keys_kept ? shift : bias;
    rows = map.keys_kept ? bias : shift;
  }
  FLASHMAPS_DEVICE const Tokens& kept_tokens() const { return map.keys_kept ? map.key : map.query; }
  FLASHMAPS_DEVICE const Tokens& streamed_tokens() const {
    return map.keys_kept ? map.query : map.key;
  }
  FLASHMAPS_DEVICE const float* columns_of(int head) const {
    return map.keys_kept ? columns + head * map.shift_pitch : columns;
  }
  FLASHMAPS_DEVICE const float* rows_of(int head) const {
    return map.keys_kept ? rows : rows + head * map.shift_pitch;
  }
  FLASHMAPS_DEVICE float weight(int head) const {
    return map.weights == nullptr ? map.weight : load_global(map.weights + head);
  }
};

template <class T, int SOURCES>
struct Sides;
template <class T>
struct Sides<T, 1> {
  Side<T> of[1];
  FLASHMAPS_DEVICE Sides(const Map (&maps)[1], int index) : of{{maps[0], index}} {}
};
template <class T>
struct Sides<T, 2> {
  Side<T> of[2];
  FLASHMAPS_DEVICE Sides(const Map (&maps)[2], int index)
      : of{{maps[0], index}, {maps[1], index}} {}
};

// A block's way through its tiles: the copies, the barriers and the products. What becomes of the
// scores is the kernels'.
template <class T, int S, int SOURCES>
class Walk {
 public:
  const int lane = lane_index();
  const int warp_row, warp_column;  // of the block's warps
  const int rows, columns;          // of a tile
  const Place place;

  FLASHMAPS_DEVICE Walk(const Map (&maps)[SOURCES], const Tiling& tiling, const Grid& grid)
      : warp_row(warp_index() % tiling.warp_rows),
        warp_column(warp_index() / tiling.warp_rows),
        rows(kWarpRows * tiling.warp_rows),
        columns(kWarpColumns * tiling.warp_columns),
        place(grid, rows),
        resident_(tiling.resident),
        maps_(maps),
        sides_(maps, place.map) {}

  // The first of the thread's columns, from the tile's first column on.
  FLASHMAPS_DEVICE int first_column() const { return warp_column * kWarpColumns + 2 * (lane % 4); }
  // A row of the thread, from the block's first row on.
  FLASHMAPS_DEVICE int row(int r) const {
    return warp_row * kWarpRows + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  FLASHMAPS_DEVICE const Side<T>& side(int source) const { return sides_.of[source]; }

  // Memory for what the kernels keep beside the tiles.
  FLASHMAPS_DEVICE Shared<float> beside() const { return terms(kStages); }
  // The same memory as the stages, when all tiles are done and all threads know it.
  FLASHMAPS_DEVICE Shared<float> scratch() const { return memory().template as<float>(); }
  // What is added to scores: of the tile's columns, then of its rows.
  FLASHMAPS_DEVICE Shared<float> terms(int slot) const {
    return stage(kStages).template as<float>() + slot * (columns + rows);
  }

  // For each tile: copies(tile), once all threads are done with the tile before; for each source
  // and head, scores(source, head, tile, products, terms); at last done(tile). From first_head on.
  template <class Copies, class Scores, class Done>
  FLASHMAPS_DEVICE void run(int first_head, Copies copies, Scores scores, Done done) {
    first_head_ = first_head;
    place.keep();
    sync_threads();
    keep_residents();
    start({place.first_tile, 0, first_head, 0, 0, 0});
    commit_copies();
    int step = 0, heads_done = 0;
    for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
      FLASHMAPS_UNROLL
      for (int source = 0; source < SOURCES; ++source) {
        const int chunks = chunks_of(maps_[source].dim, S);
        const int heads = last_head(source);
        for (int head = first_head; head < heads; ++head) {
          Tile products;
          products.clear();
          for (int chunk = 0; chunk < chunks; ++chunk) {
            wait_copies<0>();
            sync_threads();
            if (source == 0 && head == first_head && chunk == 0) copies(tile);
            Cursor next{tile, source, head, chunk, step, heads_done};
            advance(next);
            if (next.tile < place.last_tile) start(next);
            commit_copies();
            multiply(products, kept_panel(source, head, chunk, step % kStages),
                     stage(step % kStages));
            ++step;
          }
          scores(source, head, tile, products, terms(heads_done % kStages));
          ++heads_done;
        }
      }
      done(tile);
    }
    sync_threads();
  }
  // Set before `run` to stop before the last head.
  FLASHMAPS_DEVICE void only_head(int head) { only_ = head; }

 private:
  // A step of the copies.
  struct Cursor {
    int tile, source, head, chunk, step, heads_done;
  };

  FLASHMAPS_DEVICE int last_head(int source) const {
    return only_ < 0 ? maps_[source].heads : only_ + 1;
  }
  FLASHMAPS_DEVICE void advance(Cursor& c) const {
    ++c.step;
    if (++c.chunk < chunks_of(maps_[c.source].dim, S)) return;
    c.chunk = 0;
    ++c.heads_done;
    if (++c.head < last_head(c.source)) return;
    c.head = first_head_;
    if (++c.source < SOURCES) return;
    c.source = 0;
    ++c.tile;
  }

  FLASHMAPS_DEVICE Shared<std::byte> memory() const { return shared_memory() + kPlaceBytes; }
  FLASHMAPS_DEVICE int kept_bytes() const { return rows * Panel<S>::kRowBytes; }
  FLASHMAPS_DEVICE int stage_bytes() const {
    return (columns + (resident_ ? 0 : rows)) * Panel<S>::kRowBytes;
  }
  // Kept tokens of all heads before those of a head.
  FLASHMAPS_DEVICE int residents(int source, int head, int chunk) const {
    int before = 0;
    if (source == 1) before = (last_head(0) - first_head_) * chunks_of(maps_[0].dim, S);
    return before + (head - first_head_) * chunks_of(maps_[source].dim, S) + chunk;
  }
  FLASHMAPS_DEVICE Shared<std::byte> stage(int slot) const {
    int kept = 0;
    if (resident_) kept = residents(SOURCES - 1, last_head(SOURCES - 1), 0) * kept_bytes();
    return memory() + (kept + slot * stage_bytes());
  }
  FLASHMAPS_DEVICE Shared<std::byte> kept_panel(int source, int head, int chunk, int slot) const {
    if (resident_) return memory() + residents(source, head, chunk) * kept_bytes();
    return stage(slot) + columns * Panel<S>::kRowBytes;
  }

  FLASHMAPS_DEVICE void keep_residents() const {
    if (!resident_) return;
    FLASHMAPS_UNROLL
    for (int source = 0; source < SOURCES; ++source) {
      for (int head = first_head_; head < last_head(source); ++head) {
        for (int chunk = 0; chunk < chunks_of(maps_[source].dim, S); ++chunk) {
          copy_kept(source, head, chunk, kept_panel(source, head, chunk, 0));
        }
      }
    }
  }
  FLASHMAPS_DEVICE void copy_kept(int source, int head, int chunk, Shared<std::byte> to) const {
    const Side<T>& of = side(source);
    copy_panel(to, of.kept, of.kept_tokens(), of.map.dim, head, chunk, Standing().first_row, rows);
  }
  FLASHMAPS_DEVICE void start(const Cursor& c) const {
    FLASHMAPS_UNROLL
    for (int source = 0; source < SOURCES; ++source) {
      if (source == c.source) start_of(source, c);
    }
  }
  FLASHMAPS_DEVICE void start_of(int source, const Cursor& c) const {
    const Side<T>& of = side(source);
    const Tokens& tokens = of.streamed_tokens();
    const Shared<std::byte> to = stage(c.step % kStages);
    const int first = c.tile * columns;
    copy_panel(to, of.streamed, tokens, of.map.dim, c.head, c.chunk, first, columns);
    if (!resident_) copy_kept(source, c.head, c.chunk, to + columns * Panel<S>::kRowBytes);
    if (c.chunk == 0) {
      const Shared<float> slot = terms(c.heads_done % kStages);
      if (of.columns != nullptr) {
        copy_terms(slot, of.columns_of(c.head), tokens.count, first, columns);
      }
      if (of.rows != nullptr) {
        copy_terms(slot + columns, of.rows_of(c.head), of.kept_tokens().count, Standing().first_row,
                   rows);
      }
    }
  }
  FLASHMAPS_DEVICE static void copy_terms(Shared<float> to, const float* from, int there, int first,
                                          int count) {
    for (int i = 4 * thread_index(); i < count; i += 4 * block_size()) {
      const int bytes = larger(0, smaller(16, 4 * (there - first - i)));
      copy_async_16(to + i, from + (bytes > 0 ? first + i : 0), bytes);
    }
  }
  // A chunk of a head of some tokens; zeros for tokens and numbers that are not there.
  FLASHMAPS_DEVICE static void copy_panel(Shared<std::byte> to, const T* from, const Tokens& tokens,
                                          int dim, int head, int chunk, int first, int count) {
    // A thread copies the same unit of every so many rows.
    constexpr int kUnits = Panel<S>::kUnits;
    const int at_once = block_size() / kUnits;
    const int unit = thread_index() % kUnits;
    int row = thread_index() / kUnits;
    if (row >= at_once) return;  // of 32 threads 6 units leave 2 over
    const int there = 8 * unit < dim - chunk * 16 * S ? tokens.count - first : 0;
    const T* at = from + head * tokens.head_stride + (first + row) * tokens.token_stride +
                  (chunk * 16 * S + 8 * unit);
    const std::int64_t step = at_once * tokens.token_stride;
    for (; row < count; row += at_once, at += step) {
      copy_async_16((to + Panel<S>::offset(row, unit)).template as<T>(), at, row < there ? 16 : 0);
    }
  }

  // products += kept tokens x streamed tokens, over a chunk.
  FLASHMAPS_DEVICE void multiply(Tile& products, Shared<std::byte> kept,
                                 Shared<std::byte> streamed) const {
    constexpr int kRow = Panel<S>::kRowBytes;
    const int kept_row = warp_row * kWarpRows + lane % 16;
    const int streamed_row = warp_column * kWarpColumns + lane / 16 * 8 + lane % 8;
    FLASHMAPS_UNROLL
    for (int k = 0; k < S; ++k) {
      std::uint32_t a[kRowTiles][4];
      FLASHMAPS_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        const int at = Panel<S>::offset(kept_row, 2 * k + lane / 16) + 16 * m * kRow;
        ldmatrix_x4(a[m], (kept + at).template as<T>());
      }
      FLASHMAPS_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        std::uint32_t b[4];
        const int at = Panel<S>::offset(streamed_row, 2 * k + lane / 8 % 2) + 8 * n * kRow;
        ldmatrix_x4(b, (streamed + at).template as<T>());
        FLASHMAPS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16816<T>(products.at[m][n], a[m], b[0], b[1]);
          mma_16816<T>(products.at[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  const bool resident_;
  const Map (&maps_)[SOURCES];
  const Sides<T, SOURCES> sides_;
  int first_head_ = 0, only_ = -1;
};

// What is added to a score, all of it in log2 units: one number for its row, one for its column.
enum class Terms { Row, Column, Both };

template <Terms terms, class W>
FLASHMAPS_DEVICE void exponentiate(const W& walk, Tile& products, float scale, Shared<float> slot) {
  float row[kThreadRows] = {};
  if constexpr (terms != Terms::Column) {
    FLASHMAPS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) row[r] = slot.load(walk.columns + walk.row(r));
  }
  const Shared<float> column = slot + walk.first_column();
  FLASHMAPS_UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    Float2 here{0, 0};
    if constexpr (terms != Terms::Row) here = (column + 8 * n).template as<Float2>().load(0);
    FLASHMAPS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      FLASHMAPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float of_column = e % 2 == 0 ? here.x : here.y;
        float term = of_column;
        if constexpr (terms == Terms::Row) term = row[2 * m + e / 2];
        if constexpr (terms == Terms::Both) term = row[2 * m + e / 2] + of_column;
        const float score = products.at[m][n][e] * scale + term;
        products.at[m][n][e] = n < FLASHMAPS_POLYNOMIAL ? exp2_polynomial(score) : exp2_fast(score);
      }
    }
  }
}

// One head's probabilities at a tile, exp2(scale q k - log-sum-exp), in place of its products.
template <class T, class W>
FLASHMAPS_DEVICE void to_probabilities(const W& walk, const Side<T>& side, Tile& products,
                                       Shared<float> terms) {
  const float scale = side.map.scale;
  if (side.columns == nullptr) {
    exponentiate<Terms::Row>(walk, products, scale, terms);
  } else if (side.rows == nullptr) {
    exponentiate<Terms::Column>(walk, products, scale, terms);
  } else {
    exponentiate<Terms::Both>(walk, products, scale, terms);
  }
}

// One head of the mean map at a tile. The weight costs nothing: without it the addition would take
// the same instruction.
template <class T, class W>
FLASHMAPS_DEVICE void add_head(const W& walk, const Side<T>& side, Tile& mean, Tile& products,
                               int head, Shared<float> terms) {
  to_probabilities(walk, side, products, terms);
  const float weight = side.weight(head);
  each_element(
      [&](int m, int n, int e, int, int) { mean.at[m][n][e] += weight * products.at[m][n][e]; });
}

// `value` in the columns of streamed tokens that are not there.
template <class W>
FLASHMAPS_DEVICE void replace_tail(const W& walk, Tile& tile, int index, int count, float value) {
  const int there = count - index * walk.columns;
  if (there >= walk.columns) return;
  const int first = walk.first_column();
  each_element([&](int m, int n, int e, int, int column) {
    if (first + column >= there) tile.at[m][n][e] = value;
  });
}

}  // namespace flashmaps::cuda
