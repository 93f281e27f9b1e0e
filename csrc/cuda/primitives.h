// What the CUDA kernels are written with. Nothing else in them is CUDA.
//
// Two headers give the same names: cuda/device.h for nvcc, where most are one PTX instruction, and
// cuda/emulated.h for any C++20 compiler, where a block's threads run on the host and every access
// to shared memory is watched (csrc/cuda/emulation/). Both have
//
//   FLASHMAPS_KERNEL(threads, blocks) void name(FLASHMAPS_PARAMETER Arguments arguments)
//                          a kernel, at most so many threads a block, at least so many blocks an SM
//   FLASHMAPS_DEVICE       a function of kernels, inlined; FLASHMAPS_UNROLL before a loop
//
//   Index3 block_index(), grid_size();  int thread_index(), block_size(), lane_index(),
//   warp_index() sync_threads()         all threads of the block; orders everything sync_warp() the
//   32 lanes of the warp; orders what these read and wrote
//
//   Shared<std::byte> shared_memory()        the block's dynamic shared memory, 16-byte aligned
//   Shared<T>: load(i), store(i, x), + i, as<U>(), from_byte<U>(offset)    i counts T
//   load_global(p), store_global(p, x)       any T of 1, 2, 4, 8 or 16 bytes, aligned to its size
//
//   copy_async_16(to, from, bytes = 16)      16 bytes from global to shared memory, of which those
//   copy_async_4(to, from, bytes = 4)        beyond `bytes` become 0; with 0 nothing is read. Whose
//   commit_copies(), wait_copies<N>()        data is there: once all but the last N groups of this
//                                            thread are, for this thread; after a barrier, for all
//
// and, where all 32 lanes of a warp must take part with the same instruction,
//
//   shuffle_xor(x, mask), shuffle(x, lane)   x of 4 bytes; any_lane(condition)
//   ldmatrix_x4(r, row), ldmatrix_x4_trans   four 8x8 matrices of 16-bit numbers
//   mma_16816<T>(c, a, b0, b1)               c[16x8] += a[16x16] b[16x8], T Half or BFloat
//   mma_1688_tf32(c, a, b0, b1)              c[16x8] += a[16x8] b[8x8] of round_tf32(float)s
//
// and arithmetic:
//
//   exp2_fast(x), log2_fast(x)               one instruction; numbers below the smallest normal
//                                            one count as 0
//   exp2_polynomial(x)                       multiplies and adds only
//   pack<T>(low, high), unpack<T>(bits)      two numbers T in 32 bits; to_float(x) of one T
//   as_bits(x), from_bits(bits)              the bits of a float
//
// Called by the host: launch(...), limits(device).
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8"), with g = lane / 4
// and t = lane % 4, the lower row or column in the low half of the 32 bits:
//
//   a[0] row g, columns 2t, 2t + 1;      a[1] row g + 8, same columns;
//   a[2] row g, columns 2t + 8, 2t + 9;  a[3] row g + 8, same columns
//   b0   rows 2t, 2t + 1 of column g;    b1   rows 2t + 8, 2t + 9 of column g
//   c[0] row g, column 2t;  c[1] row g, column 2t + 1;  c[2], c[3] the same of row g + 8
//
//   tf32: a[0] row g, column t;  a[1] row g + 8, column t;  a[2], a[3] the same of column t + 4;
//         b0 row t of column g;  b1 row t + 4 of column g;  c as above
//
// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8: 16 bytes, 16-byte aligned. r[m]
// is row g, columns 2t and 2t + 1 of matrix m; transposed, rows 2t and 2t + 1 of column g. So for
//
//   a, lying [row][column]:                lane l gives row l % 16 from column 8 (l / 16) on;
//   b of 16 columns, lying [column][row]:  column l % 8 + 8 (l / 16) from row 8 (l / 8 % 2) on;
//                                          r[0], r[1] are b0, b1 of the first 8 columns
//   b of 16 columns, lying [row][column]:  transposed, row l % 16 from column 8 (l / 16) on; same
#pragma once

#include <math.h>

#include "cuda/types.h"

#if defined(__CUDACC__)
#include "cuda/device.h"
#else
#include "cuda/emulated.h"
#endif

namespace flashmaps::cuda {

// 2^t for t <= 127, without the unit that exp2_fast keeps busy; 0 below the smallest normal number
// and at -inf. NaN is not kept.
//
// n = round(t) comes from adding 1.5 * 2^23, which leaves n in the low bits; 2^(t - n) on
// [-1/2, 1/2] from a minimax polynomial (with rounding a relative error of 2.1e-7; exp2_fast
// has 1.7e-7).
FLASHMAPS_DEVICE float exp2_polynomial(float t) {
  const float clamped = fmaxf(t, -126.0f);
  const float shifted = clamped + 12582912.0f;
  const float f = clamped - (shifted - 12582912.0f);
  float p = 1.3276471992906547e-3f;
  p = p * f + 9.675541334449504e-3f;
  p = p * f + 5.5507132734966706e-2f;
  p = p * f + 0.24022119723840116f;
  p = p * f + 0.6931469670647614f;
  p = p * f + 1.0000000716546849f;
  const float power = from_bits(as_bits(p) + (as_bits(shifted) << 23));
  return t < -126.0f ? 0.0f : power;
}

}  // namespace flashmaps::cuda
