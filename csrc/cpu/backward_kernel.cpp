// The way back through the mean attention map (docs/gradients.md), a window of strips at a time.
//
//   g      = dL/dA, through the normalisation
//   D_h    = sum_j P_h g
//   dS_h   = P_h (w_h (g - D_h) + dL/dlse_h)
//   dQ_h   = scale dS_h K_h,  dK_h = scale dS_h^T Q_h
//
// Probabilities come from the log-sum-exp. Each thread makes them for one strip of queries and all
// keys, keeps those of every head with g, and turns them into dS in place, from which dQ is
// complete. Then the keys are shared out among the threads, and each takes up the window's strips
// in order: dK has the same bits whatever the threads. One product for the scores, one for each
// gradient.
//
// Where strips are too large to keep, blocks of keys are: the scores are then computed twice, first
// for D alone.
#include <memory>
#include <vector>

#include "cpu/gradient.h"
#include "cpu/slope.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Windows larger than this (all threads' together) give way to blocks of keys.
constexpr std::int64_t kMostBytes = std::int64_t(256) << 20;
// A window has more strips than threads while it stays below this.
constexpr std::int64_t kSmallWindow = std::int64_t(4) << 20;
// Keys of a block where not all are kept.
constexpr std::int64_t kFewKeys = 192;
// Keys are in at most so many segments, each a multiple of kFewKeys.
constexpr std::int64_t kSegments = 8;
// to += the product of kColumnKeys keys by kColumnVectors vectors of features.
constexpr int kColumnVectors = 4;
constexpr int kColumnKeys = kManyRegisters ? 6 : 3;

// What comes next from the third-level cache: one stretch of memory and then another, asked for a
// line every other step of a product. Faster, and the product's own loads would wait.
template <class T>
struct Ahead {
  static constexpr std::int64_t kStep = 64 / std::int64_t(sizeof(T)) / 2;
  const T* next = nullptr;
  const T* end = nullptr;
  const T* then = nullptr;
  const T* last = nullptr;

  void tick() {
    __builtin_prefetch(next, 0);
    next += kStep;
    if (__builtin_expect(next >= end, 0)) {
      next = then;
      end = last;
      then = last;
    }
  }
};

// to[j][lanes] += sum_k a[k][lanes] * b[k * bk + j]: dQ.
template <class T, int W, int J>
[[gnu::noinline]] void multiply_columns(const T* a, std::int64_t lda, const T* b, std::int64_t bk,
                                        std::int64_t K, T* to, Ahead<T>& ahead) {
  Vec<T> acc[J][W] = {};
  Ahead<T> next = ahead;
  multiply<T, W, J, false>(a, lda, b, 1, bk, K, acc, [&] { next.tick(); });
  ahead = next;
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j, to += W * kLanes<T>) {
#pragma GCC unroll 3
    for (int v = 0; v < W; ++v) {
      T* here = to + v * kLanes<T>;
      store<T>(here, load(here) + acc[j][v]);
    }
  }
}

// A strip's dS of some keys of one head, [keys][R], and its queries, [R][width].
template <class T>
struct Share {
  const T* ds;
  const T* rows;
};

// to[j][lanes] += scale sum_k rows[k][lanes] ds[j][k] of `count` strips: dK, whose rows are at any
// address, `stride` apart. Only `columns` of the vectors' lanes are there.
template <class T, int W, int J>
[[gnu::noinline]] void multiply_rows(const Share<T>* shares, int count, std::int64_t from,
                                     std::int64_t x, std::int64_t width, T scale, T* to,
                                     std::int64_t stride, std::int64_t columns, Ahead<T>& ahead) {
  constexpr std::int64_t R = kRows<T>;
  Vec<T> acc[J][W] = {};
  Ahead<T> next = ahead;
  for (int n = 0; n < count; ++n) {
    multiply<T, W, J, true>(shares[n].rows + x, width, shares[n].ds + from * R, R, 1, R, acc,
                            [&] { next.tick(); });
  }
  ahead = next;
  if (columns == W * kLanes<T>) {
    for (int j = 0; j < J; ++j) {
      for (int v = 0; v < W; ++v) {
        T* here = to + j * stride + v * kLanes<T>;
        Vec<T> sum;
        std::memcpy(&sum, here, sizeof sum);
        sum += acc[j][v] * scale;
        std::memcpy(here, &sum, sizeof sum);
      }
    }
    return;
  }
  for (int j = 0; j < J; ++j) {
    alignas(kVectorBytes) T part[W * kLanes<T>];
    for (int v = 0; v < W; ++v) store<T>(part + v * kLanes<T>, acc[j][v] * scale);
    for (std::int64_t x = 0; x < columns; ++x) to[j * stride + x] += part[x];
  }
}

// How a call is done. Only whether all keys are kept may change a bit.
struct Way {
  std::int64_t threads;
  std::int64_t window;  // strips at once
  std::int64_t block;   // keys kept
};

template <class T>
struct Setting {
  const Problem& problem;
  const Gradient& gradient;
  const Gradients& out;
  const Way way;
  Map<T> map;
  std::unique_ptr<Map<T>> back;
  Lines lines;
  bool normalized, whole;
  std::int64_t strips_per_map, width;  // width: features, in whole vectors
  std::int64_t segment, segments;      // keys of one, and how many there are

  Setting(Workspace& w, const Problem& p, const Gradient& g, const Gradients& o, const Way& how)
      : problem(p),
        gradient(g),
        out(o),
        way(how),
        map(p, w),
        back(g.row_back != 0 || g.column_back != 0 ? std::make_unique<Map<T>>(g.partner, w)
                                                   : nullptr),
        lines(p),
        normalized(Normalize(p.normalize) != Normalize::Block),
        whole(how.block >= p.keys),
        strips_per_map((p.queries + kRows<T> - 1) / kRows<T>),
        width((p.dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        segment((p.keys + kSegments * kFewKeys - 1) / (kSegments * kFewKeys) * kFewKeys),
        segments((p.keys + segment - 1) / segment) {}

  Strip strip(std::int64_t n) const {
    const std::int64_t i0 = n % strips_per_map * kRows<T>;
    return {n / strips_per_map, i0, std::min<std::int64_t>(kRows<T>, problem.queries - i0)};
  }
};

// One strip of a window, and all that is kept of it.
template <class T>
class Slot {
  static constexpr int R = kRows<T>, L = kLanes<T>;

 public:
  Slot(Workspace& w, const Setting<T>& setting)
      : set_(setting), slope_(w, setting.problem, setting.gradient, setting.back.get()) {
    const Problem& p = setting.problem;
    const std::int64_t block = std::min(setting.way.block, p.keys);
    scores_ = Buffer<T>(w, p.heads * block * R);
    g_ = Buffer<T>(w, block * R);
    mean_ = Buffer<T>(w, (setting.normalized ? p.keys : kBlock) * R);
    mass_ = Buffer<T>(w, setting.normalized ? 2 * setting.lines.count * R : 0);
    query_ = Buffer<T>(w, p.heads * p.dim * R);
    rows_ = Buffer<T>(w, setting.out.key == 0 ? 0 : p.heads * R * setting.width);
    dquery_ = Buffer<T>(w, setting.out.query == 0 ? 0 : setting.segments * p.heads * p.dim * R);
    inner_ = Buffer<T>(w, p.heads * R);
    slopes_ = Buffer<T>(w, p.heads * R);
    shift_ = Buffer<T>(w, p.heads * R);
  }

  const Strip& strip() const { return strip_; }
  const T* rows(std::int64_t h) const { return rows_ + h * R * set_.width; }
  const T* inner(std::int64_t h) const { return inner_ + h * R; }

  // D of every head, and what else is per row. Keeps probabilities and g where all keys fit.
  void begin(const Strip& s, T* convert) {
    strip_ = s;
    load_strip();
    const Problem& p = set_.problem;
    std::fill_n(&inner_[0], p.heads * R, T(0));
    if (set_.out.query != 0) std::fill_n(&dquery_[0], set_.segments * p.heads * p.dim * R, T(0));
    if (set_.normalized) {
      normalized_slope(convert);
    } else {
      for (std::int64_t j0 = 0; j0 < p.keys; j0 += kFewKeys) {
        const std::int64_t j1 = std::min(j0 + kFewKeys, p.keys);
        make(j0, j1, set_.whole ? j0 : 0, p.heads > 0, convert);
      }
    }
    finish_rows();
  }

  // Probabilities and g of a block of keys again, where not all are kept.
  void make_again(std::int64_t j0, std::int64_t j1, T* convert) {
    for (std::int64_t k0 = j0; k0 < j1; k0 += kFewKeys) {
      make(k0, std::min(k0 + kFewKeys, j1), k0 - j0, false, convert);
    }
  }

  // dS of `count` keys of head h, from the first of them at `at` of what is kept: [count][R].
  void scores(std::int64_t h, std::int64_t at, std::int64_t count, T* ds) const {
    const std::int64_t block = std::min(set_.way.block, set_.problem.keys);
    const T* e = scores_ + (h * block + at) * R;
    const T* g = g_ + at * R;
    const T w = set_.map.weight(h);
    Lanes<T> slope;
    for (int v = 0; v < kWidth; ++v) slope[v] = load_lane(slopes_ + h * R, v);
    for (std::int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < kWidth; ++v) {
        const std::int64_t n = j * R + v * L;
        store<T>(ds + n, load(e + n) * (load(g + n) * w + slope[v]));
      }
    }
  }

  // What `scores` reads.
  Ahead<T> kept(std::int64_t h, std::int64_t at, std::int64_t count) const {
    const std::int64_t block = std::min(set_.way.block, set_.problem.keys);
    const T* e = scores_ + (h * block + at) * R;
    const T* g = g_ + at * R;
    return {e, e + count * R, g, g + count * R};
  }

  // dquery_[segment][x][lanes] += sum_j dS[j][lanes] K[j][x], rows of K `ld` apart.
  void add_query(std::int64_t h, std::int64_t segment, const T* ds, const T* keys, std::int64_t ld,
                 std::int64_t count, Ahead<T>& next) const {
    const std::int64_t dim = set_.problem.dim;
    T* to = dquery_ + (segment * set_.problem.heads + h) * dim * R;
    std::int64_t x = 0;
    const auto tile = [&]<int J>() {
      multiply_columns<T, kWidth, J>(ds, R, keys + x, ld, count, to + x * R, next);
      x += J;
    };
    while (x + kTileKeys <= dim) tile.template operator()<kTileKeys>();
    while (x + 2 <= dim) tile.template operator()<2>();
    while (x < dim) tile.template operator()<1>();
  }

  // dQ of the strip, complete after all keys.
  void write_query() const {
    if (set_.out.query == 0) return;
    const Problem& p = set_.problem;
    const T scale = T(p.scale);
    const std::int64_t b = set_.map.query_index(strip_.map);
    T* out = pointer<T>(set_.out.query) + b * p.heads * p.queries * p.dim;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      T* from = dquery_ + h * p.dim * R;
      for (std::int64_t part = 1; part < set_.segments; ++part) {
        const T* more = from + part * p.heads * p.dim * R;
        for (std::int64_t n = 0; n < p.dim * R; n += L) {
          store<T>(from + n, load(from + n) + load(more + n));
        }
      }
      for (std::int64_t r = 0; r < strip_.valid; ++r) {
        T* row = out + (h * p.queries + strip_.i0 + r) * p.dim;
        for (std::int64_t x = 0; x < p.dim; ++x) row[x] += scale * from[x * R + r];
      }
    }
  }

 private:
  void load_strip() {
    const Problem& p = set_.problem;
    const Strip& s = strip_;
    slope_.load_strip(s);
    const std::int64_t b = set_.map.query_index(s.map);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      pack_lanes<T>(set_.map.query, b, h, s.i0, s.valid, set_.map.scale, query_ + h * p.dim * R);
      for (int r = 0; r < R; ++r) {
        T x = std::numeric_limits<T>::infinity();
        if (r < s.valid) x = set_.map.lse(s.map, h, s.i0 + r);
        // A row without a visible key has LSE -inf: any shift gives zeros.
        shift_[h * R + r] = x == -std::numeric_limits<T>::infinity() ? T(0) : x;
      }
      if (set_.out.key == 0) continue;
      T* to = rows_ + h * R * set_.width;
      std::fill_n(to, R * set_.width, T(0));
      for (std::int64_t r = 0; r < s.valid; ++r, to += set_.width) {
        set_.map.query.row(b, h, s.i0 + r, [&](std::int64_t x, T value) { to[x] = value; });
      }
    }
  }

  // Probabilities of every head for keys j0 .. j1, the first of them at `at` in what is kept.
  void probabilities(std::int64_t j0, std::int64_t j1, std::int64_t at, T* convert) {
    const Problem& p = set_.problem;
    const std::int64_t block = std::min(set_.way.block, p.keys);
    const std::int64_t of = set_.map.key_index(strip_.map);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      SoftmaxLanes<T> lanes;
      for (int v = 0; v < kWidth; ++v) lanes.shift[v] = load_lane(shift_ + h * R, v);
      const Target<T> to = known_target<T>(scores_ + (h * block + at) * R, T(1));
      score_keys<T, Mode::KnownFirst>(query_ + h * p.dim * R, set_.map.key, of, h, j0, j1,
                                      set_.map.key_bias(strip_.map), lanes, to, convert);
    }
  }
  static Vec<T> load_lane(const T* lanes, int v) { return load(lanes + v * L); }

  // The mean map on `count` keys from `at` of what is kept.
  void mean_of_heads(std::int64_t at, std::int64_t count, T* mean) const {
    const Problem& p = set_.problem;
    const std::int64_t block = std::min(set_.way.block, p.keys);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const T* e = scores_ + (h * block + at) * R;
      const T w = set_.map.weight(h);
      for (std::int64_t n = 0; n < count * R; n += L) {
        store<T>(mean + n, h == 0 ? load(e + n) * w : load(mean + n) + load(e + n) * w);
      }
    }
  }

  // inner_ += sum over `count` keys of P_h g, a block's sum at a time.
  void add_inner(std::int64_t at, std::int64_t count, const T* g) {
    const Problem& p = set_.problem;
    const std::int64_t block = std::min(set_.way.block, p.keys);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const T* e = scores_ + (h * block + at) * R;
      Lanes<T> sum = {};
      for (std::int64_t j = 0; j < count; ++j) {
        for (int v = 0; v < kWidth; ++v) {
          sum[v] += load(e + j * R + v * L) * load(g + j * R + v * L);
        }
      }
      T* to = inner_ + h * R;
      for (int v = 0; v < kWidth; ++v) store<T>(to + v * L, load(to + v * L) + sum[v]);
    }
  }

  // Probabilities and g of keys j0 .. j1 (not normalised), and with `sums` their share of D.
  void make(std::int64_t j0, std::int64_t j1, std::int64_t at, bool sums, T* convert) {
    probabilities(j0, j1, at, convert);
    for (std::int64_t b0 = j0; b0 < j1; b0 += kBlock) {
      const std::int64_t b1 = std::min(b0 + kBlock, j1), here = at + b0 - j0;
      mean_of_heads(here, b1 - b0, mean_);
      T* g = g_ + here * R;
      slope_.block(strip_, b0, b1, mean_, g, convert);
      if (sums) add_inner(here, b1 - b0, g);
    }
  }

  // The same of a whole normalised row: g = (G - sum over the line of G A) / mass.
  void normalized_slope(T* convert) {
    const Problem& p = set_.problem;
    T* mass = mass_;
    T* dot = mass_ + set_.lines.count * R;
    probabilities(0, p.keys, 0, convert);
    mean_of_heads(0, p.keys, mean_);
    sum_lines<T>(set_.lines, p.keys, mass,
                 [&](std::int64_t j, int v) { return at(&mean_[0], j, v); });
    for (std::int64_t n = 0; n < set_.lines.count * R; ++n) mass[n] = inverse_mass(mass[n]);
    each_key([&](std::int64_t line, T* a, T*, int v) {
      store<T>(a, load(a) * load(mass + line * R + v * L));
    });
    for (std::int64_t b0 = 0; b0 < p.keys; b0 += kBlock) {
      const std::int64_t b1 = std::min(b0 + kBlock, p.keys);
      slope_.block(strip_, b0, b1, mean_ + b0 * R, g_ + b0 * R, convert);
    }
    sum_lines<T>(set_.lines, p.keys, dot,
                 [&](std::int64_t j, int v) { return at(&mean_[0], j, v) * at(&g_[0], j, v); });
    each_key([&](std::int64_t line, T*, T* g, int v) {
      const std::int64_t n = line * R + v * L;
      store<T>(g, (load(g) - load(dot + n)) * load(mass + n));
    });
    for (std::int64_t b0 = 0; b0 < p.keys; b0 += kBlock) {
      add_inner(b0, std::min(kBlock, p.keys - b0), g_ + b0 * R);
    }
  }
  template <class F>
  void each_key(F use) {
    for (std::int64_t j = 0; j < set_.problem.keys; ++j) {
      const std::int64_t line = set_.lines.of(j);
      for (int v = 0; v < kWidth; ++v) use(line, mean_ + j * R + v * L, g_ + j * R + v * L, v);
    }
  }

  // dL/dlse, and the part of dS that is the same for a whole row: slopes_ = dlse - w D.
  void finish_rows() {
    const Problem& p = set_.problem;
    const bool free = set_.out.lse != 0;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const T w = set_.map.weight(h);
      for (std::int64_t r = 0; r < R; ++r) {
        const T inner = r < strip_.valid ? inner_[h * R + r] : T(0);
        const std::int64_t n = (strip_.map * p.heads + h) * p.queries + strip_.i0 + r;
        T slope = free ? T(0) : -w * inner;
        if (r < strip_.valid && set_.gradient.lse != 0) {
          slope += pointer<const T>(set_.gradient.lse)[n];
        }
        if (r < strip_.valid && free) pointer<T>(set_.out.lse)[n] = -w * inner;
        slopes_[h * R + r] = slope;
        inner_[h * R + r] = inner;
      }
    }
  }

  const Setting<T>& set_;
  Slope<T> slope_;
  Strip strip_{};
  Buffer<T> scores_;          // probabilities: [H][block][R]
  Buffer<T> g_;               // [block][R]
  Buffer<T> mean_;            // [M or kBlock][R]
  Buffer<T> mass_;            // [2][lines][R]
  Buffer<T> query_;           // [H][d][R], scaled
  Buffer<T> dquery_;          // [segments][H][d][R]
  Buffer<T> rows_;            // [H][R][width]
  Buffer<T> inner_;           // D: [H][R]
  Buffer<T> slopes_, shift_;  // [H][R]
};

template <class T>
struct Pass {
  Workspace workspace;
  Setting<T> setting;
  std::vector<std::unique_ptr<Slot<T>>> slots;
  std::vector<Buffer<T>> convert;  // [kKeyChunk][d], one a thread
  std::vector<Buffer<T>> scores;   // dS of a few keys and two strips, [2][kKeyChunk][R], a thread

  Pass(const Problem& p, const Gradient& g, const Gradients& out, const Way& way, bool only)
      : workspace{0, only}, setting(workspace, p, g, out, way) {
    const std::int64_t dim = std::max(p.dim, g.partner.dim);
    for (std::int64_t n = 0; n < way.threads; ++n) {
      convert.emplace_back(workspace, kKeyChunk * dim);
      scores.emplace_back(workspace, 2 * kKeyChunk * kRows<T>);
    }
    const std::int64_t before = workspace.bytes;
    slots.push_back(std::make_unique<Slot<T>>(workspace, setting));
    if (only) {
      workspace.bytes += (way.window - 1) * (workspace.bytes - before);
      return;
    }
    while (std::int64_t(slots.size()) < way.window) {
      slots.push_back(std::make_unique<Slot<T>>(workspace, setting));
    }
  }
  std::int64_t passes() const { return setting.whole ? 1 : 2; }
};

// dK of `count` keys, `to` the first of them: the shares of one strip or two.
template <class T>
void add_keys(const Share<T>* shares, int strips, std::int64_t width, std::int64_t count, T scale,
              T* to, std::int64_t dim, const Ahead<T>& more) {
  Ahead<T> next{to + kColumnKeys * dim, to + count * dim, more.next, more.end};
  constexpr int L = kLanes<T>;
  std::int64_t j = 0;
  const auto tile = [&]<int J>() {
    std::int64_t x = 0;
    const auto columns = [&]<int W>() {
      multiply_rows<T, W, J>(shares, strips, j, x, width, scale, to + j * dim + x, dim,
                             std::min<std::int64_t>(W * L, dim - x), next);
      x += W * L;
    };
    while (x + (kColumnVectors - 1) * L < width) columns.template operator()<kColumnVectors>();
    if (x + 2 * L < width) columns.template operator()<3>();
    if (x + L < width) columns.template operator()<2>();
    if (x < width) columns.template operator()<1>();
    j += J;
  };
  while (j + kColumnKeys <= count) tile.template operator()<kColumnKeys>();
  while (j < count) tile.template operator()<1>();
}

// Keys s0 .. s1, of one segment, with head h: dQ of each strip of a window, dK and the bias from
// all of them in order, two strips at a time where they are of the same keys: dK, which comes from
// the third-level cache, is read and written half as often.
template <class T>
void take_keys(Pass<T>& pass, std::int64_t count, std::int64_t h, std::int64_t j0, std::int64_t s0,
               std::int64_t s1) {
  constexpr int R = kRows<T>;
  const Setting<T>& set = pass.setting;
  const Problem& p = set.problem;
  const Tokens<T>& keys = set.map.key;
  const std::size_t me = std::size_t(thread_index());
  for (std::int64_t c0 = s0; c0 < s1; c0 += kKeyChunk) {
    const std::int64_t c1 = std::min(c0 + kKeyChunk, s1);
    std::int64_t converted = -1;
    Share<T> shares[2];
    int held = 0;
    for (std::int64_t n = 0; n < count; ++n) {
      const Slot<T>& slot = *pass.slots[std::size_t(n)];
      const std::int64_t b = set.map.key_index(slot.strip().map);
      T* ds = pass.scores[me] + held * kKeyChunk * R;
      slot.scores(h, c0 - j0, c1 - c0, ds);
      if (set.out.query != 0 && converted != b) {
        // A copy in order: the product reads a few features of all keys at a time, which no
        // prefetcher foresees.
        T* to = pass.convert[me];
        for (std::int64_t j = c0; j < c1; ++j, to += p.dim) {
          keys.row(b, h, j, [to](std::int64_t x, T value) { to[x] = value; });
        }
        converted = b;
      }
      const bool last = n + 1 == count;
      if (set.out.query != 0) {
        // The next strip's scores meanwhile, or the first one's of the next keys.
        const std::int64_t next = last ? std::min(c1, s1 - 1) : c0;
        Ahead<T> ahead = pass.slots[std::size_t(last ? 0 : n + 1)]->kept(
            h, next - j0, std::min(kKeyChunk, s1 - next));
        slot.add_query(h, c0 / set.segment, ds, pass.convert[me], p.dim, c1 - c0, ahead);
      }
      if (set.out.bias != 0) {
        T* bias = pointer<T>(set.out.bias) + b * p.keys;
        for (std::int64_t j = c0; j < c1; ++j) bias[j] += lane_sum<T>(ds + (j - c0) * R);
      }
      if (set.out.key == 0) continue;
      shares[held++] = {ds, slot.rows(h)};
      const bool alone =
          last || !set.whole || set.map.key_index(pass.slots[std::size_t(n + 1)]->strip().map) != b;
      if (n % 2 == 0 && !alone) continue;
      // Heads that share a key head add to it in turn.
      const std::int64_t key_head = b * (p.heads / p.key_group) + h / p.key_group;
      T* out = pointer<T>(set.out.key) + (key_head * p.keys + c0) * p.dim;
      // The next keys meanwhile, which are copied when they are reached.
      Ahead<T> more;
      if (last && keys.is_plain()) {
        more = {keys.at(b, h, c1), keys.at(b, h, std::min(c1 + kKeyChunk, s1))};
      }
      add_keys<T>(shares, held, set.width, c1 - c0, T(p.scale), out, p.dim, more);
      held = 0;
    }
  }
}

template <class T>
void run_window(Pass<T>& pass, std::int64_t first, std::int64_t last) {
  const Setting<T>& set = pass.setting;
  const Problem& p = set.problem;
  const std::int64_t block = std::min(set.way.block, p.keys), count = last - first;
  T* convert = pass.convert[std::size_t(thread_index())];
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t n = first; n < last; ++n) {
    pass.slots[std::size_t(n - first)]->begin(set.strip(n), convert);
  }
  // Heads whose keys or whose bias are one sum go together.
  const std::int64_t group = set.out.bias != 0 ? p.heads : p.key_group;
  const std::int64_t groups = p.heads / group;
  const bool taken = set.out.query != 0 || set.out.key != 0 || set.out.bias != 0;
  for (std::int64_t j0 = 0; taken && j0 < p.keys; j0 += block) {
    const std::int64_t j1 = std::min(j0 + block, p.keys);
    if (!set.whole) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t n = 0; n < count; ++n) {
        pass.slots[std::size_t(n)]->make_again(j0, j1, convert);
      }
    }
    const std::int64_t from = j0 / set.segment, to = (j1 + set.segment - 1) / set.segment;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t n = from * groups; n < to * groups; ++n) {
      const std::int64_t s0 = std::max(j0, n / groups * set.segment);
      const std::int64_t s1 = std::min(j1, (n / groups + 1) * set.segment);
      for (std::int64_t h = n % groups * group; h < (n % groups + 1) * group; ++h) {
        take_keys(pass, count, h, j0, s0, s1);
      }
    }
  }
#pragma omp single
  if (set.out.head_weights != 0) {
    T* weights = pointer<T>(set.out.head_weights);
    for (std::int64_t n = 0; n < count; ++n) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        weights[h] += lane_sum<T>(pass.slots[std::size_t(n)]->inner(h));
      }
    }
  }
#pragma omp for schedule(static)
  for (std::int64_t n = 0; n < count; ++n) pass.slots[std::size_t(n)]->write_query();
}

template <class T>
Way choose(const Problem& p, const Gradient& g, const Gradients& out, const Limits& limits) {
  std::int64_t threads = limits.threads;
#ifndef _OPENMP
  threads = 1;
#endif
  const std::int64_t strips = p.maps * ((p.queries + kRows<T> - 1) / kRows<T>);
  threads = std::max<std::int64_t>(1, std::min(threads, strips));
  const auto bytes = [&](const Way& way) { return Pass<T>(p, g, out, way, true).workspace.bytes; };
  const bool normalized = Normalize(p.normalize) != Normalize::Block;
  const std::int64_t few = std::min(p.keys, kFewKeys);
  const std::int64_t budget = limits.memory_budget;
  std::vector<Way> ways;
  // Where all keys are kept windows are even, so that the same strips share additions to dK.
  const auto even = [&](std::int64_t n) { return std::min(strips, n + n % 2); };
  const Way one{threads, even(threads), p.keys};
  const std::int64_t more = even(4 * threads), two = even(threads);
  const std::int64_t window = bytes({threads, more, p.keys}) <= kSmallWindow ? more : two;
  if (normalized || bytes(one) <= kMostBytes) ways.push_back({threads, window, p.keys});
  if (budget > 0) {
    for (std::int64_t n = threads; n > 0; --n) ways.push_back({n, even(n), p.keys});
  }
  if (!normalized) {
    for (std::int64_t n = threads; n > 0; --n) {
      ways.push_back({n, few < p.keys ? n : even(n), few});
    }
  }
  if (budget <= 0) return ways.front();
  Way least = ways.front();
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  for (const Way& way : ways) {
    const std::int64_t taken = bytes(way);
    if (taken <= budget) return way;
    if (taken < fewest) {
      fewest = taken;
      least = way;
    }
  }
  return least;
}

template <class T>
Cost run(const Problem& p, const Gradient& g, const Gradients& out, const Limits& limits) {
  const Way way = choose<T>(p, g, out, limits);
  Pass<T> pass(p, g, out, way, limits.only_plan);
  const Cost cost{pass.workspace.bytes, way.threads, pass.passes()};
  if (limits.only_plan) return cost;
  const std::int64_t strips = pass.setting.strips_per_map;
#pragma omp parallel num_threads(int(way.threads))
  {
    const ThreadState state;
    // With pairs, strips of other maps may be of the same queries: a window keeps to one map.
    const std::int64_t maps = p.pairs == 0 ? p.maps : 1;
    for (std::int64_t m = 0; m < p.maps; m += maps) {
      const std::int64_t end = (m + maps) * strips;
      for (std::int64_t first = m * strips; first < end; first += way.window) {
        run_window(pass, first, std::min(first + way.window, end));
      }
    }
  }
  return cost;
}

}  // namespace

Cost backward(const Problem& problem, const Gradient& gradient, const Gradients& out,
              const Limits& limits) {
  return DType(problem.dtype) == DType::Float64 ? run<double>(problem, gradient, out, limits)
                                                : run<float>(problem, gradient, out, limits);
}

}  // namespace flashmaps::FLASHMAPS_ISA
