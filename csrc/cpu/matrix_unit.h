// Scores by the processor's matrix unit (AMX), for queries and keys of bfloat16 or float16.
//
// A tile of 16 keys, rows as they lie in memory, times 16 queries, packed in pairs, is a tile of
// sums in float32 with the queries in the lanes: what score_tile has after its product. Products of
// bfloat16 are exact in float32. A float16 is the sum of two bfloat16s, and its product four.
//
// Not for float32, which would be three bfloat16s and six products: packed queries and split keys
// then fill the first-level cache, and the vectors were faster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

  bool operator==(const UnitShape&) const = default;
  bool used() const { return parts > 0; }
  std::int64_t blocks() const { return steps + (rest > 0 ? 1 : 0); }
  std::int64_t width() const { return 32 * blocks(); }
  // bfloat16s of the packed queries of a head.
  std::int64_t packed() const { return parts * blocks() * kWidth * kUnitBlock; }
  // bfloat16s of a tile of keys that is prepared.
  std::int64_t prepared() const { return parts * kUnitKeys * width(); }

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
    if (shape.rest > 0) {  // of numbers in one part. 6: keys, 7: queries
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

// Some rows of float16 as two bfloat16s: [2][16][32 steps].
inline void split_halves(const std::uint16_t* rows, std::int64_t stride, std::int64_t count,
                         std::int64_t dim, std::int64_t width, std::uint16_t* to) {
  std::uint16_t* low = to + kUnitKeys * width;
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t x = 0; x < width; x += 16) {
      const std::int64_t left = std::clamp<std::int64_t>(dim - x, 0, 16);
      const auto mask = __mmask16((1u << left) - 1);
      // Keys come from afar, strip after strip: asked for two tiles ahead.
      if (x % 32 == 0) __builtin_prefetch(rows + (j + 2 * kUnitKeys) * stride + x);
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

// Sixteen tokens as the unit reads them: rows `stride` bfloat16s apart, their parts `part` apart.
struct UnitRows {
  const std::uint16_t* rows = nullptr;
  std::int64_t stride = 0, part = 0;
};

// Tokens j .. j + count of head h, where they lie or in `to`, of which rows r0 .. r1 are made; the
// rows beyond count are zeros. `gathered` is for tokens whose numbers lie apart.
inline UnitRows prepare_rows(const Tokens<float>& tokens, std::int64_t b, std::int64_t h,
                             std::int64_t j, std::int64_t count, std::int64_t r0, std::int64_t r1,
                             const UnitShape& shape, std::uint16_t* to, std::uint16_t* gathered) {
  const std::int64_t width = shape.width(), stride = tokens.strides[2], apart = tokens.strides[3];
  const std::int64_t from = tokens.offset(b, h) + j * stride;
  if (shape.parts == 1 && count == kUnitKeys && apart == 1) {
    return {static_cast<const std::uint16_t*>(tokens.data) + from, stride, 0};
  }
  const UnitRows made{to, width, kUnitKeys * width};
  if (count < kUnitKeys && r0 == 0) std::memset(to, 0, std::size_t(shape.prepared()) * 2);
  const std::int64_t some = std::min(r1, count) - r0;
  if (some <= 0) return made;
  to += r0 * width;
  const std::uint16_t* rows = static_cast<const std::uint16_t*>(tokens.data) + from + r0 * stride;
  const bool split = shape.parts == 2;
  if (!split || apart != 1) {
    std::uint16_t* row = split ? gathered : to;
    for (std::int64_t r = 0; r < some; ++r, row += width) {
      for (std::int64_t x = 0; x < tokens.dim; ++x) row[x] = rows[r * stride + x * apart];
    }
  }
  if (split && apart == 1) split_halves(rows, stride, some, tokens.dim, width, to);
  if (split && apart != 1) split_halves(gathered, width, some, tokens.dim, width, to);
  return made;
}

// Prepared rows as pairs of numbers, queries beside each other: query r of block w of a head's
// [parts][steps and rest][W][16 pairs][16 queries][2].
inline void pack_pairs(const UnitRows& from, std::int64_t count, std::int64_t w,
                       const UnitShape& shape, std::uint16_t* to) {
  for (int k = 0; k < shape.parts; ++k) {
    for (std::int64_t block = 0; block < shape.blocks(); ++block) {
      const std::uint16_t* rows = from.rows + k * from.part + 32 * block;
      std::uint16_t* pairs = to + ((k * shape.blocks() + block) * kWidth + w) * kUnitBlock;
      const int filled = block < shape.steps ? 16 : shape.rest / 2;
      for (int x = 0; x < filled; ++x, pairs += 32, rows += 2) {
        for (std::int64_t r = 0; r < count; ++r) {
          std::memcpy(pairs + 2 * r, rows + r * from.stride, 4);
        }
      }
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

// Slices `first` .. `last` of the products of a tile of keys, to = [16 keys][R queries] when the
// last is done. A slice is 32 numbers of a head and one part of the queries; it keeps the unit busy
// for a hundred cycles or so, while the vectors do other things.
[[gnu::noinline]] __attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(
    const UnitRows& keys, const std::uint16_t* queries, const UnitShape& shape, int first, int last,
    float* to) {
  static_assert(kWidth == 3 && kRows<float> == 48);
  if (first == 0) asm volatile("tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2" : : : "memory");
  const std::int64_t of_queries = shape.blocks() * kWidth * kUnitBlock, stride = 2 * keys.stride;
  const int slices = int(shape.blocks()) * shape.parts;
  for (int slice = first; slice < last; ++slice) {
    const int step = slice / shape.parts, n = slice % shape.parts;
    const std::uint16_t* pairs = queries + n * of_queries + step * kWidth * kUnitBlock;
    const std::uint16_t* row = keys.rows + 32 * step;
    if (shape.parts == 1 && step < shape.steps) {
      FLASHMAPS_LOAD(3, row, stride);
      FLASHMAPS_LOAD(4, pairs, 64);
      FLASHMAPS_MULTIPLY(0, 3, 4);
      FLASHMAPS_LOAD(5, pairs + kUnitBlock, 64);
      FLASHMAPS_MULTIPLY(1, 3, 5);
      FLASHMAPS_LOAD(4, pairs + 2 * kUnitBlock, 64);
      FLASHMAPS_MULTIPLY(2, 3, 4);
    } else if (step < shape.steps) {
      FLASHMAPS_LOAD(4, pairs, 64);
      FLASHMAPS_LOAD(5, pairs + kUnitBlock, 64);
      FLASHMAPS_LOAD(7, pairs + 2 * kUnitBlock, 64);
      for (int k = 0; k < shape.parts; ++k, row += keys.part) {
        FLASHMAPS_LOAD(3, row, stride);
        FLASHMAPS_MULTIPLY(0, 3, 4);
        FLASHMAPS_MULTIPLY(1, 3, 5);
        FLASHMAPS_MULTIPLY(2, 3, 7);
      }
    } else {
      FLASHMAPS_LOAD(6, row, stride);
      FLASHMAPS_LOAD(7, pairs, 64);
      FLASHMAPS_MULTIPLY(0, 6, 7);
      FLASHMAPS_LOAD(7, pairs + kUnitBlock, 64);
      FLASHMAPS_MULTIPLY(1, 6, 7);
      FLASHMAPS_LOAD(7, pairs + 2 * kUnitBlock, 64);
      FLASHMAPS_MULTIPLY(2, 6, 7);
    }
  }
  if (last < slices) return;
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
  Buffer<std::uint16_t> queries;   // [H][packed]
  Buffer<std::uint16_t> prepared;  // two tiles of keys: one is made while the other is multiplied
  Buffer<std::uint16_t> gathered;  // a tile of numbers that lie apart
  Buffer<float> products;          // two tiles [16][R]: one is made while the other is used

  Unit() = default;
  Unit(Workspace& w, const UnitShape& of, std::int64_t heads)
      : shape(of),
        queries(w, heads * of.packed()),
        prepared(w, 2 * of.prepared()),
        gathered(w, of.parts == 2 ? kUnitKeys * of.width() : 0),
        products(w, 2 * kUnitKeys * kRows<float>) {}

  // Rows i0 .. i0 + valid are the queries of head h.
  void load(const Tokens<float>& tokens, std::int64_t b, std::int64_t h, std::int64_t i0,
            std::int64_t valid) {
    std::uint16_t* to = queries + h * shape.packed();
    std::memset(to, 0, std::size_t(shape.packed()) * 2);
    for (std::int64_t w = 0; w < kWidth && kUnitKeys * w < valid; ++w) {
      const std::int64_t count = std::min(kUnitKeys, valid - kUnitKeys * w);
      pack_pairs(prepare_rows(tokens, b, h, i0 + kUnitKeys * w, count, 0, kUnitKeys, shape,
                              prepared, gathered),
                 count, w, shape, to);
    }
  }

  // As score_keys; scale is in log2 units. While the vectors exponentiate a tile, the unit makes
  // the products of the next one, and the one after it is prepared: half a tile of each by turns,
  // so that all three are within what the processor looks ahead.
  template <Mode mode>
  void score(const Tokens<float>& keys, std::int64_t b, std::int64_t h, std::int64_t j0,
             std::int64_t j1, float scale, const float* key_bias, SoftmaxLanes<float>& s,
             const Target<float>& to) {
    constexpr std::int64_t kTile = kUnitKeys * kRows<float>, kHalf = kUnitKeys / 2;
    const std::uint16_t* of_head = queries + h * shape.packed();
    const int slices = int(shape.blocks()) * shape.parts;
    int buffer = 0;
    const auto prepare = [&](std::int64_t j, std::int64_t r0, std::int64_t r1) {
      return prepare_rows(keys, b, h, j, std::min(kUnitKeys, j1 - j), r0, r1, shape,
                          prepared + buffer * shape.prepared(), gathered);
    };
    UnitRows next = prepare(j0, 0, kUnitKeys), after;
    multiply_tiles(next, of_head, shape, 0, slices, products);
    if (j0 + kUnitKeys < j1) {
      buffer = 1;
      next = prepare(j0 + kUnitKeys, 0, kUnitKeys);
    }
    for (std::int64_t j = j0, n = 0; j < j1; j += kUnitKeys, n ^= 1) {
      const std::int64_t end = std::min(j + kUnitKeys, j1);
      buffer ^= 1;
      for (int half = 0; half < 2; ++half) {
        if (end < j1) {
          multiply_tiles(next, of_head, shape, half == 0 ? 0 : slices / 2,
                         half == 0 ? slices / 2 : slices, products + (n ^ 1) * kTile);
        }
        if (end + kUnitKeys < j1) {
          after = prepare(end + kUnitKeys, half * kHalf, (half + 1) * kHalf);
        }
        if constexpr (mode != Mode::Lse) fetch<mode>(to, end - j0 + half * kHalf);
        std::int64_t i = j + half * kHalf;
        const std::int64_t until = std::min(i + kHalf, end);
        const float* from = products + n * kTile + half * kHalf * kRows<float>;
        const auto keep = [&]<int J>() {
          const float* bias = key_bias == nullptr ? nullptr : key_bias + i;
          keep_products<mode, J>(from, scale, bias, s, to, i - j0);
          from += J * kRows<float>;
          i += J;
        };
        while (i + kTileKeys <= until) keep.template operator()<kTileKeys>();
        while (i + 2 <= until) keep.template operator()<2>();
        while (i < until) keep.template operator()<1>();
      }
      next = after;
      if constexpr (!is_known(mode)) {
        if (end == j1 || (end - j0) % kKeyChunk == 0) s.fold();
      }
    }
  }

 private:
  // Lines of the strips that the next tile will need.
  template <Mode mode>
  static void fetch(const Target<float>& to, std::int64_t key) {
    constexpr bool reads_e = mode == Mode::Second || mode == Mode::Later;
    constexpr bool reads_mean = mode == Mode::Later || mode == Mode::KnownLater;
    for (std::int64_t x = 0; x < kUnitKeys / 2 * kRows<float>; x += 16) {
      if constexpr (reads_e) __builtin_prefetch(to.e + key * kRows<float> + x, 1);
      if constexpr (reads_mean) __builtin_prefetch(to.mean + key * kRows<float> + x, 1);
    }
  }
};

#else

struct UnitState {
  explicit UnitState(const UnitShape&) {}
};

#endif

// The matrix unit, where this build knows it and the numbers are its own.
struct NoUnit {};
#if FLASHMAPS_MATRIX_UNIT
template <class T>
using UnitOf = std::conditional_t<std::is_same_v<T, float>, Unit, NoUnit>;
#else
template <class T>
using UnitOf = NoUnit;
#endif

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
