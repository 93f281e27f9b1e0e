// What crosses from Python into the CPU kernels: raw pointers, sizes and strides, no torch headers.
#pragma once

#include <array>
#include <cstdint>

namespace flashmaps {

enum class DType : int { Float32 = 0, Float64 = 1, Float16 = 2, BFloat16 = 3 };
enum class Normalize : int { Block = 0, Rows = 1, Columns = 2 };

// A = sum_h w_h softmax(scale * Q_h K_h^T + bias); python/flashmaps/maps/problem.py has the
// meanings. T below is the compute type: double for Float64, else float.
struct Problem {
  std::uintptr_t query = 0;                     // [B, H, N, d], strides in elements
  std::array<std::int64_t, 4> query_strides{};  //
  std::uintptr_t key = 0;                       // [B', H, M, d]
  std::array<std::int64_t, 4> key_strides{};    //
  int dtype = 0;                                // of query and key
  std::uintptr_t bias = 0;                      // T [B', M], or 0
  std::uintptr_t weights = 0;                   // T [H], or 0 for 1 / H
  std::uintptr_t pairs = 0;                     // int64 [P, 2], or 0 for (i, i)
  std::uintptr_t lse = 0;                       // T [P, H, N], natural log, or 0
  std::array<std::int64_t, 3> lse_strides{};    //
  std::int64_t query_batch = 0, key_batch = 0, maps = 0, heads = 0, queries = 0, keys = 0, dim = 0;
  std::int64_t key_group = 1;  // query heads that share a key head
  double scale = 1.0;
  int normalize = 0;
  std::int64_t grid_height = 0, grid_width = 0;  // of the keys; 0 where none is known
};

struct Operands {
  std::uintptr_t right = 0;  // T [P, M, right_columns], for product
  std::int64_t right_columns = 0;
  std::uintptr_t left = 0;  // T [P, N, left_columns], for transposed_product
  std::int64_t left_columns = 0;
  std::int64_t k = 0;        // for topk
  std::uintptr_t cells = 0;  // int64 [M], the cell of each key, for pooled_keys
  std::int64_t num_cells = 0;
  Problem partner;  // the map back, M x N, with its lse, for return_probability
  std::uintptr_t partner_line_mass = 0;  // T [P, M, lines] of the map back, where it is normalised
};

// One pointer a field of python/flashmaps/maps/problem.py; 0 means that it was not asked for.
struct Outputs {
  std::uintptr_t lse = 0, entropy = 0, max = 0, argmax = 0, expectation = 0, diagonal = 0,
                 return_probability = 0, product = 0, dense = 0, topk_values = 0, topk_indices = 0,
                 pooled_keys = 0, column_sum = 0, column_entropy = 0, column_max = 0,
                 column_argmax = 0, transposed_product = 0;
};

// How much a call may take, and whether it is only to say what it would take: then the pointers
// above only tell what there is, and nothing is read or written.
struct Limits {
  int threads = 1;
  std::int64_t memory_budget = 0;  // bytes beyond inputs and outputs; 0 for no limit
  bool only_plan = false;
  bool matrix_unit = false;  // whether the processor has one (AMX) that may be used
};

struct Cost {
  std::int64_t workspace = 0;  // bytes beyond inputs and outputs
  std::int64_t threads = 0;
  std::int64_t passes = 0;  // how often the scores of the whole map are computed
};

// Computes every output asked for. Where the smallest workspace there is exceeds the budget, that
// is what it takes: to refuse is the caller's part.
using Reduce = Cost (*)(const Problem&, const Operands&, const Outputs&, const Limits&);

}  // namespace flashmaps
