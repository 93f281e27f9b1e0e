// The one matrix product of the CPU kernels, and the scores of a strip of queries made with it.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/map.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/tokens.h"
#include "shared/arithmetic.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// acc[j][lanes] += sum_k a[k][lanes] * b[j * bj + k * bk], for J columns j. `a` is aligned, W
// vectors from each multiple of lda. Q K^T, A @ x and A^T y are all this: what differs is who sits
// in the lanes and who is broadcast. `tick` is called once for each k, to prefetch: one line at a
// time, since a burst of them would fill the buffers that the product itself loads through.
template <class T, int W, int J, bool ContiguousK, class Tick>
[[gnu::always_inline]] inline void multiply(const T* a, std::int64_t lda, const T* b,
                                            std::int64_t bj, std::int64_t bk, std::int64_t K,
                                            Vec<T> (&acc)[J][W], Tick tick) {
  // Three columns share a pointer: x86 addresses b, b + bj and b + 2 bj from one register and an
  // index, and a pointer for each column would not fit the registers.
  constexpr int G = (J + 2) / 3;
  const T* pointer[G];
  for (int g = 0; g < G; ++g) pointer[g] = b + 3 * g * bj;
  for (std::int64_t k = 0; k < K; ++k) {
    Vec<T> lanes[W];
    for (int v = 0; v < W; ++v) lanes[v] = load(a + v * kLanes<T>);
    a += lda;
    tick();
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const T x = pointer[j / 3][(j % 3) * bj];
#pragma GCC unroll 3
      for (int v = 0; v < W; ++v) acc[j][v] += lanes[v] * x;
    }
    for (int g = 0; g < G; ++g) pointer[g] += ContiguousK ? 1 : bk;
  }
}

// to[j][lanes] += the same product, [J][W vectors]. Not inlined, as score_tile.
template <class T, int W, int J, bool ContiguousK>
[[gnu::noinline]] void multiply_into(const T* a, std::int64_t lda, const T* b, std::int64_t bj,
                                     std::int64_t bk, std::int64_t K, T* to) {
  Vec<T> acc[J][W] = {};
  multiply<T, W, J, ContiguousK>(a, lda, b, bj, bk, K, acc, [] {});
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j, to += W * kLanes<T>) {
#pragma GCC unroll 3
    for (int v = 0; v < W; ++v) {
      T* here = to + v * kLanes<T>;
      store<T>(here, load(here) + acc[j][v]);
    }
  }
}

// One value for each of the R queries of a strip.
template <class T>
using Lanes = Vec<T>[kWidth];

// Running state of the softmax over keys of R queries, scores in log2 units.
template <class T>
struct SoftmaxLanes {
  Lanes<T> max;         // an earlier maximum: no score seen exceeds it by more than kSlack
  Lanes<T> shift;       // what is subtracted: max, or 0 while every key was hidden
  Lanes<T> sum, total;  // two levels, so that rounding does not grow with the keys

  // A maximum that lags behind saves rescaling: 2^40 times the row's length is far from overflow,
  // and terms 2^-86 of the largest are still exact.
  static constexpr T kSlack = T(40);

  void begin() {
    for (int v = 0; v < kWidth; ++v) {
      max[v] = splat(-std::numeric_limits<T>::infinity());
      shift[v] = sum[v] = total[v] = Vec<T>{};
    }
  }
  void fold() {
    for (int v = 0; v < kWidth; ++v) {
      total[v] += sum[v];
      sum[v] = Vec<T>{};
    }
  }
  // Adopt `seen` as the maximum; what was stored so far (`count` keys at e) is rescaled.
  [[gnu::noinline, gnu::cold]] void raise(const Lanes<T>& seen, T* e, std::int64_t count) {
    Lanes<T> factor;
    const Vec<T> lowest = splat(-std::numeric_limits<T>::infinity());
    for (int v = 0; v < kWidth; ++v) {
      const Vec<T> to = vmax<T>(max[v], seen[v]);
      const Vec<T> difference = max[v] > lowest ? max[v] - to : lowest;  // nothing seen yet: 2^-inf
      factor[v] =
          exp2(difference * T(0.5));  // applied twice: its square may underflow where e does not
      max[v] = to;
      shift[v] = shift_of(to, lowest);
      sum[v] = sum[v] * factor[v] * factor[v];
      total[v] = total[v] * factor[v] * factor[v];
    }
    if (e == nullptr) return;
    for (std::int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < kWidth; ++v, e += kLanes<T>) {
        store<T>(e, load(e) * factor[v] * factor[v]);
      }
    }
  }
};

// What becomes of a tile of scores. With a running softmax a head's coefficient (its weight over
// its sum) is known only when all keys are done, so head h is added to the mean map while head h +
// 1 is being computed and takes its place: the traffic hides behind the product.
enum class Mode {
  Lse,         // nothing is kept but max and sum
  First,       // e = 2^(score - max)
  Second,      // mean = coefficient * e, then e as above
  Later,       // mean += coefficient * e, then e as above
  KnownFirst,  // mean = coefficient * 2^(score - shift): shift is the log-sum-exp
  KnownLater,  // mean += the same
};

constexpr bool is_known(Mode mode) {
  return mode == Mode::KnownFirst || mode == Mode::KnownLater;
}

// Where a tile goes: [keys][R] each, from the first key scored.
template <class T>
struct Target {
  T* e = nullptr;
  T* mean = nullptr;
  Lanes<T> coefficient = {};
};

// Rows start .. start + count as lanes, times `scale`: [d][R], lanes beyond count zero.
template <class T>
void pack_lanes(const Tokens<T>& tokens, std::int64_t b, std::int64_t h, std::int64_t start,
                std::int64_t count, T scale, T* to) {
  constexpr int R = kRows<T>;
  for (int r = 0; r < R; ++r) {
    if (r < count) {
      tokens.row(b, h, start + r, [&](std::int64_t x, T value) { to[x * R + r] = value * scale; });
    } else {
      for (std::int64_t x = 0; x < tokens.dim; ++x) to[x * R + r] = T(0);
    }
  }
}

// What becomes of the scores of J keys, in log2 units, the first of them key `done` of those
// scored.
template <class T, Mode mode, int J>
[[gnu::always_inline]] inline void keep_scores(const Vec<T> (&acc)[J][kWidth], SoftmaxLanes<T>& s,
                                               const Target<T>& to, std::int64_t done) {
  constexpr int L = kLanes<T>, R = kRows<T>;
  if constexpr (!is_known(mode)) {
    Lanes<T> seen;
    bool above = false;
#pragma GCC unroll 3
    for (int v = 0; v < kWidth; ++v) {
      seen[v] = acc[0][v];
#pragma GCC unroll 8
      for (int j = 1; j < J; ++j) seen[v] = vmax<T>(acc[j][v], seen[v]);
      above |= any_greater<T>(seen[v], s.max[v] + SoftmaxLanes<T>::kSlack);
    }
    if (__builtin_expect(above, 0)) s.raise(seen, to.e, done);
  }
#pragma GCC unroll 3
  for (int v = 0; v < kWidth; ++v) {
    // Locals: through references the compiler would have to write the sum before each store.
    const Vec<T> shift = s.shift[v], c = to.coefficient[v];
    Vec<T> sum = s.sum[v];
    const std::int64_t lane = done * R + v * L;
    T* const e = to.e + lane;
    T* const mean = to.mean + lane;
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec<T> value = exp2(acc[j][v] - shift);
      if constexpr (!is_known(mode)) sum += value;
      if constexpr (mode == Mode::Second) store<T>(mean + j * R, load(e + j * R) * c);
      if constexpr (mode == Mode::Later) {
        store<T>(mean + j * R, load(mean + j * R) + load(e + j * R) * c);
      }
      if constexpr (!is_known(mode) && mode != Mode::Lse) store<T>(e + j * R, value);
      if constexpr (mode == Mode::KnownFirst) store<T>(mean + j * R, value * c);
      if constexpr (mode == Mode::KnownLater) {
        store<T>(mean + j * R, load(mean + j * R) + value * c);
      }
    }
    s.sum[v] = sum;
  }
}

// acc += the scores of J keys. Meanwhile it asks for the lines of the strips that the tile will
// need when the product is done, then for the next tile's keys: they are in the second- or
// third-level cache.
template <class T, Mode mode, int J>
[[gnu::always_inline]] inline void multiply_scores(const T* lanes_q, const T* keys, std::int64_t ld,
                                                   std::int64_t dim, const Target<T>& to,
                                                   std::int64_t done, Vec<T> (&acc)[J][kWidth]) {
  constexpr std::int64_t kLine = 64 / std::int64_t(sizeof(T));
  constexpr std::int64_t kStripLines = J * kRows<T> / kLine;
  constexpr bool reads_e = mode == Mode::Second || mode == Mode::Later;
  constexpr bool reads_mean = mode == Mode::Later || mode == Mode::KnownLater;
  const std::int64_t first = reads_e || reads_mean ? std::min(kStripLines, dim) : 0;
  const T* e = to.e + done * kRows<T>;
  const T* mean = to.mean + done * kRows<T>;
  const auto strips = [&] {
    if constexpr (reads_e) __builtin_prefetch(e, 1);
    if constexpr (reads_mean) __builtin_prefetch(mean, 1);
    e += kLine;
    mean += kLine;
  };
  const T* row = keys + J * ld;
  std::int64_t x = 0;
  const auto next_keys = [&] {
    __builtin_prefetch(row + x, 0);
    x += kLine;
    if (x >= dim) {
      x = 0;
      row += ld;
    }
  };
  multiply<T, kWidth, J, true>(lanes_q, kRows<T>, keys, ld, 1, first, acc, strips);
  multiply<T, kWidth, J, true>(lanes_q + first * kRows<T>, kRows<T>, keys + first, ld, 1,
                               dim - first, acc, next_keys);
}

// The same into memory: to = [J][R].
template <class T, Mode mode, int J>
[[gnu::noinline]] void multiply_scores_to(const T* lanes_q, const T* keys, std::int64_t ld,
                                          std::int64_t dim, const Target<T>& target,
                                          std::int64_t done, T* to) {
  Vec<T> acc[J][kWidth] = {};
  multiply_scores<T, mode, J>(lanes_q, keys, ld, dim, target, done, acc);
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < kWidth; ++v, to += kLanes<T>) store<T>(to, acc[j][v]);
  }
}

// Not inlined: in a larger function GCC runs out of registers and spills the accumulators inside
// the product's loop, at twice the time.
template <class T, Mode mode, int J>
[[gnu::noinline]] void score_tile(const T* lanes_q, const T* keys, std::int64_t ld,
                                  std::int64_t dim, const T* key_bias, SoftmaxLanes<T>& s,
                                  const Target<T>& to, std::int64_t done) {
  Vec<T> acc[J][kWidth];
  if constexpr (kManyRegisters) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      for (Vec<T>& a : acc[j]) a = Vec<T>{};
    }
    multiply_scores<T, mode, J>(lanes_q, keys, ld, dim, to, done, acc);
  } else {
    multiply_scores_to<T, mode, J>(lanes_q, keys, ld, dim, to, done, reinterpret_cast<T*>(acc));
  }
  // After the product, whose d roundings would otherwise each be as large as one of the bias.
  if (key_bias != nullptr) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      for (Vec<T>& a : acc[j]) a += key_bias[j];
    }
  }
  keep_scores<T, mode, J>(acc, s, to, done);
}

// Scores of R queries against keys j0 .. j1 of head h, as `mode` says. `key_bias`, in log2 units
// and indexed by j, may be null. `convert` holds kKeyChunk * d elements.
template <class T, Mode mode>
void score_keys(const T* lanes_q, const Tokens<T>& keys, std::int64_t b, std::int64_t h,
                std::int64_t j0, std::int64_t j1, const T* key_bias, SoftmaxLanes<T>& s,
                const Target<T>& to, T* convert) {
  const std::int64_t dim = keys.dim;
  const bool in_place = keys.in_place();
  for (std::int64_t c0 = j0; c0 < j1; c0 += kKeyChunk) {
    const std::int64_t c1 = std::min(c0 + kKeyChunk, j1);
    const T* p = convert;
    std::int64_t ld = dim;
    if (in_place) {
      ld = keys.strides[2];
      p = static_cast<const T*>(keys.data) + keys.offset(b, h) + c0 * ld;
    } else {
      for (std::int64_t j = c0; j < c1; ++j) {
        T* row = convert + (j - c0) * dim;
        keys.row(b, h, j, [row](std::int64_t x, T value) { row[x] = value; });
      }
    }
    std::int64_t j = c0;
    const auto tile = [&]<int J>() {
      const T* bias = key_bias == nullptr ? nullptr : key_bias + j;
      score_tile<T, mode, J>(lanes_q, p, ld, dim, bias, s, to, j - j0);
      p += J * ld;
      j += J;
    };
    while (j + kTileKeys <= c1) tile.template operator()<kTileKeys>();
    while (j + 2 <= c1) tile.template operator()<2>();
    while (j < c1) tile.template operator()<1>();
    if constexpr (!is_known(mode)) s.fold();
  }
}

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
