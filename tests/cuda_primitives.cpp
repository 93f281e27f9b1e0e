// Small kernels, each with one primitive, one lawful use of shared memory or one mistake, for
// tests/test_cuda_emulation.py. A plain shared library: Python calls it through ctypes.
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/emulation/controls.h"
#include "cuda/emulation/races.h"
#include "cuda/primitives.h"

#define EXPORTED extern "C" [[gnu::visibility("default")]]

namespace flashmaps::cuda {
namespace {

struct Arguments {
  const void* a;
  const void* b;
  const void* c;
  void* out;
  int n;
};
template <class T>
T input(const void* from, int i) {
  return load_global(static_cast<const T*>(from) + i);
}
template <class T>
void output(const Arguments& x, int i, T value) {
  store_global(static_cast<T*>(x.out) + i, value);
}

Shared<int> ints() {
  return shared_memory().as<int>();
}
Shared<Half> halves() {
  return shared_memory().as<Half>();
}

// ---- Primitives. Registers in, registers out: which element a lane holds is up to the test.

template <class Multiply>
void multiply(const Arguments& x, Multiply mma) {
  std::uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = input<std::uint32_t>(x.a, lane_index() * 4 + i);
  for (int i = 0; i < 2; ++i) b[i] = input<std::uint32_t>(x.b, lane_index() * 2 + i);
  for (int i = 0; i < 4; ++i) c[i] = input<float>(x.c, lane_index() * 4 + i);
  mma(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) output(x, lane_index() * 4 + i, c[i]);
}
template <class T>
void mma(const Arguments x) {
  multiply(x, [](auto& c, auto& a, auto b0, auto b1) { mma_16816<T>(c, a, b0, b1); });
}
void mma_tf32(const Arguments x) {
  multiply(x, [](auto& c, auto& a, auto b0, auto b1) { mma_1688_tf32(c, a, b0, b1); });
}

// a: 1024 halves; b: which of them begins the row of each lane.
template <bool Transposed>
void ldmatrix(const Arguments x) {
  for (int i = lane_index(); i < 1024; i += kWarp) halves().store(i, input<Half>(x.a, i));
  sync_warp();
  std::uint32_t r[4];
  const Shared<Half> row = halves() + input<int>(x.b, lane_index());
  if (Transposed) {
    ldmatrix_x4_trans(r, row);
  } else {
    ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i) output(x, lane_index() * 4 + i, r[i]);
}

// out[16x16] = a[16xn] b, by the addresses that cuda/primitives.h recommends. b lies [16][n], or
// `RowMajor`, [n][16]. n is a multiple of 8; up to one of 16, zeros are filled in.
template <class T, bool RowMajor>
void tile(const Arguments x) {
  const int l = lane_index();
  const int padded = (x.n + 15) / 16 * 16;
  const Shared<T> a = shared_memory().as<T>(), b = a + 16 * padded;
  const T* const from_a = static_cast<const T*>(x.a);
  const T* const from_b = static_cast<const T*>(x.b);
  for (int chunk = l; chunk < 2 * padded; chunk += kWarp) {
    const int row = chunk / (padded / 8), k = chunk % (padded / 8) * 8;
    const bool there = k < x.n;
    const int from = there ? row * x.n + k : 0;
    copy_async_16(a + (row * padded + k), from_a + from, there ? 16 : 0);
    if (RowMajor) {
      const bool inside = 8 * chunk < 16 * x.n;
      copy_async_16(b + 8 * chunk, from_b + (inside ? 8 * chunk : 0), inside ? 16 : 0);
    } else {
      copy_async_16(b + (row * padded + k), from_b + from, there ? 16 : 0);
    }
  }
  commit_copies();
  wait_copies<0>();
  sync_warp();
  float c[2][4] = {};
  for (int k = 0; k < padded; k += 16) {
    std::uint32_t ra[4], rb[4];
    ldmatrix_x4(ra, a + (l % 16 * padded + k + l / 16 * 8));
    if (RowMajor) {
      ldmatrix_x4_trans(rb, b + ((k + l % 16) * 16 + l / 16 * 8));
    } else {
      ldmatrix_x4(rb, b + ((l % 8 + l / 16 * 8) * padded + k + l / 8 % 2 * 8));
    }
    for (int half = 0; half < 2; ++half) mma_16816<T>(c[half], ra, rb[2 * half], rb[2 * half + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      output(x, (l / 4 + i / 2 * 8) * 16 + half * 8 + l % 4 * 2 + i % 2, c[half][i]);
    }
  }
}

void shuffles(const Arguments x) {
  const int own = input<int>(x.a, lane_index());
  const int neighbour = shuffle_xor(own, x.n);
  const int one = shuffle(own, x.n);
  const float gathered = shuffle(float(own), 31 - lane_index());
  output(x, 4 * lane_index() + 0, neighbour);
  output(x, 4 * lane_index() + 1, one);
  output(x, 4 * lane_index() + 2, int(gathered));
  output(x, 4 * lane_index() + 3, int(any_lane(own == x.n)));
}

// out[i] = f(a[i]) for n elements.
template <class From, class Function>
void elements(const Arguments& x, Function f) {
  for (int i = thread_index(); i < x.n; i += block_size()) output(x, i, f(input<From>(x.a, i)));
}
void exp2_fast_of(const Arguments x) {
  elements<float>(x, [](float t) { return exp2_fast(t); });
}
void exp2_polynomial_of(const Arguments x) {
  elements<float>(x, [](float t) { return exp2_polynomial(t); });
}
void log2_fast_of(const Arguments x) {
  elements<float>(x, [](float t) { return log2_fast(t); });
}
void round_tf32_of(const Arguments x) {
  elements<float>(x, [](float t) { return from_bits(round_tf32(t)); });
}
template <class T>
void unpack_low(const Arguments x) {
  elements<std::uint32_t>(x, [](std::uint32_t bits) { return unpack<T>(bits).x; });
}
template <class T>
void unpack_high(const Arguments x) {
  elements<std::uint32_t>(x, [](std::uint32_t bits) { return unpack<T>(bits).y; });
}
template <class T>
void pack_both(const Arguments x) {
  elements<Float2>(x, [](Float2 pair) { return pack<T>(pair.x, pair.y); });
}

// Where each thread thinks that it is.
void indices(const Arguments x) {
  const Index3 block = block_index(), grid = grid_size();
  const int number = (block.z * grid.y + block.y) * grid.x + block.x;
  const int thread = warp_index() * 32 + lane_index();
  output(x, number * block_size() + thread_index(),
         block.z * 1000000 + block.y * 100000 + block.x * 10000 + thread);
}
void uninitialised(const Arguments x) {
  const Shared<float> floats = shared_memory().as<float>();
  output(x, block_index().x * block_size() + thread_index(), floats.load(thread_index()));
  sync_threads();
  floats.store(thread_index(), 1.0f);  // which the next block must not find
}

// Two stages of copies; out[thread] = what was in a[3 thread], after some partial copies.
void copies(const Arguments x) {
  const int t = thread_index();
  const int* const from = static_cast<const int*>(x.a);
  copy_async_4(ints() + t, from + t);
  copy_async_16(ints() + 64 + 4 * t, from + 4 * t, t % 17);  // part of it, or all, or nothing
  commit_copies();
  copy_async_4(ints() + 512 + t, from + 64 + t, t % 5);
  commit_copies();
  wait_copies<1>();
  output(x, t, ints().load(t));
  for (int i = 0; i < 4; ++i) output(x, 64 + 4 * t + i, ints().load(64 + 4 * t + i));
  wait_copies<0>();
  output(x, 512 + t, ints().load(512 + t));
}

// ---- Lawful uses of shared memory, in blocks of 64 threads: nobody may find fault with them.

int neighbour(int step) {
  return (thread_index() + step) % block_size();
}

void barrier(const Arguments) {
  ints().store(thread_index(), 1);
  sync_threads();
  ints().load(neighbour(33));
  sync_threads();
  ints().store(neighbour(5), 1);
}
void warp_barrier(const Arguments) {
  const int first = warp_index() * 32;
  ints().store(thread_index(), 1);
  sync_warp();
  ints().load(first + (lane_index() + 1) % 32);
  sync_warp();
  ints().store(first + (lane_index() + 3) % 32, 1);
}
void own_data(const Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index());
  ints().store(thread_index(), 2);
}
void bytes_of_a_word(const Arguments) {
  const Shared<char> chars = shared_memory().as<char>();
  chars.store(thread_index(), 1);
  chars.load(thread_index());
  sync_threads();
  ints().load(thread_index() / 4);
}
void many_readers(const Arguments) {
  if (thread_index() == 0) ints().store(0, 1);
  sync_threads();
  ints().load(0);
  sync_threads();
  if (thread_index() == 40) ints().store(0, 1);
}
void two_buffers(const Arguments x) {
  for (int i = 0; i < 5; ++i) {
    const int at = i % 2 * 64;
    copy_async_4(ints() + at + thread_index(), static_cast<const int*>(x.a) + thread_index());
    commit_copies();
    wait_copies<0>();
    sync_threads();  // one is enough: the other buffer is next
    ints().load(at + neighbour(7));
  }
}
void own_copy(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  ints().load(thread_index());
}
void matrix_after_warp_barrier(const Arguments) {
  const Shared<Half> own = halves() + 8 * thread_index();
  std::uint32_t r[4];
  own.as<Bits4>().store(0, Bits4{});
  sync_warp();
  ldmatrix_x4(r, own);
  sync_warp();
  own.as<Bits4>().store(0, Bits4{});
}

// ---- Races.

void no_barrier_in_the_warp(const Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index() ^ 1);
}
void no_barrier_between_warps(const Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index() ^ 32);
}
void warp_barrier_between_warps(const Arguments) {
  ints().store(thread_index(), 1);
  sync_warp();
  ints().load(thread_index() ^ 32);
}
void shuffle_for_a_barrier(const Arguments) {
  ints().store(thread_index(), 1);
  shuffle_xor(1, 1);  // brings lanes together, but promises nothing about memory
  ints().load(thread_index() ^ 1);
}
void buffer_used_again(const Arguments) {
  for (int i = 0; i < 2; ++i) {
    ints().store(thread_index(), i);
    sync_threads();
    ints().load(neighbour(1));
  }
}
void two_writers(const Arguments) {
  ints().store(thread_index() / 2, 1);
}
void part_of_a_word(const Arguments) {
  if (thread_index() == 1) shared_memory().as<char>().store(6, 1);
  if (thread_index() == 2) ints().load(1);
}
void first_of_many_readers(const Arguments) {
  if (thread_index() != 63) ints().load(0);
  if (thread_index() == 63) ints().store(0, 1);
}
void reader_of_another_warp(const Arguments) {
  if (thread_index() == 40) ints().load(0);
  if (warp_index() == 0) {
    ints().load(0);
    sync_warp();
    if (thread_index() == 31) ints().store(0, 1);
  }
}
void matrix_without_barrier(const Arguments) {
  std::uint32_t r[4];
  const Shared<Half> own = halves() + 8 * thread_index();
  own.as<Bits4>().store(0, Bits4{});
  ldmatrix_x4(r, own);
}
void store_after_matrix(const Arguments) {
  std::uint32_t r[4];
  const Shared<Half> own = halves() + 8 * thread_index();
  ldmatrix_x4(r, own);
  own.as<Bits4>().store(0, Bits4{});
}
void copy_not_waited_for(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  ints().load(thread_index());
  wait_copies<0>();
}
void barrier_without_wait(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  sync_threads();
  ints().load(neighbour(1));
  wait_copies<0>();
}
void copy_not_committed(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  wait_copies<0>();
  sync_threads();
  ints().load(thread_index());
}
void wait_without_barrier(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  ints().load(neighbour(1));
}
void waits_for_the_group_before(const Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  copy_async_4(ints() + thread_index(), from);
  commit_copies();
  copy_async_4(ints() + 64 + thread_index(), from);
  commit_copies();
  wait_copies<1>();
  sync_threads();
  ints().load(neighbour(1));
  ints().load(64 + neighbour(1));
  wait_copies<0>();
}
void copy_over_what_is_read(const Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  for (int i = 0; i < 2; ++i) {
    copy_async_4(ints() + thread_index(), from);
    commit_copies();
    wait_copies<0>();
    sync_threads();
    ints().load(neighbour(1));
  }
}
void two_copies_to_one_place(const Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  copy_async_4(ints() + thread_index(), from);
  copy_async_4(ints() + thread_index(), from);
  commit_copies();
  wait_copies<0>();
}

// ---- Other mistakes.

void some_leave_before_the_barrier(const Arguments) {
  if (thread_index() >= 40) return;
  sync_threads();
}
void two_barriers(const Arguments) {
  if (warp_index() == 0) {
    sync_threads();
  } else {
    sync_threads();
  }
}
void barrier_in_a_branch(const Arguments) {
  if (lane_index() < 16) sync_threads();
  shuffle_xor(1, 1);
}
void lanes_leave_before_a_shuffle(const Arguments) {
  if (lane_index() == 7) return;
  shuffle_xor(1, 1);
}
void lanes_at_two_instructions(const Arguments) {
  std::uint32_t r[4];
  if (lane_index() < 31) {
    ldmatrix_x4(r, halves());
  } else {
    shuffle(1, 0);
  }
}
void copies_left_behind(const Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
}
void beyond_shared_memory(const Arguments) {
  ints().store(4096 + thread_index(), 1);
}
void before_shared_memory(const Arguments) {
  ints().load(thread_index() - 3);
}
void unaligned_shared_memory(const Arguments) {
  shared_memory().from_byte<int>(2).load(thread_index());
}
void unaligned_row(const Arguments) {
  std::uint32_t r[4];
  ldmatrix_x4(r, halves() + 4 * thread_index());
}
void unaligned_copy(const Arguments x) {
  copy_async_16(ints() + 4 * thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  sync_threads();
}
void beyond_global_memory(const Arguments x) {
  output(x, 64 + thread_index(), 1);
}
void copy_from_beyond_global_memory(const Arguments x) {
  copy_async_16(ints() + 4 * thread_index(), static_cast<const int*>(x.a) + 4 * thread_index(), 12);
  commit_copies();
  wait_copies<0>();
  sync_threads();
}
void lane_that_is_not_there(const Arguments) {
  shuffle(1, 32 + lane_index());
}

// ---- What the planted errors are planted in: each of its lines matters.

void victim(const Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  copy_async_4(ints() + thread_index(), from, thread_index() % 2 * 4);
  commit_copies();
  wait_copies<0>();
  sync_threads();
  const int read = ints().load(neighbour(1));
  const Shared<int> own_warp = ints() + 64 + 32 * warp_index();
  own_warp.store(lane_index(), read);
  sync_warp();
  output(x, thread_index(), shuffle_xor(own_warp.load((lane_index() + 1) % 32), 4));
}

const std::map<std::string, void (*)(Arguments)> kKernels = {
#define KERNEL(name) {#name, name}
    KERNEL(mma<Half>),
    KERNEL(mma<BFloat>),
    KERNEL(mma_tf32),
    KERNEL(ldmatrix<false>),
    KERNEL(ldmatrix<true>),
    {"tile<Half, false>", tile<Half, false>},
    {"tile<Half, true>", tile<Half, true>},
    {"tile<BFloat, false>", tile<BFloat, false>},
    {"tile<BFloat, true>", tile<BFloat, true>},
    KERNEL(shuffles),
    KERNEL(exp2_fast_of),
    KERNEL(exp2_polynomial_of),
    KERNEL(log2_fast_of),
    KERNEL(round_tf32_of),
    KERNEL(unpack_low<Half>),
    KERNEL(unpack_low<BFloat>),
    KERNEL(unpack_high<Half>),
    KERNEL(unpack_high<BFloat>),
    KERNEL(pack_both<Half>),
    KERNEL(pack_both<BFloat>),
    KERNEL(indices),
    KERNEL(uninitialised),
    KERNEL(copies),
    KERNEL(barrier),
    KERNEL(warp_barrier),
    KERNEL(own_data),
    KERNEL(bytes_of_a_word),
    KERNEL(many_readers),
    KERNEL(two_buffers),
    KERNEL(own_copy),
    KERNEL(matrix_after_warp_barrier),
    KERNEL(no_barrier_in_the_warp),
    KERNEL(no_barrier_between_warps),
    KERNEL(warp_barrier_between_warps),
    KERNEL(shuffle_for_a_barrier),
    KERNEL(buffer_used_again),
    KERNEL(two_writers),
    KERNEL(part_of_a_word),
    KERNEL(first_of_many_readers),
    KERNEL(reader_of_another_warp),
    KERNEL(matrix_without_barrier),
    KERNEL(store_after_matrix),
    KERNEL(copy_not_waited_for),
    KERNEL(barrier_without_wait),
    KERNEL(copy_not_committed),
    KERNEL(wait_without_barrier),
    KERNEL(waits_for_the_group_before),
    KERNEL(copy_over_what_is_read),
    KERNEL(two_copies_to_one_place),
    KERNEL(some_leave_before_the_barrier),
    KERNEL(two_barriers),
    KERNEL(barrier_in_a_branch),
    KERNEL(lanes_leave_before_a_shuffle),
    KERNEL(lanes_at_two_instructions),
    KERNEL(copies_left_behind),
    KERNEL(beyond_shared_memory),
    KERNEL(before_shared_memory),
    KERNEL(unaligned_shared_memory),
    KERNEL(unaligned_row),
    KERNEL(unaligned_copy),
    KERNEL(beyond_global_memory),
    KERNEL(copy_from_beyond_global_memory),
    KERNEL(lane_that_is_not_there),
    KERNEL(victim),
#undef KERNEL
};

// The text of what `run` throws, or an empty one.
template <class Function>
const char* caught(Function run) {
  static std::string text;
  text.clear();
  try {
    run();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace
}  // namespace flashmaps::cuda

using namespace flashmaps::cuda;

EXPORTED const char* run_kernel(const char* name, const int* grid, int threads, int shared_bytes,
                                const void* a, const void* b, const void* c, void* out, int n) {
  return caught([&] {
    launch(name, kKernels.at(name), {grid[0], grid[1], grid[2]}, threads, shared_bytes, Stream{},
           Arguments{a, b, c, out, n});
  });
}

EXPORTED void set_memory(int count, const std::uintptr_t* addresses, const std::int64_t* bytes) {
  std::vector<emulation::Memory> memory;
  for (int i = 0; i < count; ++i) {
    memory.push_back({addresses[i], bytes[i], "memory " + std::to_string(i)});
  }
  emulation::set_memory(memory);
}

EXPORTED const char* plant(const char* primitive, const char* file, int line) {
  return caught([&] { emulation::plant(primitive, file, line); });
}

// The sites called since the last time, one a line: primitive, file, line, calls.
EXPORTED const char* take_sites() {
  static std::string text;
  text.clear();
  for (const emulation::Site& site : emulation::take_sites()) {
    text += site.primitive + " " + site.file + " " + std::to_string(site.line) + " " +
            std::to_string(site.calls) + "\n";
  }
  return text.c_str();
}

// A list of events, four numbers each: kind (0 barrier of the block, 1 of a warp, 2 read, 3 write),
// actor, offset, bytes. Returns which of them is the first that races, or -1.
EXPORTED int first_race(int count, const int* events, int shared_bytes) {
  emulation::Races races;
  races.begin(shared_bytes);
  for (int i = 0; i < count; ++i) {
    const int kind = events[4 * i], actor = events[4 * i + 1];
    const int offset = events[4 * i + 2], bytes = events[4 * i + 3];
    try {
      if (kind == 0) races.sync_threads();
      if (kind == 1) races.sync_warp(emulation::warp_of(actor));
      if (kind == 2) races.read(actor, offset, bytes, emulation::Here::current());
      if (kind == 3) races.write(actor, offset, bytes, emulation::Here::current());
    } catch (const std::runtime_error&) {
      return i;
    }
  }
  return -1;
}
