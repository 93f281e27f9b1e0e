// What crosses from Python for the way back: dL/dA in closed form, and where gradients go.
#pragma once

#include "cpu/map.h"

namespace flashmaps {

// One pointer a field of `Gradient` in python/flashmaps/maps/problem.py; 0 for what there is not.
struct Gradient {
  std::uintptr_t row_add = 0, row_log = 0, row_back = 0;           // T [P, N]
  std::uintptr_t column_add = 0, column_log = 0, column_back = 0;  // T [P, M]
  std::uintptr_t left = 0, right = 0;  // T [P, N, columns], [P, M, columns]
  std::int64_t columns = 0;
  std::uintptr_t row_index = 0, row_values = 0;  // int64 and T [P, N, entries]
  std::int64_t entries = 0;
  std::uintptr_t column_index = 0, column_values = 0;  // int64 and T [P, M]
  std::uintptr_t dense = 0;                            // T [P, N, M]
  std::uintptr_t cells = 0, pooled = 0;                // int64 [M], T [P, N, num_cells]
  std::int64_t num_cells = 0;
  std::uintptr_t lse = 0;                // T [P, H, N]
  Problem partner;                       // the map back, with its lse, for row_back, column_back
  std::uintptr_t partner_line_mass = 0;  // T [P, M, lines] of the map back, where it is normalised
};

// Where gradients are added, all contiguous and zero before; 0 for what is not wanted. With `lse`
// the log-sum-exp is an input of its own.
struct Gradients {
  std::uintptr_t query = 0, key = 0, bias = 0, head_weights = 0, lse = 0;
};

// As `Reduce`. The problem carries its log-sum-exp.
using Backward = Cost (*)(const Problem&, const Gradient&, const Gradients&, const Limits&);

}  // namespace flashmaps
