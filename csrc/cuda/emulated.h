// The primitives of cuda/primitives.h on the host: the same names and meanings as cuda/device.h.
// Each knows the line that it is called from, which errors name.
#pragma once

#include <cfloat>
#include <cstring>

#include "cuda/emulation/machine.h"
#include "cuda/emulation/warp.h"
#include "cuda/types.h"

#define FLASHMAPS_KERNEL(threads, blocks) inline
#define FLASHMAPS_PARAMETER const
#define FLASHMAPS_DEVICE inline
#define FLASHMAPS_UNROLL

namespace flashmaps::cuda {

using emulation::Here;

inline Index3 block_index() {
  return emulation::running.block;
}
inline Index3 grid_size() {
  return emulation::running.grid;
}
inline int thread_index() {
  return emulation::running.thread;
}
inline int block_size() {
  return emulation::running.threads;
}
inline int lane_index() {
  return thread_index() % kWarp;
}
inline int warp_index() {
  return thread_index() / kWarp;
}

inline void sync_threads(Here here = Here::current()) {
  emulation::sync_threads(here);
}
inline void sync_warp(Here here = Here::current()) {
  emulation::meet(emulation::Primitive::SyncWarp, here, nullptr, emulation::sync_warp);
}

inline std::uint32_t as_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class T>
T load_global(const T* from, Here here = Here::current()) {
  emulation::check_global(from, sizeof(T), false, here);
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}
template <class T>
void store_global(T* to, const T& x, Here here = Here::current()) {
  emulation::check_global(to, sizeof(T), true, here);
  std::memcpy(to, &x, sizeof(T));
}

template <class T>
class Shared {
 public:
  explicit Shared(int byte) : byte_(byte) {}

  T load(int i, Here here = Here::current()) const {
    T x;
    std::memcpy(&x, emulation::read_shared(address(i), sizeof(T), here), sizeof(T));
    return x;
  }
  void store(int i, const T& x, Here here = Here::current()) const {
    std::memcpy(emulation::write_shared(address(i), sizeof(T), here), &x, sizeof(T));
  }
  Shared operator+(int i) const { return Shared(address(i)); }
  template <class U>
  Shared<U> as() const {
    return Shared<U>(byte_);
  }
  template <class U>
  Shared<U> from_byte(int offset) const {
    return Shared<U>(byte_ + offset);
  }

  int address(int i = 0) const { return byte_ + i * int(sizeof(T)); }

 private:
  int byte_;  // of the block's shared memory
};

inline Shared<std::byte> shared_memory() {
  return Shared<std::byte>(0);
}

template <class T>
void copy_async_16(Shared<T> to, const T* from, int bytes = 16, Here here = Here::current()) {
  emulation::copy_async(to.address(), from, 16, bytes, here);
}
template <class T>
void copy_async_4(Shared<T> to, const T* from, int bytes = 4, Here here = Here::current()) {
  emulation::copy_async(to.address(), from, 4, bytes, here);
}
inline void commit_copies() {
  emulation::commit_copies();
}
template <int N>
void wait_copies(Here here = Here::current()) {
  emulation::wait_copies(N, here);
}

namespace emulation {

template <class T>
T exchanged(Primitive primitive, T x, int lane, Here here) {
  static_assert(sizeof(T) == 4);
  Exchange own{0, lane, 0};
  std::memcpy(&own.value, &x, 4);
  meet(primitive, here, &own, exchange);
  std::memcpy(&x, &own.result, 4);
  return x;
}

}  // namespace emulation

template <class T>
T shuffle_xor(T x, int mask, Here here = Here::current()) {
  return emulation::exchanged(emulation::Primitive::ShuffleXor, x, lane_index() ^ mask, here);
}
template <class T>
T shuffle(T x, int lane, Here here = Here::current()) {
  return emulation::exchanged(emulation::Primitive::Shuffle, x, lane, here);
}
inline bool any_lane(bool condition, Here here = Here::current()) {
  emulation::Exchange own{condition, 0, 0};
  emulation::meet(emulation::Primitive::AnyLane, here, &own, emulation::any);
  return own.result != 0;
}

template <class T>
void ldmatrix_x4(std::uint32_t (&r)[4], Shared<T> row, Here here = Here::current()) {
  static_assert(sizeof(T) == 2);
  emulation::Matrices own{row.address(), r};
  emulation::meet(emulation::Primitive::Ldmatrix, here, &own, emulation::ldmatrix<false>);
}
template <class T>
void ldmatrix_x4_trans(std::uint32_t (&r)[4], Shared<T> row, Here here = Here::current()) {
  static_assert(sizeof(T) == 2);
  emulation::Matrices own{row.address(), r};
  emulation::meet(emulation::Primitive::LdmatrixTrans, here, &own, emulation::ldmatrix<true>);
}

template <class T>
void mma_16816(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
               Here here = Here::current()) {
  emulation::Product own{c, a, b0, b1};
  emulation::meet(emulation::Primitive::Mma16816, here, &own, emulation::mma_16816<T>);
}
inline void mma_1688_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1, Here here = Here::current()) {
  emulation::Product own{c, a, b0, b1};
  emulation::meet(emulation::Primitive::Mma1688, here, &own, emulation::mma_1688_tf32);
}
// To the nearest, ties away from zero.
inline std::uint32_t round_tf32(float x) {
  const std::uint32_t bits = as_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

inline float exp2_fast(float x) {
  const float y = ::exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}
inline float log2_fast(float x) {
  return ::log2f(fabsf(x) < FLT_MIN ? 0.0f : x);
}

inline float to_float(BFloat x) {
  return from_bits(std::uint32_t(x.bits) << 16);
}
inline float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13;
  // Rebased exponents: inf and NaN keep the highest one, and what has the lowest is a multiple of
  // 2^-24, as is the difference of two numbers with the exponent of 2^-14.
  const float normal = from_bits(magnitude + 0x38000000u);
  const float special = from_bits(magnitude | 0x7f800000u);
  const float small = from_bits(magnitude + 0x38800000u) - 6.103515625e-5f;
  const float y = magnitude >= 0x0f800000u ? special : magnitude < 0x00800000u ? small : normal;
  return from_bits(as_bits(y) | sign);
}

template <class T>
Float2 unpack(std::uint32_t bits) {
  return {to_float(T{std::uint16_t(bits)}), to_float(T{std::uint16_t(bits >> 16)})};
}

namespace emulation {

// Rounded to nearest even; NaN becomes 0x7fff.
template <class T>
std::uint16_t round_to(float x);
template <>
inline std::uint16_t round_to<BFloat>(float x) {
  const std::uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
template <>
inline std::uint16_t round_to<Half>(float x) {
  const std::uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const std::uint32_t bits = as_bits(x) & 0x7fffffffu;
  std::uint32_t magnitude = 0x7c00;  // infinity, from 65520 on
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits < 0x38800000u) {  // below 2^-14: 0.5 counts in units of 2^-24
    magnitude = as_bits(from_bits(bits) + 0.5f) - as_bits(0.5f);
  } else if (bits < 0x477ff000u) {
    magnitude = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  }
  return std::uint16_t(sign | magnitude);
}

}  // namespace emulation

template <class T>
std::uint32_t pack(float low, float high) {
  return emulation::round_to<T>(low) | std::uint32_t(emulation::round_to<T>(high)) << 16;
}

inline Limits limits(int) {
  return emulation::current_limits();
}

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), Index3 grid, int threads, int shared_bytes,
            Stream, const Arguments& arguments) {
  emulation::run(name, grid, threads, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace flashmaps::cuda
