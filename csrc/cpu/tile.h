// The one matrix product of the CPU kernels, and the scores of a strip of queries made with it.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/map.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// acc[j][lanes] += sum_k a[k][lanes] * b[j * bj + k * bk], for J columns j. `a` is aligned [K][R].
// Q K^T, A @ x and A^T y are all this: what differs is who sits in the lanes and who is broadcast.
template <class T, int J, bool ContiguousK>
inline void multiply(const T* a, const T* b, std::int64_t bj, std::int64_t bk, std::int64_t K,
                     Vec<T> (&acc)[J][2]) {
  constexpr int L = kLanes<T>;
  // Three columns share a pointer: x86 addresses b, b + bj and b + 2 bj from one register and an
  // index, and twelve pointers would not fit the registers.
  constexpr int G = (J + 2) / 3;
  const T* pointer[G];
  for (int g = 0; g < G; ++g) pointer[g] = b + 3 * g * bj;
  for (std::int64_t k = 0; k < K; ++k) {
    const Vec<T> a0 = load(a), a1 = load(a + L);
    a += 2 * L;
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
      const T x = pointer[j / 3][(j % 3) * bj];
      acc[j][0] += a0 * x;
      acc[j][1] += a1 * x;
    }
    for (int g = 0; g < G; ++g) pointer[g] += ContiguousK ? 1 : bk;
  }
}

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// Keys are converted, where they must be, this many at a time. A multiple of every kTileKeys.
constexpr std::int64_t kKeyChunk = 96;

// Running state of the softmax over keys of R queries, scores in log2 units.
template <class T>
struct SoftmaxLanes {
  Vec<T> max[2];    // an earlier maximum: no score seen exceeds it by more than kSlack
  Vec<T> shift[2];  // what is subtracted: max, or 0 while every key was hidden
  Vec<T> sum[2], total[2];  // two levels, so that rounding does not grow with the keys

  // A maximum that lags behind saves rescaling: 2^40 times the row's length is far from overflow,
  // and terms 2^-86 of the largest are still exact.
  static constexpr T kSlack = T(40);

  void begin() {
    for (int v = 0; v < 2; ++v) {
      max[v] = splat(-std::numeric_limits<T>::infinity());
      shift[v] = sum[v] = total[v] = Vec<T>{};
    }
  }
  void fold() {
    for (int v = 0; v < 2; ++v) {
      total[v] += sum[v];
      sum[v] = Vec<T>{};
    }
  }
  // Adopt `seen` as the maximum; what was stored so far (`count` keys at e) is rescaled.
  void raise(const Vec<T> (&seen)[2], T* e, std::int64_t count) {
    Vec<T> factor[2];
    const Vec<T> lowest = splat(-std::numeric_limits<T>::infinity());
    for (int v = 0; v < 2; ++v) {
      const Vec<T> to = vmax<T>(max[v], seen[v]);
      const Vec<T> difference = max[v] > lowest ? max[v] - to : lowest;  // nothing seen yet: 2^-inf
      factor[v] = exp2(difference);
      max[v] = to;
      shift[v] = to > lowest ? to : Vec<T>{};
      sum[v] *= factor[v];
      total[v] *= factor[v];
    }
    if (e == nullptr) return;
    for (std::int64_t j = 0; j < count; ++j, e += kRows<T>) {
      store<T>(e, load(e) * factor[0]);
      store<T>(e + kLanes<T>, load(e + kLanes<T>) * factor[1]);
    }
  }
};

enum class Mode {
  Softmax,  // e = 2^(score - running maximum), stored; sums kept
  Lse,      // the same, only the sums
  Known,    // e = 2^(score - shift), shift given for each lane: probabilities where it is the LSE
};

// Rows of a [B, H, tokens, d] tensor as T, read in place where they are T and contiguous in d.
template <class T>
struct Tokens {
  const void* data;
  std::array<std::int64_t, 4> strides;
  DType dtype;
  std::int64_t dim;

  bool in_place() const {
    const bool same = dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64);
    // Rows a multiple of 2 KB apart would fight for a few sets of the cache.
    return same && strides[3] == 1 && (strides[2] * std::int64_t(sizeof(T))) % 2048 != 0;
  }
  template <class S, class F>
  void each(std::int64_t b, std::int64_t h, std::int64_t row, F use) const {
    const S* p = static_cast<const S*>(data) + b * strides[0] + h * strides[1] + row * strides[2];
    if (strides[3] == 1) {
      for (std::int64_t x = 0; x < dim; ++x) use(x, widen<T>(p[x]));
    } else {
      for (std::int64_t x = 0; x < dim; ++x) use(x, widen<T>(p[x * strides[3]]));
    }
  }
  template <class F>
  void row(std::int64_t b, std::int64_t h, std::int64_t row, F use) const {
    switch (dtype) {
      case DType::Float32: return each<float>(b, h, row, use);
      case DType::Float64: return each<double>(b, h, row, use);
      case DType::Float16: return each<Half>(b, h, row, use);
      case DType::BFloat16: return each<BFloat>(b, h, row, use);
    }
  }
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

template <class T, Mode mode, int J>
inline void score_tile(const T* lanes_q, const T* keys, std::int64_t ld, std::int64_t dim,
                       const T* key_bias, SoftmaxLanes<T>& s, T* e, std::int64_t done) {
  constexpr int L = kLanes<T>, R = kRows<T>;
  Vec<T> acc[J][2];
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j) {
    acc[j][0] = acc[j][1] = key_bias == nullptr ? Vec<T>{} : splat(key_bias[j]);
  }
  multiply<T, J, true>(lanes_q, keys, ld, 1, dim, acc);
  if constexpr (mode != Mode::Known) {
    Vec<T> seen[2] = {acc[0][0], acc[0][1]};
#pragma GCC unroll 12
    for (int j = 1; j < J; ++j) {
      seen[0] = vmax<T>(acc[j][0], seen[0]);
      seen[1] = vmax<T>(acc[j][1], seen[1]);
    }
    const T slack = SoftmaxLanes<T>::kSlack;
    if (__builtin_expect(any_greater<T>(seen[0], s.max[0] + slack) ||
                             any_greater<T>(seen[1], s.max[1] + slack), 0)) {
      s.raise(seen, mode == Mode::Softmax ? e : nullptr, done);
    }
  }
  T* to = mode == Mode::Lse ? nullptr : e + done * R;
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec<T> value = exp2(acc[j][v] - s.shift[v]);
      if constexpr (mode != Mode::Known) s.sum[v] += value;
      if constexpr (mode != Mode::Lse) store<T>(to + j * R + v * L, value);
    }
  }
}

// Scores of R queries against keys j0 .. j1 of head h, as `mode` says; e is [j1 - j0][R].
// `key_bias`, in log2 units and indexed by j, may be null. `convert` holds kKeyChunk * d elements.
template <class T, Mode mode>
void score_keys(const T* lanes_q, const Tokens<T>& keys, std::int64_t b, std::int64_t h,
                std::int64_t j0, std::int64_t j1, const T* key_bias, SoftmaxLanes<T>& s, T* e,
                T* convert) {
  const std::int64_t dim = keys.dim;
  const bool in_place = keys.in_place();
  for (std::int64_t c0 = j0; c0 < j1; c0 += kKeyChunk) {
    const std::int64_t c1 = std::min(c0 + kKeyChunk, j1);
    const T* p = convert;
    std::int64_t ld = dim;
    if (in_place) {
      ld = keys.strides[2];
      p = static_cast<const T*>(keys.data) + b * keys.strides[0] + h * keys.strides[1] + c0 * ld;
    } else {
      for (std::int64_t j = c0; j < c1; ++j) {
        T* row = convert + (j - c0) * dim;
        keys.row(b, h, j, [row](std::int64_t x, T value) { row[x] = value; });
      }
    }
    std::int64_t j = c0;
    const auto tile = [&]<int J>() {
      const T* bias = key_bias == nullptr ? nullptr : key_bias + j;
      score_tile<T, mode, J>(lanes_q, p, ld, dim, bias, s, e, j - j0);
      p += J * ld;
      j += J;
    };
    while (j + kTileKeys <= c1) tile.template operator()<kTileKeys>();
    while (j + 3 <= c1) tile.template operator()<3>();
    while (j < c1) tile.template operator()<1>();
    if constexpr (mode != Mode::Known) s.fold();
  }
}

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
