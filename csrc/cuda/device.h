// The primitives of cuda/primitives.h on a GPU: CUDA, and PTX where CUDA has no function. sm_80 on.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/types.h"

#define FLASHMAPS_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define FLASHMAPS_PARAMETER const __grid_constant__
#define FLASHMAPS_DEVICE __device__ __forceinline__
#define FLASHMAPS_UNROLL _Pragma("unroll")

namespace flashmaps::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

FLASHMAPS_DEVICE Index3 block_index() {
  return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
}
FLASHMAPS_DEVICE Index3 grid_size() {
  return {int(gridDim.x), int(gridDim.y), int(gridDim.z)};
}
FLASHMAPS_DEVICE int thread_index() {
  return int(threadIdx.x);
}
FLASHMAPS_DEVICE int block_size() {
  return int(blockDim.x);
}
FLASHMAPS_DEVICE int lane_index() {
  return int(threadIdx.x) % kWarp;
}
FLASHMAPS_DEVICE int warp_index() {
  return int(threadIdx.x) / kWarp;
}

FLASHMAPS_DEVICE void sync_threads() {
  __syncthreads();
}
FLASHMAPS_DEVICE void sync_warp() {
  __syncwarp();
}

FLASHMAPS_DEVICE std::uint32_t as_bits(float x) {
  return __float_as_uint(x);
}
FLASHMAPS_DEVICE float from_bits(std::uint32_t bits) {
  return __uint_as_float(bits);
}

// One instruction also for structs of 16 bytes.
template <class T>
FLASHMAPS_DEVICE T read(const T* from) {
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    T x;
    memcpy(&x, &bits, sizeof(T));
    return x;
  } else {
    return *from;
  }
}
template <class T>
FLASHMAPS_DEVICE void write(T* to, const T& x) {
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    memcpy(&bits, &x, sizeof(T));
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = x;
  }
}

template <class T>
FLASHMAPS_DEVICE T load_global(const T* from) {
  return read(from);
}
template <class T>
FLASHMAPS_DEVICE void store_global(T* to, const T& x) {
  write(to, x);
}

template <class T>
class Shared {
 public:
  FLASHMAPS_DEVICE explicit Shared(T* data) : data_(data) {}

  FLASHMAPS_DEVICE T load(int i) const { return read(data_ + i); }
  FLASHMAPS_DEVICE void store(int i, const T& x) const { write(data_ + i, x); }
  FLASHMAPS_DEVICE Shared operator+(int i) const { return Shared(data_ + i); }
  template <class U>
  FLASHMAPS_DEVICE Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(data_));
  }
  template <class U>
  FLASHMAPS_DEVICE Shared<U> from_byte(int offset) const {
    return Shared<U>(reinterpret_cast<U*>(reinterpret_cast<char*>(data_) + offset));
  }

  // In the shared memory's own address space, as PTX wants it.
  FLASHMAPS_DEVICE unsigned address() const { return unsigned(__cvta_generic_to_shared(data_)); }

 private:
  T* data_;
};

FLASHMAPS_DEVICE Shared<std::byte> shared_memory() {
  extern __shared__ __align__(128) std::byte flashmaps_shared_memory[];
  return Shared<std::byte>(flashmaps_shared_memory);
}

template <class T>
FLASHMAPS_DEVICE void copy_async_16(Shared<T> to, const T* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(to.address()), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
template <class T>
FLASHMAPS_DEVICE void copy_async_4(Shared<T> to, const T* from, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(to.address()), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
FLASHMAPS_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
FLASHMAPS_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <class T>
FLASHMAPS_DEVICE T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(kAllLanes, x, mask);
}
template <class T>
FLASHMAPS_DEVICE T shuffle(T x, int lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(kAllLanes, x, lane);
}
FLASHMAPS_DEVICE bool any_lane(bool condition) {
  return __any_sync(kAllLanes, condition) != 0;
}

template <class T>
FLASHMAPS_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address())
               : "memory");
}
template <class T>
FLASHMAPS_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address())
               : "memory");
}

template <class T>
FLASHMAPS_DEVICE void mma_16816(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1);
template <>
FLASHMAPS_DEVICE void mma_16816<Half>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                      std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FLASHMAPS_DEVICE void mma_16816<BFloat>(float (&c)[4], const std::uint32_t (&a)[4],
                                        std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FLASHMAPS_DEVICE std::uint32_t round_tf32(float x) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
FLASHMAPS_DEVICE void mma_1688_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FLASHMAPS_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHMAPS_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FLASHMAPS_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FLASHMAPS_DEVICE float to_float(BFloat x) {
  return from_bits(std::uint32_t(x.bits) << 16);
}

template <class T>
FLASHMAPS_DEVICE Float2 unpack(std::uint32_t bits) {
  return {to_float(T{std::uint16_t(bits)}), to_float(T{std::uint16_t(bits >> 16)})};
}
// Rounded to nearest even.
template <class T>
FLASHMAPS_DEVICE std::uint32_t pack(float low, float high);
template <>
FLASHMAPS_DEVICE std::uint32_t pack<Half>(float low, float high) {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
template <>
FLASHMAPS_DEVICE std::uint32_t pack<BFloat>(float low, float high) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Throws if a CUDA call failed; `what` says which.
inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it, so that it is not taken for another call's
  throw std::runtime_error("flashmaps' CUDA kernels: " + what + ": " + cudaGetErrorName(status) +
                           ", " + cudaGetErrorString(status));
}

inline int ask(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device),
        "asking device " + std::to_string(device) + " what it has");
  return value;
}
inline Limits limits(int device) {
  return {ask(device, cudaDevAttrMultiProcessorCount),
          ask(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
          10 * ask(device, cudaDevAttrComputeCapabilityMajor) +
              ask(device, cudaDevAttrComputeCapabilityMinor)};
}

// Runs the kernel after what is already on the stream; does not wait for it. `name` is for errors.
template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), Index3 grid, int threads, int shared_bytes,
            Stream stream, const Arguments& arguments) {
  const std::string what = std::string("launching ") + name;
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaSetDevice(stream.device), what);
  if (shared_bytes > 48 * 1024) {
    // More than that must be allowed first. As much as there is, always: another thread may be
    // about to launch the same kernel with another number. What the kernel has of its own counts.
    cudaFuncAttributes has{};
    check(cudaFuncGetAttributes(&has, function), what);
    const int most = ask(stream.device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - int(has.sharedSizeBytes)),
          what);
  }
  Arguments copy = arguments;
  void* pointers[] = {&copy};
  check(cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(threads), pointers,
                         std::size_t(shared_bytes), reinterpret_cast<cudaStream_t>(stream.handle)),
        what);
}

}  // namespace flashmaps::cuda
