// Small kernels around the passes: what comes before, and the parts of splits together. One thread
// an element.
#pragma once

#include "cuda/reducers.h"

namespace flashmaps::cuda {

constexpr int kElementThreads = 256;

FLASHMAPS_DEVICE std::int64_t element_index() {
  return std::int64_t(block_index().x) * block_size() + thread_index();
}

FLASHMAPS_KERNEL(kElementThreads, 4)
void prepare_kernel(FLASHMAPS_PARAMETER PrepareArguments a) {
  const std::int64_t at = element_index();
  if (at >= a.rows * a.count) return;
  const std::int64_t row = at / a.count;
  const float x = load_global(a.in + at);
  store_global(a.out + row * a.pitch + (at - row * a.count), x == kHidden ? kHidden : x * a.factor);
}

// Splits come in the tokens' order.
FLASHMAPS_KERNEL(kElementThreads, 4)
void combine_kernel(FLASHMAPS_PARAMETER CombineArguments a) {
  const std::int64_t at = element_index();
  if (at >= a.count) return;
  RowState all;
  for (int split = 0; split < a.splits; ++split) {
    const std::int64_t from = split * a.count + at;
    const StatisticsOutputs& parts = a.parts;
    if (parts.total != nullptr) all.mass_or_x += load_global(parts.total + from);
    if (parts.plogp != nullptr) all.plogp += load_global(parts.plogp + from);
    if (parts.top != nullptr) {
      int where = 0;
      if (parts.argtop != nullptr) where = int(load_global(parts.argtop + from));
      keep_better(load_global(parts.top + from), where, all.top, all.argtop);
    }
    if (parts.expectation != nullptr) {
      all.mass_or_x += load_global(parts.expectation + 2 * from);
      all.y += load_global(parts.expectation + 2 * from + 1);
    }
  }
  write_state(a.out, at, all, a.of_columns, all.argtop);
}

FLASHMAPS_KERNEL(kElementThreads, 4)
void combine_lse_kernel(FLASHMAPS_PARAMETER CombineLseArguments a) {
  const std::int64_t at = element_index();
  const std::int64_t elements = a.rows * a.count;
  if (at >= elements) return;
  Softmax all;
  for (int split = 0; split < a.splits; ++split) {
    const float part = load_global(a.parts + split * elements + at);
    all.join(part, part == kHidden ? 0.0f : 1.0f);
  }
  const float log_sum = all.log_sum();
  if (a.lse != nullptr) store_global(a.lse + at, log_sum * float(kLn2));
  if (a.shift != nullptr) {
    const std::int64_t row = at / a.count;
    store_global(a.shift + row * a.pitch + (at - row * a.count),
                 log_sum == kHidden ? kHidden : -log_sum);
  }
}

}  // namespace flashmaps::cuda
