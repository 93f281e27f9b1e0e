// What crosses from the host into the kernels: pointers, sizes and strides, all of them trivial.
#pragma once

#include <cstdint>

namespace flashmaps::cuda {

// Q or K, float16 or bfloat16: rows of d numbers, each row at a multiple of 16 bytes.
struct Tokens {
  const void* data = nullptr;  // [batches, heads, count, d]
  std::int64_t batches = 0, batch_stride = 0, head_stride = 0, token_stride = 0;  // in elements
  int count = 0;
};

// A = sum_h w_h softmax(scale * Q_h K_h^T + bias); python/flashmaps/maps/problem.py has the
// meanings.
struct Map {
  Tokens query, key;
  int maps = 0, heads = 0, dim = 0;
  float scale = 1;                      // times log2 e: scores are in log2 units
  float weight = 0;                     // of each head, where they are all the same
  const float* weights = nullptr;       // [H], or null
  const std::int64_t* pairs = nullptr;  // [P, 2], or null for (i, i)
  const float* bias = nullptr;          // [B', bias_pitch], log2 units, or null
  const float* shift = nullptr;         // [P, H, shift_pitch]: minus the log-sum-exp, log2 units
  std::int64_t bias_pitch = 0, shift_pitch = 0;  // multiples of 4: whole 16 bytes are copied
  bool keys_kept = false;  // queries are streamed past keys, for what is per key
};

// How a block makes its tiles. A warp has 32 x 64 of each.
struct Tiling {
  int warp_rows = 4, warp_columns = 1;
  bool resident = false;  // the kept tokens of all heads stay in shared memory
};

// Which tiles a block makes: of one block of kept tokens, a split of the streamed ones.
struct Grid {
  int blocks = 1, splits = 1, parts = 1, tiles = 1;
};

// Where the statistics of a pass go; null where one is not wanted. Of several splits, each writes
// its own part, [splits, ...], and these are combined in the tokens' order.
struct StatisticsOutputs {
  float* total = nullptr;          // sum of a row: of keys kept alone
  float* plogp = nullptr;          // sum of p log2 p
  float* entropy = nullptr;        // nats; made of these two, where there is one split
  float* top = nullptr;            // maximum
  std::int64_t* argtop = nullptr;  // and where it is
  float* expectation = nullptr;    // [..., 2]
  float* diagonal = nullptr;       // without splits
  float* dense = nullptr;          // without splits, [P, kept, streamed]
};

struct StatisticsArguments {
  Map map[1];
  Tiling tiling;
  Grid grid;
  StatisticsOutputs out;
  int grid_width = 1, grid_height = 1;  // of the keys
};

struct LogSumExpArguments {
  Map map[1];
  Tiling tiling;
  Grid grid;
  float* lse = nullptr;    // [P, H, N], nats, or null
  float* shift = nullptr;  // [P, H, shift_pitch], or null
  float* parts = nullptr;  // [splits, P, H, N], log2 units, where there is more than one
};

struct ProductArguments {
  Map map[1];
  Tiling tiling;
  Grid grid;
  const float* operand = nullptr;                      // [P, streamed, columns]
  std::int64_t operand_stride = 0, operand_pitch = 0;  // from map to map, from token to token
  int columns = 0;
  int width = 0;         // of them in a part, padded to a multiple of 8
  bool aligned = false;  // rows of the operand lie at multiples of 16 bytes
  float* out = nullptr;  // [splits, P, kept, out_pitch]
  std::int64_t out_pitch = 0;
};

struct ReturnArguments {
  Map map[2];  // there, and back with its keys kept
  Tiling tiling;
  Grid grid;
  float* out = nullptr;  // [splits, P, N]
};

// out[row, column] = factor * in[row, column], minus infinity always staying what it is.
struct PrepareArguments {
  const float* in = nullptr;  // [rows, count]
  float* out = nullptr;       // [rows, pitch]
  std::int64_t rows = 0, pitch = 0;
  int count = 0;
  float factor = 1;
};

// Parts of splits together. Fields as above; [splits, count] become [count].
struct CombineArguments {
  StatisticsOutputs parts, out;
  std::int64_t count = 0;
  int splits = 1;
  bool of_columns = false;  // entropies of columns, which are not of distributions
};

struct CombineLseArguments {
  const float* parts = nullptr;  // [splits, rows, count], log2 units
  float* lse = nullptr;          // [rows, count], nats, or null
  float* shift = nullptr;        // [rows, pitch], or null
  std::int64_t rows = 0, pitch = 0;
  int count = 0, splits = 1;
};

}  // namespace flashmaps::cuda
