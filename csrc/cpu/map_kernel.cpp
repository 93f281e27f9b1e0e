// The mean attention map, a strip of R queries at a time, and what is asked of it.
//
// A strip of R queries x all keys is kept in cache: for each head its scores are computed and
// exponentiated in place, then added, divided by their sum, to the strip of the mean map, which is
// reduced while it is there. One product Q K^T in all. Where a strip would be too large, or
// the log-sum-exp is given, it is used instead: the probabilities of a block of keys then need no
// others, at the price of a second product where the log-sum-exp had to be computed first.
//
// This file is compiled once for each instruction set, in a namespace of its own.
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/back.h"
#include "cpu/map.h"
#include "cpu/matrix_unit.h"
#include "cpu/memory.h"
#include "cpu/reducers.h"
#include "cpu/simd.h"
#include "cpu/tile.h"
#include "cpu/typed.h"

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Largest strip (the mean map's and one head's) that is worth keeping, per thread. Beyond it the
// log-sum-exp costs a second product. That is far beyond the second-level cache: at 65,536 keys one
// pass through the third-level cache still took two thirds of the time of two passes inside it.
constexpr std::int64_t kStripBytes = std::int64_t(16) << 20;

// Keys of a block where the log-sum-exp is known: as a rule, and when memory is short. Multiples of
// kBlock and of kKeyChunk, so that sums over a row are split in the same places.
constexpr std::int64_t kKnownKeys = 768;
constexpr std::int64_t kFewKnownKeys = 192;

// Strips whose columns wait to be reduced: as many as fit, at least one for each thread.
constexpr std::int64_t kWindowBytes = std::int64_t(32) << 20;

// Multiplications, or what takes as long, that are worth a thread: a few microseconds of them.
constexpr double kThreadWork = 1 << 16;

// How a call is done: what it takes, and how fast it is. Only `known` changes any bit of the
// result.
struct Choice {
  std::int64_t threads;
  bool known;               // from the log-sum-exp, block by block, instead of whole strips
  std::int64_t window;      // strips whose columns wait to be reduced, unless known
  std::int64_t known_keys;  // keys of a block, if known
  std::int64_t group;       // maps whose log-sum-exp is computed and held at once, if it has to be
  UnitShape unit = {};      // of the matrix unit, where it makes the scores
};

// One call: what is wanted, and how it will be done.
template <class T>
struct Plan {
  Workspace workspace;
  const Problem& problem;
  const Operands& operands;
  const Outputs& out;
  const Choice choice;
  Map<T> map;
  std::unique_ptr<Map<T>> back;
  Lines lines, back_lines;
  const bool normalized, known;
  std::int64_t strips_per_map;
  Buffer<T> centre_x, centre_y;
  Buffer<T> computed_lse;      // [group, H, N], log2 units, where this call has to compute it
  std::int64_t first_map = 0;  // of the group at hand

  Plan(const Problem& p, const Operands& o, const Outputs& outputs, const Choice& how, bool only)
      : workspace{0, only},
        problem(p),
        operands(o),
        out(outputs),
        choice(how),
        map(p, workspace),
        back(outputs.return_probability != 0 ? std::make_unique<Map<T>>(o.partner, workspace)
                                             : nullptr),
        lines(p),
        back_lines(o.partner),
        normalized(Normalize(p.normalize) != Normalize::Block),
        known(how.known),
        strips_per_map(strips_of(p.queries)) {
    if (out.expectation != 0) {
      centre_x = Buffer<T>(workspace, p.keys);
      centre_y = Buffer<T>(workspace, p.keys);
      for (std::int64_t j = 0; j < p.keys && !only; ++j) {
        centre_x[j] = (T(j % p.grid_width) + T(0.5)) / T(p.grid_width);
        centre_y[j] = (T(j / p.grid_width) + T(0.5)) / T(p.grid_height);
      }
    }
    if (compute_lse() && wants_map()) {
      computed_lse = Buffer<T>(workspace, how.group * p.heads * p.queries);
    }
  }
  static std::int64_t strips_of(std::int64_t queries) {
    return (queries + kRows<T> - 1) / kRows<T>;
  }
  std::int64_t strip_keys() const {
    return known ? std::min(problem.keys, choice.known_keys) : problem.keys;
  }
  // Keys whose columns a thread reduces at once, if known: so few that every thread has several
  // blocks, in whole tiles.
  std::int64_t column_keys() const {
    const std::int64_t share = problem.maps * problem.keys / (4 * choice.threads);
    return std::min(problem.keys, std::clamp<std::int64_t>(share / kTileKeys * kTileKeys, kTileKeys,
                                                           choice.known_keys));
  }
  Strip strip(std::int64_t n) const {
    const std::int64_t i0 = n % strips_per_map * kRows<T>;
    return {n / strips_per_map, i0, std::min<std::int64_t>(kRows<T>, problem.queries - i0)};
  }
  bool wants_rows() const {
    return out.entropy || out.max || out.argmax || out.expectation || out.diagonal ||
           out.return_probability || out.product || out.dense || out.topk_values ||
           out.topk_indices || out.pooled_keys;
  }
  bool wants_columns() const { return columns().wanted(); }
  bool wants_map() const { return wants_rows() || wants_columns(); }
  bool in_windows() const { return wants_columns() && !known; }
  bool compute_lse() const { return known && problem.lse == 0; }
  // A pass for the log-sum-exp alone. Strips find it on their way.
  bool lse_pass() const { return compute_lse() || (out.lse != 0 && (known || !wants_map())); }
  std::int64_t passes() const {
    if (!known) return 1;
    return std::int64_t(lse_pass()) + std::int64_t(wants_rows()) + std::int64_t(wants_columns());
  }
  Columns<T> columns() const {
    Columns<T> c;
    c.sum_out = pointer<T>(out.column_sum);
    c.entropy_out = pointer<T>(out.column_entropy);
    c.max_out = pointer<T>(out.column_max);
    c.argmax_out = pointer<std::int64_t>(out.column_argmax);
    c.product_out = pointer<T>(out.transposed_product);
    c.left = pointer<const T>(operands.left);
    c.left_columns = operands.left_columns;
    c.keys = problem.keys;
    return c;
  }
};

// One thread's buffers and the making of blocks of the mean map.
template <class T>
class Worker {
  static constexpr bool kUnit = !std::is_same_v<UnitOf<T>, NoUnit>;
  static constexpr int R = kRows<T>, L = kLanes<T>;

 public:
  explicit Worker(Plan<T>& plan) : plan_(plan) {
    const Problem& p = plan.problem;
    Workspace& w = plan.workspace;
    if constexpr (kUnit) {
      if (plan.choice.unit.used()) unit_ = Unit(w, plan.choice.unit, p.heads);
    }
    if (!plan.choice.unit.used()) query_ = Buffer<T>(w, p.heads * p.dim * R);
    convert_ = Buffer<T>(w, kKeyChunk * std::max(p.dim, plan.operands.partner.dim));
    const std::int64_t strip = plan.wants_map() ? plan.strip_keys() * R : 0;
    if (!plan.in_windows()) mean_ = Buffer<T>(w, strip);
    if (p.heads > 1 && !plan.known) head_ = Buffer<T>(w, strip);
    if (plan.normalized) line_mass_ = Buffer<T>(w, plan.lines.count * R);
    const Outputs& out = plan.out;
    if (out.return_probability != 0) {
      // The unit's registers are set up for one shape.
      const bool alike = UnitShape::of(plan.operands.partner) == plan.choice.unit;
      back_ = BackTile<T>(w, *plan.back, plan.operands.partner_line_mass,
                          alike ? plan.choice.unit : UnitShape{});
    }
    rows_.shape = {p.queries, p.keys, T(1) / T(plan.lines.count)};
    rows_.entropy.out = pointer<T>(out.entropy);
    rows_.top.max_out = pointer<T>(out.max);
    rows_.top.argmax_out = pointer<std::int64_t>(out.argmax);
    rows_.expectation.out = pointer<T>(out.expectation);
    rows_.expectation.x = plan.centre_x;
    rows_.expectation.y = plan.centre_y;
    rows_.diagonal.out = pointer<T>(out.diagonal);
    rows_.returns.out = pointer<T>(out.return_probability);
    rows_.inverse_lines_of_trip = T(1) / T(plan.lines.count * plan.back_lines.count);
    rows_.product.out = pointer<T>(out.product);
    if (out.product != 0) {
      rows_.product.x = pointer<const T>(plan.operands.right);
      rows_.product.columns = plan.operands.right_columns;
      rows_.product.held = Buffer<T>(w, plan.operands.right_columns * R);
    }
    rows_.dense = pointer<T>(out.dense);
    rows_.topk.values_out = pointer<T>(out.topk_values);
    rows_.topk.indices_out = pointer<std::int64_t>(out.topk_indices);
    if (rows_.topk.wanted()) {
      rows_.topk.k = plan.operands.k;
      const bool small = rows_.topk.small();
      rows_.topk.values = Buffer<T>(w, R * (small ? plan.operands.k : p.keys));
      rows_.topk.indices = Buffer<std::int64_t>(w, small ? R * plan.operands.k : p.keys);
    }
    rows_.pooled.out = pointer<T>(out.pooled_keys);
    if (out.pooled_keys != 0) {
      rows_.pooled.cells = pointer<const std::int64_t>(plan.operands.cells);
      rows_.pooled.num_cells = plan.operands.num_cells;
      rows_.pooled.held = Buffer<T>(w, plan.operands.num_cells * R);
    }
  }

  // Everything about one strip. `mean` receives its block of the mean map where columns need it
  // too; null for this thread's own.
  void rows(const Strip& s, T* mean = nullptr) {
    if (mean == nullptr) mean = mean_;
    const std::int64_t keys = plan_.problem.keys;
    load_strip(s);
    if (plan_.wants_rows()) rows_.begin();
    if (plan_.out.return_probability != 0) back_.load(s);
    if (plan_.known) {
      const std::int64_t step = plan_.choice.known_keys;
      for (std::int64_t j0 = 0; j0 < keys; j0 += step) {
        const std::int64_t j1 = std::min(j0 + step, keys);
        known_heads(s, j0, j1, mean);
        finish(s, j0, j1, mean);
      }
    } else {
      softmax_heads(s, mean);
      if (plan_.normalized) {
        combine_last(0, keys, mean);
        normalize(mean);
      }
      finish(s, 0, keys, mean);
    }
    if (plan_.wants_rows()) rows_.write(s);
  }

  // Only the log-sum-exp of every head: to the plan's, to the output, or to both.
  void only_lse(const Strip& s) {
    load_strip(s);
    const Problem& p = plan_.problem;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      SoftmaxLanes<T> lanes;
      lanes.begin();
      score<Mode::Lse>(s, h, 0, p.keys, lanes, Target<T>{});
      write_lse(s, h, lanes);
    }
  }

  // Keys j0 .. j1 of a strip, from the log-sum-exp: the last step of a column reduction.
  void known_block(const Strip& s, std::int64_t j0, std::int64_t j1) {
    load_strip(s);
    known_heads(s, j0, j1, mean_);
  }
  const T* mean() const { return mean_; }

 private:
  static std::int64_t block_end(std::int64_t j0, std::int64_t end) {
    return std::min(j0 + kBlock, end);
  }

  void load_strip(const Strip& s) {
    const Problem& p = plan_.problem;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t of = plan_.map.query_index(s.map);
      if constexpr (kUnit) {
        if (plan_.choice.unit.used()) {
          unit_.load(plan_.map.query, of, h, s.i0, s.valid);
          continue;
        }
      }
      pack_lanes<T>(plan_.map.query, of, h, s.i0, s.valid, plan_.map.scale, query_ + h * p.dim * R);
    }
    for (int r = 0; r < R; ++r) valid_[r / L][r % L] = r < s.valid ? T(1) : T(0);
  }

  // Scores of head h of this strip, whatever the mode.
  template <Mode mode>
  void score(const Strip& s, std::int64_t h, std::int64_t j0, std::int64_t j1,
             SoftmaxLanes<T>& lanes, const Target<T>& to) {
    if constexpr (kUnit) {
      if (plan_.choice.unit.used()) {
        unit_.template score<mode>(plan_.map.key, plan_.map.key_index(s.map), h, j0, j1,
                                   plan_.map.scale, plan_.map.key_bias(s.map), lanes, to);
        return;
      }
    }
    score_keys<T, mode>(query_ + h * plan_.problem.dim * R, plan_.map.key,
                        plan_.map.key_index(s.map), h, j0, j1, plan_.map.key_bias(s.map), lanes, to,
                        convert_);
  }

  // All heads with a running softmax. Afterwards the last head is still to be added (combine_last,
  // block by block, right before the reducers read it): it lies in head_, or in `mean` if it is the
  // only one.
  void softmax_heads(const Strip& s, T* mean) {
    const Problem& p = plan_.problem;
    Target<T> to;
    to.e = p.heads > 1 ? head_ : mean;
    to.mean = mean;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      SoftmaxLanes<T> lanes;
      lanes.begin();
      if (h == 0) {
        score<Mode::First>(s, h, 0, p.keys, lanes, to);
      } else if (h == 1) {
        score<Mode::Second>(s, h, 0, p.keys, lanes, to);
      } else {
        score<Mode::Later>(s, h, 0, p.keys, lanes, to);
      }
      for (int v = 0; v < kWidth; ++v) {
        // A row without any visible key has sum 0 and gives zeros; so do lanes without a query.
        const Vec<T> some = lanes.total[v] > Vec<T>{} ? lanes.total[v] : splat(T(1));
        to.coefficient[v] = plan_.map.weight(h) * valid_[v] / some;
        last_[v] = to.coefficient[v];
      }
      if (plan_.out.lse != 0) write_lse(s, h, lanes);
    }
  }
  void combine_last(std::int64_t from, std::int64_t to, T* mean) const {
    const bool one = plan_.problem.heads == 1;
    for (std::int64_t n = from * R; n < to * R; n += R) {
      for (int v = 0; v < kWidth; ++v) {
        T* m = mean + n + v * L;
        store<T>(m, one ? load(m) * last_[v] : load(m) + load(head_ + n + v * L) * last_[v]);
      }
    }
  }

  // Keys j0 .. j1 of the mean map from the log-sum-exp of every head.
  void known_heads(const Strip& s, std::int64_t j0, std::int64_t j1, T* mean) {
    const Problem& p = plan_.problem;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      SoftmaxLanes<T> lanes;
      for (int r = 0; r < R; ++r) {
        T x = std::numeric_limits<T>::infinity();
        if (r < s.valid) {
          x = p.lse != 0 ? plan_.map.lse(s.map, h, s.i0 + r)
                         : plan_.computed_lse[computed(s, h) + r];
        }
        // A row without a visible key has LSE -inf: any shift gives zeros.
        lanes.shift[r / L][r % L] = x == -std::numeric_limits<T>::infinity() ? T(0) : x;
      }
      const Target<T> to = known_target<T>(mean, plan_.map.weight(h));
      if (h == 0) {
        score<Mode::KnownFirst>(s, h, j0, j1, lanes, to);
      } else {
        score<Mode::KnownLater>(s, h, j0, j1, lanes, to);
      }
    }
  }

  // Note eq. 2.3 on a whole strip. A line whose mass underflows float gives zeros.
  void normalize(T* mean) {
    const std::int64_t keys = plan_.problem.keys;
    sum_lines<T>(plan_.lines, keys, &line_mass_[0],
                 [&](std::int64_t j, int v) { return at(mean, j, v); });
    for (std::int64_t n = 0; n < plan_.lines.count * R; ++n) {
      line_mass_[n] = inverse_mass(line_mass_[n]);
    }
    for (std::int64_t j = 0; j < keys; ++j) {
      const T* factor = line_mass_ + plan_.lines.of(j) * R;
      for (int v = 0; v < kWidth; ++v) {
        store<T>(mean + j * R + v * L, at(mean, j, v) * load(factor + v * L));
      }
    }
  }

  // The reducers over keys j0 .. j1, whose block of the mean map starts at `mean`.
  void finish(const Strip& s, std::int64_t j0, std::int64_t j1, T* mean) {
    for (std::int64_t b0 = j0; b0 < j1; b0 += kBlock) {
      const std::int64_t b1 = block_end(b0, j1);
      if (!plan_.known && !plan_.normalized) combine_last(b0 - j0, b1 - j0, mean);
      const T* back = nullptr;
      if (plan_.out.return_probability != 0) {
        back = back_.block(s, b0, b1, convert_);
      }
      if (plan_.wants_rows()) rows_.update(s, mean + (b0 - j0) * R, back, b0, b1 - b0);
    }
  }

  // Where the plan's log-sum-exp of head h of this strip is.
  std::int64_t computed(const Strip& s, std::int64_t h) const {
    const Problem& p = plan_.problem;
    return ((s.map - plan_.first_map) * p.heads + h) * p.queries + s.i0;
  }
  void write_lse(const Strip& s, std::int64_t h, const SoftmaxLanes<T>& lanes) {
    const Problem& p = plan_.problem;
    T* log2 = plan_.computed_lse;
    T* nats = pointer<T>(plan_.out.lse);
    for (std::int64_t r = 0; r < s.valid; ++r) {
      const double sum = double(lanes.total[r / L][r % L]);
      const double value = std::log2(sum) + double(lanes.shift[r / L][r % L]);
      if (log2 != nullptr) log2[computed(s, h) + r] = T(value);
      if (nats != nullptr) {
        nats[(s.map * p.heads + h) * p.queries + s.i0 + r] = T(value * kLn2);
      }
    }
  }

  Plan<T>& plan_;
  Rows<T> rows_;
  BackTile<T> back_;
  Lanes<T> valid_, last_;  // last_: the coefficient of the head yet to be added
  Buffer<T> query_;        // [H][d][R], scaled
  UnitOf<T> unit_;         // or as the matrix unit takes them
  Buffer<T> convert_;      // [kKeyChunk][d]
  Buffer<T> mean_, head_;  // [keys of a block][R]
  Buffer<T> line_mass_;    // [lines][R]
};

// A call with everything that it holds.
template <class T>
struct Call {
  Plan<T> plan;
  std::vector<std::unique_ptr<Worker<T>>> workers;
  Columns<T> columns;
  Buffer<T> means;  // [window][M][R]
  Buffer<T> left;   // [window, or a thread][R][packed columns]

  Call(const Problem& problem, const Operands& operands, const Outputs& outputs,
       const Choice& choice, bool only)
      : plan(problem, operands, outputs, choice, only), columns(plan.columns()) {
    Workspace& workspace = plan.workspace;
    const std::int64_t before = workspace.bytes;
    const std::int64_t threads = choice.threads;
    workers.push_back(std::make_unique<Worker<T>>(plan));
    if (only) {
      workspace.bytes += (threads - 1) * (workspace.bytes - before);
    } else {
      while (std::int64_t(workers.size()) < threads) {
        workers.push_back(std::make_unique<Worker<T>>(plan));
      }
    }
    if (!plan.wants_columns()) return;
    const std::int64_t packed =
        outputs.transposed_product == 0 ? 0 : kRows<T> * columns.packed_columns();
    left = Buffer<T>(workspace, (plan.known ? threads : choice.window) * packed);
    if (plan.known) {
      columns.hold(workspace, threads, plan.column_keys());
    } else {
      means = Buffer<T>(workspace, choice.window * problem.keys * kRows<T>);
      columns.hold(workspace, 1, problem.keys);  // strips come in order: a key is in one map only
    }
  }
  Worker<T>& mine() { return *workers[std::size_t(thread_index())]; }
  Cost cost() const { return {plan.workspace.bytes, plan.choice.threads, plan.passes()}; }
};

// How it is done where memory is not short.
template <class T>
Choice usual(const Problem& p, int threads) {
#ifndef _OPENMP
  threads = 1;
#endif
  const std::int64_t strips = p.maps * Plan<T>::strips_of(p.queries);
  // A thread that has to be woken for less than this comes too late.
  const double work = double(p.maps * p.heads) * double(p.queries * p.keys) * double(p.dim + 32);
  const auto worth = std::int64_t(std::min(work / kThreadWork, 1e6));
  const std::int64_t most =
      std::max<std::int64_t>(1, std::min({std::int64_t(threads), strips, worth}));
  // The mean map's strip and, where there are several heads, one head's.
  const std::int64_t strip = p.keys * kRows<T> * std::int64_t(sizeof(T));
  const bool known = Normalize(p.normalize) == Normalize::Block &&
                     (p.lse != 0 || strip * (p.heads > 1 ? 2 : 1) > kStripBytes);
  // Two strips a thread even out their work, while they stay small.
  const std::int64_t window = std::clamp(kWindowBytes / strip, most, 2 * most);
  return {most, known, std::min(strips, window), kKnownKeys, p.maps};
}

// The first way that fits the budget, fastest first among those that give the same bits; else the
// one that takes least.
template <class T>
Choice choose(const Problem& problem, const Operands& operands, const Outputs& outputs,
              const Limits& limits) {
  Choice first = usual<T>(problem, limits.threads);
  if (limits.matrix_unit) first.unit = UnitShape::of(problem);
  if (limits.memory_budget <= 0) return first;
  std::vector<Choice> ways;
  const auto blocks_of_every_size = [&](std::int64_t threads) {
    ways.push_back({threads, true, 0, kKnownKeys, problem.maps});
    ways.push_back({threads, true, 0, kKnownKeys, 1});
    ways.push_back({threads, true, 0, kFewKnownKeys, 1});
  };
  for (std::int64_t threads = first.threads; threads > 0; --threads) {
    if (first.known) {
      blocks_of_every_size(threads);
    } else {
      for (std::int64_t window : {std::min(first.window, 2 * threads), threads}) {
        ways.push_back({threads, false, window, 0, problem.maps});
      }
    }
  }
  if (!first.known && Normalize(problem.normalize) == Normalize::Block) {
    for (std::int64_t threads = first.threads; threads > 0; --threads) {
      blocks_of_every_size(threads);
    }
  }
  for (Choice& way : ways) way.unit = first.unit;
  Choice least = first;
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  for (const Choice& way : ways) {
    const std::int64_t bytes = Call<T>(problem, operands, outputs, way, true).cost().workspace;
    if (bytes <= limits.memory_budget) return way;
    if (bytes < fewest) {
      fewest = bytes;
      least = way;
    }
  }
  return least;
}

// Strips of consecutive maps, in the order of the map.
struct Range {
  std::int64_t first, last;
};

template <class T>
void run_lse(Call<T>& call, Range strips) {
#pragma omp parallel num_threads(int(call.workers.size()))
  {
    const ThreadState state;
    const UnitState unit(call.plan.choice.unit);
    Worker<T>& worker = call.mine();
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t n = strips.first; n < strips.last; ++n) worker.only_lse(call.plan.strip(n));
  }
}

// Row reductions: strips are independent.
template <class T>
void run_rows(Call<T>& call, Range strips) {
#pragma omp parallel num_threads(int(call.workers.size()))
  {
    const ThreadState state;
    const UnitState unit(call.plan.choice.unit);
    Worker<T>& worker = call.mine();
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t n = strips.first; n < strips.last; ++n) worker.rows(call.plan.strip(n));
  }
}

// Rows and columns in one pass: a window of strips is made in parallel, then each key's column
// takes them up in order. How many strips make a window does not change the order, so neither the
// bits.
template <class T>
void run_windows(Call<T>& call, Range strips) {
  constexpr int R = kRows<T>;
  const Plan<T>& plan = call.plan;
  const std::int64_t keys = plan.problem.keys;
  const std::int64_t window = plan.choice.window;
  Columns<T>& columns = call.columns;
  const std::int64_t packed = columns.product_out == nullptr ? 0 : R * columns.packed_columns();
  // One piece of work is the columns of kBlock keys, or fewer where there are few.
  const std::int64_t step =
      std::clamp<std::int64_t>(keys / (2 * std::int64_t(call.workers.size())), 1, kBlock);
  const std::int64_t pieces = (keys + step - 1) / step;
#pragma omp parallel num_threads(int(call.workers.size()))
  {
    const ThreadState state;
    const UnitState unit(call.plan.choice.unit);
    Worker<T>& worker = call.mine();
    for (std::int64_t first = strips.first; first < strips.last; first += window) {
      const std::int64_t last = std::min(first + window, strips.last);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t n = first; n < last; ++n) {
        const Strip s = plan.strip(n);
        worker.rows(s, call.means + (n - first) * keys * R);
        columns.pack_left(s, plan.problem.queries, call.left + (n - first) * packed);
      }
#pragma omp for schedule(static)
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        const std::int64_t j0 = piece * step, j1 = std::min(j0 + step, keys);
        for (std::int64_t n = first; n < last; ++n) {
          const Strip s = plan.strip(n);
          if (s.i0 == 0) columns.begin(0, s.map, j0, j1);
          columns.update(0, s, call.means + ((n - first) * keys + j0) * R,
                         call.left + (n - first) * packed, j0, j1);
          if (s.i0 + s.valid == plan.problem.queries) columns.write(0, s.map, j0, j1);
        }
      }
    }
  }
}

// Columns from the log-sum-exp: each thread keeps a block of keys and walks over all strips.
template <class T>
void run_known_columns(Call<T>& call, Range maps) {
  constexpr int R = kRows<T>;
  const Plan<T>& plan = call.plan;
  const std::int64_t keys = plan.problem.keys;
  const std::int64_t block = plan.column_keys();
  const std::int64_t blocks = (keys + block - 1) / block;
  Columns<T>& columns = call.columns;
  const std::int64_t packed = columns.product_out == nullptr ? 0 : R * columns.packed_columns();
#pragma omp parallel num_threads(int(call.workers.size()))
  {
    const ThreadState state;
    const UnitState unit(call.plan.choice.unit);
    const std::int64_t me = thread_index();
    Worker<T>& worker = call.mine();
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t n = maps.first * blocks; n < maps.last * blocks; ++n) {
      const std::int64_t m = n / blocks, j0 = n % blocks * block;
      const std::int64_t j1 = std::min(j0 + block, keys);
      columns.begin(me, m, j0, j1);
      for (std::int64_t i = 0; i < plan.strips_per_map; ++i) {
        const Strip s = plan.strip(m * plan.strips_per_map + i);
        worker.known_block(s, j0, j1);
        columns.pack_left(s, plan.problem.queries, call.left + me * packed);
        columns.update(me, s, worker.mean(), call.left + me * packed, j0, j1);
      }
      columns.write(me, m, j0, j1);
    }
  }
}

template <class T>
Cost run(const Problem& problem, const Operands& operands, const Outputs& outputs,
         const Limits& limits) {
  const Choice choice = choose<T>(problem, operands, outputs, limits);
  Call<T> call(problem, operands, outputs, choice, limits.only_plan);
  if (limits.only_plan) return call.cost();
  Plan<T>& plan = call.plan;
  for (std::int64_t first = 0; first < problem.maps; first += choice.group) {
    const Range maps{first, std::min(first + choice.group, problem.maps)};
    const Range strips{maps.first * plan.strips_per_map, maps.last * plan.strips_per_map};
    plan.first_map = first;
    if (plan.lse_pass()) run_lse(call, strips);
    if (plan.in_windows()) {
      run_windows(call, strips);
    } else {
      if (plan.wants_rows()) run_rows(call, strips);
      if (plan.wants_columns()) run_known_columns(call, maps);
    }
  }
  return call.cost();
}

}  // namespace

Cost reduce(const Problem& problem, const Operands& operands, const Outputs& outputs,
            const Limits& limits) {
  return DType(problem.dtype) == DType::Float64 ? run<double>(problem, operands, outputs, limits)
                                                : run<float>(problem, operands, outputs, limits);
}

}  // namespace flashmaps::FLASHMAPS_ISA
