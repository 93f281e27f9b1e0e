// Q and K as they lie in memory: any of the four dtypes, any strides.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/map.h"
#include "cpu/simd.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Keys are converted, where they must be, this many at a time. A multiple of every kTileKeys.
constexpr std::int64_t kKeyChunk = 96;

// Rows of a [B, H, tokens, d] tensor as T, read in place where they are T and contiguous in d.
template <class T>
struct Tokens {
  const void* data;
  std::array<std::int64_t, 4> strides;
  DType dtype;
  std::int64_t dim;
  std::int64_t group = 1;  // heads h that share one head of the tokens

  bool in_place() const {
    const bool same = dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64);
    // Rows a multiple of 2 KB apart would fight for a few sets of the cache.
    return same && strides[3] == 1 && (strides[2] * std::int64_t(sizeof(T))) % 2048 != 0;
  }
  // Rows of T that follow each other without a gap.
  bool is_plain() const {
    const bool same = dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64);
    return same && strides[3] == 1 && strides[2] == dim;
  }
  const T* at(std::int64_t b, std::int64_t h, std::int64_t row) const {
    return static_cast<const T*>(data) + offset(b, h) + row * strides[2];
  }
  std::int64_t offset(std::int64_t b, std::int64_t h) const {
    return b * strides[0] + h / group * strides[1];
  }
  template <class S, class F>
  void each(std::int64_t b, std::int64_t h, std::int64_t row, F use) const {
    const S* p = static_cast<const S*>(data) + offset(b, h) + row * strides[2];
    if (strides[3] == 1) {
      for (std::int64_t x = 0; x < dim; ++x) use(x, widen<T>(p[x]));
    } else {
      for (std::int64_t x = 0; x < dim; ++x) use(x, widen<T>(p[x * strides[3]]));
    }
  }
  template <class F>
  void row(std::int64_t b, std::int64_t h, std::int64_t row, F use) const {
    switch (dtype) {
      case DType::Float32:
        return each<float>(b, h, row, use);
      case DType::Float64:
        return each<double>(b, h, row, use);
      case DType::Float16:
        return each<Half>(b, h, row, use);
      case DType::BFloat16:
        return each<BFloat>(b, h, row, use);
    }
  }
};

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
