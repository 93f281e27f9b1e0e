// Scores by the processor's matrix unit (AMX), for queries and keys of bfloat16 or float16.
//
// A tile of 16 keys, rows as they lie in memory, times 16 queries, packed in pairs, is a tile of
// sums in float32 with the queries in the lanes: what score_tile has after its product. Products of
// bfloat16 are exact in float32. A float16 is the sum of two bfloat16s, and their four products are
// summed from the smallest on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tile.h"
#include "cpu/tokens.h"

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__)
#define FLASHMAPS_MATRIX_UNIT 1
#endif

namespace flashmaps::FLASHMAPS_ISA {
namespace {

constexpr std::int64_t kUnitKeys = 16;    // of a tile
constexpr std::int64_t kUnitBlock = 512;  // bfloat16s of a tile of packed queries: 16 pairs x 16

// How heads are cut for the unit; `parts` is 0 where it is not used.
struct UnitShape {
  int parts = 0;  // bfloat16s that make up a number
  int steps = 0;  // of 32 numbers of a head
  int rest = 0;   // numbers beyond them

  bool used() const { return parts > 0; }
  std::int64_t blocks() const { return steps + (rest > 0 ? 1 : 0); }
  // bfloat16s of the packed queries of a head.
  std::int64_t packed() const { return parts * blocks() * kWidth * kUnitBlock; }
  // bfloat16s of a tile of keys that are copied.
  std::int64_t copied() const { return parts * kUnitKeys * 32 * blocks(); }

  // For these tokens, if the unit takes them: dtype and shape decide, never strides, so that the
  // same numbers give the same bits however they lie.
  static UnitShape of(const Problem& p) {
    const bool bfloats = DType(p.dtype) == DType::BFloat16 && p.dim % 2 == 0;
    if (DType(p.dtype) == DType::Float16) return {2, int((p.dim + 31) / 32), 0};
    if (bfloats) return {1, int(p.dim / 32), int(p.dim % 32)};
    return {};
  }
};

#if FLASHMAPS_MATRIX_UNIT

// The unit's registers, set up for this thread while it is in here.
class UnitState {
 public:
  __attribute__((target("amx-tile"))) explicit UnitState(const UnitShape& shape)
      : used_(shape.used()) {
    if (!used_) return;
    alignas(64) struct {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = 64;
      config.rows[t] = 16;
    }
    if (shape.rest > 0) {  // 6: keys, 7: queries
      config.bytes[6] = std::uint16_t(2 * shape.rest);
      config.rows[7] = std::uint8_t(shape.rest / 2);
    }
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  __attribute__((target("amx-tile"))) ~UnitState() {
    if (used_) asm volatile("tilerelease" : : : "memory");
  }
  UnitState(const UnitState&) = delete;
  UnitState& operator=(const UnitState&) = delete;

 private:
  bool used_;
};

// Rows start .. start + count as pairs: [parts][steps and rest][W][16 pairs][16 queries][2].
inline void pack_pairs(const Tokens<float>& tokens, std::int64_t b, std::int64_t h,
                       std::int64_t start, std::int64_t count, const UnitShape& shape,
                       std::uint16_t* to) {
  std::memset(to, 0, std::size_t(shape.packed()) * 2);
  const std::int64_t part = shape.blocks() * kWidth * kUnitBlock;
  const auto* data = static_cast<const std::uint16_t*>(tokens.data) + tokens.offset(b, h);
  for (std::int64_t r = 0; r < count; ++r) {
    const std::uint16_t* row = data + (start + r) * tokens.strides[2];
    std::uint16_t* lane = to + r / 16 * kUnitBlock + r % 16 * 2;
    for (std::int64_t x = 0; x < tokens.dim; ++x) {
      std::uint16_t* at = lane + x / 32 * kWidth * kUnitBlock + x % 32 / 2 * 32 + x % 2;
      const std::uint16_t number = row[x * tokens.strides[3]];
      if (shape.parts == 1) {
        *at = number;
        continue;
      }
      const float whole = widen<float>(Half{number});
      std::uint32_t bits;
      std::memcpy(&bits, &whole, 4);
      at[0] = std::uint16_t(bits >> 16);
      bits &= 0xffff0000u;
      float high;
      std::memcpy(&high, &bits, 4);
      const float low = whole == high ? 0.0f : whole - high;  // exact; infinities have none
      std::memcpy(&bits, &low, 4);
      at[part] = std::uint16_t(bits >> 16);
    }
  }
}

// Some rows of float16 as two bfloat16s: [2][16][32 steps].
inline void split_halves(const std::uint16_t* rows, std::int64_t stride, std::int64_t count,
                         std::int64_t dim, const UnitShape& shape, std::uint16_t* to) {
  const std::int64_t width = 32 * shape.steps;
  std::uint16_t* low = to + kUnitKeys * width;
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t x = 0; x < width; x += 16) {
      const std::int64_t left = std::clamp<std::int64_t>(dim - x, 0, 16);
      const auto mask = __mmask16((1u << left) - 1);
      const __m256i halves = _mm256_maskz_loadu_epi16(mask, rows + j * stride + x);
      const __m512 whole = _mm512_cvtph_ps(halves);
      const __m512i high = _mm512_and_si512(_mm512_castps_si512(whole), _mm512_set1_epi32(-65536));
      const __mmask16 more = _mm512_cmp_ps_mask(whole, _mm512_castsi512_ps(high), _CMP_NEQ_UQ);
      const __m512 rest = _mm512_maskz_sub_ps(more, whole, _mm512_castsi512_ps(high));
      const auto upper = [](__m512i bits) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
      };
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * width + x), upper(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + j * width + x),
                          upper(_mm512_castps_si512(rest)));
    }
  }
}

#define FLASHMAPS_LOAD(tile, from, stride)            \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile     \
               :                                      \
               : "r"(from), "r"(std::int64_t(stride)) \
               : "memory")
#define FLASHMAPS_MULTIPLY(sum, keys, queries) \
  asm volatile("tdpbf16ps %%tmm" #queries ", %%tmm" #keys ", %%tmm" #sum : : : "memory")
#define FLASHMAPS_STORE(to, stride, tile)             \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" \
               :                                      \
               : "r"(to), "r"(std::int64_t(stride))   \
               : "memory")

// to = [16 keys][R queries] of keys `stride` bytes apart; parts of keys are `part` apart.
[[gnu::noinline]] __attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(
    const std::uint16_t* keys, std::int64_t stride, std::int64_t part, const std::uint16_t* queries,
    const UnitShape& shape, float* to) {
  static_assert(kWidth == 3 && kRows<float> == 48);
  asm volatile("tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2" : : : "memory");
  const std::int64_t of_queries = shape.blocks() * kWidth * kUnitBlock;
  for (int k = shape.parts - 1; k >= 0; --k) {
    for (int n = shape.parts - 1; n >= 0; --n) {
      const std::uint16_t* row = keys + k * part;
      const std::uint16_t* pairs = queries + n * of_queries;
      for (int step = 0; step < shape.steps; ++step, row += 32, pairs += kWidth * kUnitBlock) {
        FLASHMAPS_LOAD(3, row, stride);
        FLASHMAPS_LOAD(4, pairs, 64);
        FLASHMAPS_MULTIPLY(0, 3, 4);
        FLASHMAPS_LOAD(5, pairs + kUnitBlock, 64);
        FLASHMAPS_MULTIPLY(1, 3, 5);
        FLASHMAPS_LOAD(4, pairs + 2 * kUnitBlock, 64);
        FLASHMAPS_MULTIPLY(2, 3, 4);
      }
      if (shape.rest > 0) {
        FLASHMAPS_LOAD(6, row, stride);
        FLASHMAPS_LOAD(7, pairs, 64);
        FLASHMAPS_MULTIPLY(0, 6, 7);
        FLASHMAPS_LOAD(7, pairs + kUnitBlock, 64);
        FLASHMAPS_MULTIPLY(1, 6, 7);
        FLASHMAPS_LOAD(7, pairs + 2 * kUnitBlock, 64);
        FLASHMAPS_MULTIPLY(2, 6, 7);
      }
    }
  }
  FLASHMAPS_STORE(to, 192, 0);
  FLASHMAPS_STORE(to + 16, 192, 1);
  FLASHMAPS_STORE(to + 32, 192, 2);
}

#undef FLASHMAPS_LOAD
#undef FLASHMAPS_MULTIPLY
#undef FLASHMAPS_STORE

// What becomes of J keys of a tile of products. Not inlined, as score_tile.
template <Mode mode, int J>
[[gnu::noinline]] void keep_products(const float* products, float scale, const float* key_bias,
                                     SoftmaxLanes<float>& s, const Target<float>& to,
                                     std::int64_t done) {
  constexpr int R = kRows<float>, L = kLanes<float>;
  Vec<float> acc[J][kWidth];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kWidth; ++v) acc[j][v] = load(products + j * R + v * L) * scale;
  }
  if (key_bias != nullptr) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      for (Vec<float>& a : acc[j]) a += key_bias[j];
    }
  }
  keep_scores<float, mode, J>(acc, s, to, done);
}

// A thread's part of it: queries packed, and tiles that wait to be used.
struct Unit {
  UnitShape shape;
  Buffer<std::uint16_t> queries;  // [H][packed]
  Buffer<std::uint16_t> copied;   // keys that are converted, or the last few
  Buffer<float> products;         // two tiles [16][R]: one is made while the other is used

  Unit() = default;
  Unit(Workspace& w, const UnitShape& of, std::int64_t heads)
      : shape(of),
        queries(w, heads * of.packed()),
        copied(w, of.copied()),
        products(w, 2 * kUnitKeys * kRows<float>) {}

  void load(const Tokens<float>& tokens, std::int64_t b, std::int64_t h, std::int64_t i0,
            std::int64_t valid) {
    pack_pairs(tokens, b, h, i0, valid, shape, queries + h * shape.packed());
  }

  // As score_keys; scale is in log2 units.
  template <Mode mode>
  void score(const Tokens<float>& keys, std::int64_t b, std::int64_t h, std::int64_t j0,
             std::int64_t j1, float scale, const float* key_bias, SoftmaxLanes<float>& s,
             const Target<float>& to) {
    constexpr std::int64_t kTile = kUnitKeys * kRows<float>;
    multiply(keys, b, h, j0, j1, products);
    for (std::int64_t j = j0, n = 0; j < j1; j += kUnitKeys, n ^= 1) {
      const std::int64_t end = std::min(j + kUnitKeys, j1);
      if (end < j1) multiply(keys, b, h, end, j1, products + (n ^ 1) * kTile);
      if constexpr (mode != Mode::Lse) fetch<mode>(to, end - j0);
      const float* from = products + n * kTile;
      std::int64_t i = j;
      const auto keep = [&]<int J>() {
        const float* bias = key_bias == nullptr ? nullptr : key_bias + i;
        keep_products<mode, J>(from, scale, bias, s, to, i - j0);
        from += J * kRows<float>;
        i += J;
      };
      while (i + kTileKeys <= end) keep.template operator()<kTileKeys>();
      while (i + 2 <= end) keep.template operator()<2>();
      while (i < end) keep.template operator()<1>();
      if constexpr (!is_known(mode)) {
        if (end == j1 || (end - j0) % kKeyChunk == 0) s.fold();
      }
    }
  }

 private:
  // The lines of the strips that the next tile will need.
  template <Mode mode>
  static void fetch(const Target<float>& to, std::int64_t done) {
    constexpr bool reads_e = mode == Mode::Second || mode == Mode::Later;
    constexpr bool reads_mean = mode == Mode::Later || mode == Mode::KnownLater;
    for (std::int64_t x = 0; x < kUnitKeys * kRows<float>; x += 16) {
      if constexpr (reads_e) __builtin_prefetch(to.e + done * kRows<float> + x, 1);
      if constexpr (reads_mean) __builtin_prefetch(to.mean + done * kRows<float> + x, 1);
    }
  }

  void multiply(const Tokens<float>& keys, std::int64_t b, std::int64_t h, std::int64_t j,
                std::int64_t j1, float* to) {
    const std::int64_t count = std::min(kUnitKeys, j1 - j), stride = keys.strides[2];
    const auto* rows =
        static_cast<const std::uint16_t*>(keys.data) + keys.offset(b, h) + j * stride;
    const std::uint16_t* of_head = queries + h * shape.packed();
    const std::int64_t apart = keys.strides[3];  // numbers of a key
    if (shape.parts == 1 && count == kUnitKeys && apart == 1) {
      multiply_tiles(rows, 2 * stride, 0, of_head, shape, to);
      return;
    }
    const std::int64_t width = 32 * shape.blocks();
    if (count < kUnitKeys) std::memset(copied, 0, std::size_t(shape.copied()) * 2);
    // Float16s are split where they lie, or where their low parts will.
    std::uint16_t* gathered = copied + (shape.parts - 1) * kUnitKeys * width;
    if (shape.parts == 1 || apart != 1) {
      for (std::int64_t row = 0; row < count; ++row) {
        for (std::int64_t x = 0; x < keys.dim; ++x) {
          gathered[row * width + x] = rows[row * stride + x * apart];
        }
      }
    }
    if (shape.parts == 2) {
      const bool here = apart == 1;
      split_halves(here ? rows : gathered, here ? stride : width, count, keys.dim, shape, copied);
    }
    multiply_tiles(copied, 2 * width, kUnitKeys * width, of_head, shape, to);
  }
};

#else

struct UnitState {
  explicit UnitState(const UnitShape&) {}
};

#endif

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
