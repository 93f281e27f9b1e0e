// Vectors of the instruction set that this file is compiled for, by GCC and Clang's vector types.
// The kernels keep R = kWidth vectors of queries side by side: every reduction over keys is then
// lane-wise, with no shuffles, whatever the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace flashmaps::FLASHMAPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileKeys = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileKeys = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileKeys = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileKeys = 4;
#endif
// Three vectors of queries by kTileKeys keys accumulate in 24 of 32 registers, or 12 of 16. Two
// vectors by half as many keys again would fit as well, but load more for each multiplication.
constexpr int kWidth = 3;
// With sixteen registers the product must be a function of its own, or GCC spills its accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Int = std::int32_t;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef std::uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  using Int = std::int64_t;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef std::uint64_t U __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;
// Bits: what is added to them and shifted out of them wraps, also where the number was NaN or inf.
template <class T>
using UVec = typename Simd<T>::U;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T>
constexpr int kRows = kWidth * kLanes<T>;  // R, the queries of a strip

template <class T>
inline Vec<T> load(const T* p) {  // p aligned
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {  // p aligned
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
inline Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Is a > b in any lane?
template <class T>
inline bool any_greater(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  } else {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)) != 0;
  }
#else
  const IVec<T> greater = a > b;
  typename Simd<T>::Int any = 0;
  for (int l = 0; l < kLanes<T>; ++l) any |= greater[l];
  return any != 0;
#endif
}

// 2^t for t <= 127; exactly 0 below the smallest normal number and at -inf.
//
// n = round(t) comes from adding 1.5 * 2^23, which leaves n in the low bits; 2^(t - n) on
// [-1/2, 1/2] from a minimax polynomial (relative error 1.9e-9, rounding adds 0.8e-7).
inline Vec<float> exp2(Vec<float> t) {
#if defined(__AVX512F__)
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)t, 0x08);  // t - round(t); 0 at -inf
#else
  const Vec<float> lowest = splat(-126.0f);
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> clamped = vmax<float>(t, lowest);
  const Vec<float> shifted = clamped + magic;
  const Vec<float> f = clamped - (shifted - magic);
#endif
  Vec<float> p = splat(1.5345802114421388e-4f);
  p = p * f + 1.339993113929297e-3f;
  p = p * f + 9.618488993870893e-3f;
  p = p * f + 5.550328777213866e-2f;
  p = p * f + 0.24022646890294574f;
  p = p * f + 0.6931472057371137f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
#else
  const UVec<float> bits = (UVec<float>)p + ((UVec<float>)shifted << 23);
  return (Vec<float>)(bits & ~(UVec<float>)(t < lowest));
#endif
}

inline Vec<double> exp2(Vec<double> t) {
  const Vec<double> lowest = splat(-1022.0);
  const Vec<double> magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> clamped = vmax<double>(t, lowest);
  const Vec<double> shifted = clamped + magic;
  const Vec<double> x = (clamped - (shifted - magic)) * 0.693147180559945309417;
  // Taylor's series of exp on |x| <= 0.347: the first term left out is below 1e-17.
  Vec<double> p = splat(1.0 / 6227020800.0);
  p = p * x + 1.0 / 479001600.0;
  p = p * x + 1.0 / 39916800.0;
  p = p * x + 1.0 / 3628800.0;
  p = p * x + 1.0 / 362880.0;
  p = p * x + 1.0 / 40320.0;
  p = p * x + 1.0 / 5040.0;
  p = p * x + 1.0 / 720.0;
  p = p * x + 1.0 / 120.0;
  p = p * x + 1.0 / 24.0;
  p = p * x + 1.0 / 6.0;
  p = p * x + 0.5;
  p = p * x + 1.0;
  p = p * x + 1.0;
  const UVec<double> bits = (UVec<double>)p + ((UVec<double>)shifted << 52);
  return (Vec<double>)(bits & ~(UVec<double>)(t < lowest));
}

// log2 x for the smallest normal number and more; below it, of that number. x = 2^e (1 + r) with 1
// + r in [sqrt(1/2), sqrt(2)).
inline Vec<float> log2(Vec<float> x) {
  const Vec<float> safe = vmax<float>(x, splat(std::numeric_limits<float>::min()));
  const UVec<float> bits = (UVec<float>)safe;
  const IVec<float> e = (IVec<float>)(bits - 0x3f3504f3u) >> 23;
  const Vec<float> r = (Vec<float>)(bits - ((UVec<float>)e << 23)) - 1.0f;
  // log2(1 + r) = r p(r): minimax, relative error 2.6e-8.
  Vec<float> p = splat(0.12583539186039436f);
  p = p * r - 0.20726895063933606f;
  p = p * r + 0.21571584264817503f;
  p = p * r - 0.23894494987019665f;
  p = p * r + 0.28791623758613205f;
  p = p * r - 0.36070367681468307f;
  p = p * r + 0.4809106431060747f;
  p = p * r - 0.7213473468734936f;
  p = p * r + 1.4426950036518904f;
  return p * r + __builtin_convertvector(e, Vec<float>);
}

inline Vec<double> log2(Vec<double> x) {
  const Vec<double> safe = vmax<double>(x, splat(std::numeric_limits<double>::min()));
  const UVec<double> bits = (UVec<double>)safe;
  const IVec<double> e = (IVec<double>)(bits - 0x3fe6a09e667f3bcdULL) >> 52;
  const Vec<double> m = (Vec<double>)(bits - ((UVec<double>)e << 52));
  // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172.
  const Vec<double> s = (m - 1.0) / (m + 1.0);
  const Vec<double> z = s * s;
  Vec<double> p = splat(1.0 / 25.0);
  for (int odd = 23; odd >= 1; odd -= 2) p = p * z + 1.0 / odd;
  // Not __builtin_convertvector: AVX2 has no conversion from 64-bit integers. |e| < 2^51.
  const Vec<double> magic = splat(6755399441055744.0);
  const Vec<double> exponent = (Vec<double>)(e + (IVec<double>)magic) - magic;
  return exponent + 2.88539008177792681472 * s * p;
}

// x log2 x for 0 <= x, with 0 log 0 = 0.
inline Vec<float> xlog2x(Vec<float> x) {
  return x * log2(x);
}
inline Vec<double> xlog2x(Vec<double> x) {
  return x * log2(x);
}

// Sum and maximum over the R lanes at p, in one fixed order: vectors first, then halving.
template <class T>
inline T lane_sum(const T* p) {
  alignas(kVectorBytes) T t[kLanes<T>];
  Vec<T> all = load(p);
  for (int v = 1; v < kWidth; ++v) all += load(p + v * kLanes<T>);
  store<T>(t, all);
  for (int w = kLanes<T> / 2; w > 0; w /= 2) {
    for (int l = 0; l < w; ++l) t[l] += t[l + w];
  }
  return t[0];
}
template <class T>
inline T lane_max(const T* p) {
  alignas(kVectorBytes) T t[kLanes<T>];
  Vec<T> all = load(p);
  for (int v = 1; v < kWidth; ++v) all = vmax<T>(all, load(p + v * kLanes<T>));
  store<T>(t, all);
  for (int w = kLanes<T> / 2; w > 0; w /= 2) {
    for (int l = 0; l < w; ++l) t[l] = t[l] > t[l + w] ? t[l] : t[l + w];
  }
  return t[0];
}

// One element of Q or K as T.
template <class T>
inline T widen(float x) {
  return T(x);
}
template <class T>
inline T widen(double x) {
  return T(x);
}
struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};
template <class T>
inline T widen(BFloat x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return T(f);
}
template <class T>
inline T widen(Half x) {
  // Renormalise so that no intermediate is a subnormal float (the kernel flushes those): add
  // 2^-14's exponent to a subnormal half's mantissa and subtract 2^-14 again.
  std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13;
  float f;
  if (magnitude < 0x00800000u) {
    const std::uint32_t shifted = magnitude + 0x38800000u;  // 2^-14 (1 + m)
    std::memcpy(&f, &shifted, 4);
    f -= 6.103515625e-5f;
  } else {
    const std::uint32_t rebased = magnitude + 0x38000000u;
    std::memcpy(&f, &rebased, 4);
  }
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  bits |= std::uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return T(f);
}

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
