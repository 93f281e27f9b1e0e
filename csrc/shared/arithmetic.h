// Arithmetic that the CPU kernels and the CUDA kernels share: which of two maxima stands, how a
// running log-sum-exp takes up more, what an entropy is made of. Plain templates: the CPU kernels
// call some of them with vectors in place of numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define FLASHMAPS_ANYWHERE __host__ __device__ __forceinline__
#else
#define FLASHMAPS_ANYWHERE inline
#endif

namespace flashmaps {

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

template <class T>
constexpr T kLeast = std::numeric_limits<T>::min();  // the smallest normal number

// The maximum so far beside a later candidate. Only a larger one takes its place, so the lowest
// index wins ties where candidates come in ascending order; NaN never does.
template <class V, class I>
FLASHMAPS_ANYWHERE void keep_better(V candidate, I index, V& top, I& where) {
  const auto better = candidate > top;
  where = better ? index : where;
  top = better ? candidate : top;
}

// The same of two that come in no order.
template <class V, class I>
FLASHMAPS_ANYWHERE void keep_better_of_any(V candidate, I index, V& top, I& where) {
  const bool better = candidate > top || (candidate == top && index < where);
  where = better ? index : where;
  top = better ? candidate : top;
}

// What is subtracted from scores before they are exponentiated: their maximum, or 0 while every key
// was hidden and it is `lowest`, minus infinity.
template <class V>
FLASHMAPS_ANYWHERE V shift_of(V max, V lowest) {
  return max > lowest ? max : V{};
}

// log c - sum a log a / c in nats, the entropy of a column with mass c that does not sum to one; 0
// where it has underflowed.
template <class T, class Log>
FLASHMAPS_ANYWHERE T entropy_of_column(T mass, T plogp, Log log) {
  return mass >= kLeast<T> ? log(mass) - plogp / mass : T(0);
}

}  // namespace flashmaps
