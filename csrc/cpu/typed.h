// What every kernel has first: a problem with its types, its lines, the state of a thread.
#pragma once

#include <algorithm>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/map.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/tokens.h"
#include "shared/arithmetic.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The state that a thread needs in here, put back when it leaves.
//
// Numbers below the smallest normal one are zero here: they cost a hundred cycles each and weigh
// nothing in a sum.
class ThreadState {
 public:
#if defined(__x86_64__)
  ThreadState() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~ThreadState() { _mm_setcsr(before_); }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;

 private:
  unsigned before_;
#else
  ThreadState() {}  // not trivial: an unused variable otherwise
#endif
};

template <class T>
inline T* pointer(std::uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

// A problem, typed. Scores are kept in log2 units: log2(e) is folded into the scale and the biases.
template <class T>
struct Map {
  const Problem& problem;
  Tokens<T> query, key;
  T scale;
  Buffer<T> bias;  // [B', M], log2 units

  Map(const Problem& p, Workspace& workspace)
      : problem(p),
        query{pointer<const void>(p.query), p.query_strides, DType(p.dtype), p.dim},
        key{pointer<const void>(p.key), p.key_strides, DType(p.dtype), p.dim, p.key_group},
        scale(T(p.scale * kLog2e)) {
    if (p.bias == 0) return;
    const std::int64_t count = p.key_batch * p.keys;
    bias = Buffer<T>(workspace, count);
    if (workspace.planning) return;
    const T* nats = pointer<const T>(p.bias);
    for (std::int64_t n = 0; n < count; ++n) bias[n] = T(nats[n] * kLog2e);
  }
  // Pairs that Python could not check (under torch.compile) are held inside the batch.
  static std::int64_t clamp(std::int64_t b, std::int64_t size) {
    return std::clamp<std::int64_t>(b, 0, size - 1);
  }
  std::int64_t query_index(std::int64_t map) const {
    const auto* pairs = pointer<const std::int64_t>(problem.pairs);
    return clamp(pairs == nullptr ? map : pairs[2 * map], problem.query_batch);
  }
  std::int64_t key_index(std::int64_t map) const {
    const auto* pairs = pointer<const std::int64_t>(problem.pairs);
    return clamp(pairs == nullptr ? map : pairs[2 * map + 1], problem.key_batch);
  }
  T weight(std::int64_t h) const {
    const auto* weights = pointer<const T>(problem.weights);
    return weights == nullptr ? T(1) / T(problem.heads) : weights[h];
  }
  const T* key_bias(std::int64_t map) const {
    return problem.bias == 0 ? nullptr : bias + key_index(map) * problem.keys;
  }
  // The given log-sum-exp of a query, in log2 units.
  T lse(std::int64_t map, std::int64_t h, std::int64_t i) const {
    const auto& stride = problem.lse_strides;
    const auto* nats = pointer<const T>(problem.lse);
    return T(nats[map * stride[0] + h * stride[1] + i * stride[2]] * kLog2e);
  }
};

// The lines of note eq. 2.3 that the keys of a map lie on.
struct Lines {
  std::int64_t count = 1, period = 1;
  bool wrap = false;
  explicit Lines(const Problem& p) {
    if (Normalize(p.normalize) == Normalize::Block) return;
    wrap = Normalize(p.normalize) == Normalize::Columns;
    count = wrap ? p.grid_width : p.grid_height;
    period = p.grid_width;
  }
  std::int64_t of(std::int64_t key) const {
    return count == 1 && !wrap ? 0 : wrap ? key % period : key / period;
  }
};

// One over the mass of a line. One whose mass underflows float gives zeros.
template <class T>
inline T inverse_mass(T mass) {
  return mass >= T(std::numeric_limits<float>::min()) ? T(1) / mass : T(0);
}

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
