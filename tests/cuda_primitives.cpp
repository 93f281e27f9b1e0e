// Small kernels, each with one primitive, one lawful use of shared memory or one mistake, for
// tests/test_cuda_emulation.py. A plain shared library: Python calls it through ctypes.
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/primitives.h"

#if !defined(__CUDACC__)
#include "cuda/emulation/controls.h"
#include "cuda/emulation/races.h"
#endif

#define EXPORTED extern "C" [[gnu::visibility("default")]]

// nvcc compiles this file as well, to see that both implementations have all that is used here.
#define KERNEL FLASHMAPS_KERNEL(1024, 1) void

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
FLASHMAPS_DEVICE T input(const void* from, int i) {
  return load_global(static_cast<const T*>(from) + i);
}
template <class T>
FLASHMAPS_DEVICE void output(const Arguments& x, int i, T value) {
  store_global(static_cast<T*>(x.out) + i, value);
}

FLASHMAPS_DEVICE Shared<int> ints() {
  return shared_memory().as<int>();
}
FLASHMAPS_DEVICE Shared<Half> halves() {
  return shared_memory().as<Half>();
}

// ---- Primitives. Registers in, registers out: which element a lane holds is up to the test.

template <class Multiply>
FLASHMAPS_DEVICE void multiply(const Arguments& x, Multiply mma) {
  std::uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = input<std::uint32_t>(x.a, lane_index() * 4 + i);
  for (int i = 0; i < 2; ++i) b[i] = input<std::uint32_t>(x.b, lane_index() * 2 + i);
  for (int i = 0; i < 4; ++i) c[i] = input<float>(x.c, lane_index() * 4 + i);
  mma(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) output(x, lane_index() * 4 + i, c[i]);
}
template <class T>
KERNEL mma(FLASHMAPS_PARAMETER Arguments x) {
  multiply(x, [](auto& c, auto& a, auto b0, auto b1) { mma_16816<T>(c, a, b0, b1); });
}
KERNEL mma_tf32(FLASHMAPS_PARAMETER Arguments x) {
  multiply(x, [](auto& c, auto& a, auto b0, auto b1) { mma_1688_tf32(c, a, b0, b1); });
}

// a: 1024 halves; b: which of them begins the row of each lane.
template <bool Transposed>
KERNEL ldmatrix(FLASHMAPS_PARAMETER Arguments x) {
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
KERNEL tile(FLASHMAPS_PARAMETER Arguments x) {
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

KERNEL shuffles(FLASHMAPS_PARAMETER Arguments x) {
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
FLASHMAPS_DEVICE void elements(const Arguments& x, Function f) {
  for (int i = thread_index(); i < x.n; i += block_size()) output(x, i, f(input<From>(x.a, i)));
}
KERNEL exp2_fast_of(FLASHMAPS_PARAMETER Arguments x) {
  elements<float>(x, [](float t) { return exp2_fast(t); });
}
KERNEL exp2_polynomial_of(FLASHMAPS_PARAMETER Arguments x) {
  elements<float>(x, [](float t) { return exp2_polynomial(t); });
}
KERNEL log2_fast_of(FLASHMAPS_PARAMETER Arguments x) {
  elements<float>(x, [](float t) { return log2_fast(t); });
}
KERNEL round_tf32_of(FLASHMAPS_PARAMETER Arguments x) {
  elements<float>(x, [](float t) { return from_bits(round_tf32(t)); });
}
template <class T>
KERNEL unpack_low(FLASHMAPS_PARAMETER Arguments x) {
  elements<std::uint32_t>(x, [](std::uint32_t bits) { return unpack<T>(bits).x; });
}
template <class T>
KERNEL unpack_high(FLASHMAPS_PARAMETER Arguments x) {
  elements<std::uint32_t>(x, [](std::uint32_t bits) { return unpack<T>(bits).y; });
}
template <class T>
KERNEL pack_both(FLASHMAPS_PARAMETER Arguments x) {
  elements<Float2>(x, [](Float2 pair) { return pack<T>(pair.x, pair.y); });
}

// Where each thread thinks that it is.
KERNEL indices(FLASHMAPS_PARAMETER Arguments x) {
  const Index3 block = block_index(), grid = grid_size();
  const int number = (block.z * grid.y + block.y) * grid.x + block.x;
  const int thread = warp_index() * 32 + lane_index();
  output(x, number * block_size() + thread_index(),
         block.z * 1000000 + block.y * 100000 + block.x * 10000 + thread);
}
KERNEL uninitialised(FLASHMAPS_PARAMETER Arguments x) {
  const Shared<float> floats = shared_memory().as<float>();
  output(x, block_index().x * block_size() + thread_index(), floats.load(thread_index()));
  sync_threads();
  floats.store(thread_index(), 1.0f);  // which the next block must not find
}

// Two stages of copies; out[thread] = what was in a[3 thread], after some partial copies.
KERNEL copies(FLASHMAPS_PARAMETER Arguments x) {
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

FLASHMAPS_DEVICE int neighbour(int step) {
  return (thread_index() + step) % block_size();
}

KERNEL barrier(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  sync_threads();
  ints().load(neighbour(33));
  sync_threads();
  ints().store(neighbour(5), 1);
}
KERNEL warp_barrier(FLASHMAPS_PARAMETER Arguments) {
  const int first = warp_index() * 32;
  ints().store(thread_index(), 1);
  sync_warp();
  ints().load(first + (lane_index() + 1) % 32);
  sync_warp();
  ints().store(first + (lane_index() + 3) % 32, 1);
}
KERNEL own_data(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index());
  ints().store(thread_index(), 2);
}
KERNEL bytes_of_a_word(FLASHMAPS_PARAMETER Arguments) {
  const Shared<char> chars = shared_memory().as<char>();
  chars.store(thread_index(), 1);
  chars.load(thread_index());
  sync_threads();
  ints().load(thread_index() / 4);
}
KERNEL many_readers(FLASHMAPS_PARAMETER Arguments) {
  if (thread_index() == 0) ints().store(0, 1);
  sync_threads();
  ints().load(0);
  sync_threads();
  if (thread_index() == 40) ints().store(0, 1);
}
KERNEL two_buffers(FLASHMAPS_PARAMETER Arguments x) {
  for (int i = 0; i < 5; ++i) {
    const int at = i % 2 * 64;
    copy_async_4(ints() + at + thread_index(), static_cast<const int*>(x.a) + thread_index());
    commit_copies();
    wait_copies<0>();
    sync_threads();  // one is enough: the other buffer is next
    ints().load(at + neighbour(7));
  }
}
KERNEL own_copy(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  ints().load(thread_index());
}
KERNEL matrix_after_warp_barrier(FLASHMAPS_PARAMETER Arguments) {
  const Shared<Half> own = halves() + 8 * thread_index();
  std::uint32_t r[4];
  own.as<Bits4>().store(0, Bits4{});
  sync_warp();
  ldmatrix_x4(r, own);
  sync_warp();
  own.as<Bits4>().store(0, Bits4{});
}

// ---- Races.

KERNEL no_barrier_in_the_warp(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index() ^ 1);
}
KERNEL no_barrier_between_warps(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  ints().load(thread_index() ^ 32);
}
KERNEL warp_barrier_between_warps(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  sync_warp();
  ints().load(thread_index() ^ 32);
}
KERNEL shuffle_for_a_barrier(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index(), 1);
  shuffle_xor(1, 1);  // brings lanes together, but promises nothing about memory
  ints().load(thread_index() ^ 1);
}
KERNEL buffer_used_again(FLASHMAPS_PARAMETER Arguments) {
  for (int i = 0; i < 2; ++i) {
    ints().store(thread_index(), i);
    sync_threads();
    ints().load(neighbour(1));
  }
}
KERNEL two_writers(FLASHMAPS_PARAMETER Arguments) {
  ints().store(thread_index() / 2, 1);
}
KERNEL part_of_a_word(FLASHMAPS_PARAMETER Arguments) {
  if (thread_index() == 1) shared_memory().as<char>().store(6, 1);
  if (thread_index() == 2) ints().load(1);
}
KERNEL first_of_many_readers(FLASHMAPS_PARAMETER Arguments) {
  if (thread_index() != 63) ints().load(0);
  if (thread_index() == 63) ints().store(0, 1);
}
KERNEL reader_of_another_warp(FLASHMAPS_PARAMETER Arguments) {
  if (thread_index() == 40) ints().load(0);
  if (warp_index() == 0) {
    ints().load(0);
    sync_warp();
    if (thread_index() == 31) ints().store(0, 1);
  }
}
KERNEL matrix_without_barrier(FLASHMAPS_PARAMETER Arguments) {
  std::uint32_t r[4];
  const Shared<Half> own = halves() + 8 * thread_index();
  own.as<Bits4>().store(0, Bits4{});
  ldmatrix_x4(r, own);
}
KERNEL store_after_matrix(FLASHMAPS_PARAMETER Arguments) {
  std::uint32_t r[4];
  const Shared<Half> own = halves() + 8 * thread_index();
  ldmatrix_x4(r, own);
  own.as<Bits4>().store(0, Bits4{});
}
KERNEL copy_not_waited_for(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  ints().load(thread_index());
  wait_copies<0>();
}
KERNEL barrier_without_wait(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  sync_threads();
  ints().load(neighbour(1));
  wait_copies<0>();
}
KERNEL copy_not_committed(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  wait_copies<0>();
  sync_threads();
  ints().load(thread_index());
}
KERNEL wait_without_barrier(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  ints().load(neighbour(1));
}
KERNEL waits_for_the_group_before(FLASHMAPS_PARAMETER Arguments x) {
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
KERNEL copy_over_what_is_read(FLASHMAPS_PARAMETER Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  for (int i = 0; i < 2; ++i) {
    copy_async_4(ints() + thread_index(), from);
    commit_copies();
    wait_copies<0>();
    sync_threads();
    ints().load(neighbour(1));
  }
}
KERNEL two_copies_to_one_place(FLASHMAPS_PARAMETER Arguments x) {
  const int* const from = static_cast<const int*>(x.a) + thread_index();
  copy_async_4(ints() + thread_index(), from);
  copy_async_4(ints() + thread_index(), from);
  commit_copies();
  wait_copies<0>();
}

// ---- Other mistakes.

KERNEL some_leave_before_the_barrier(FLASHMAPS_PARAMETER Arguments) {
  if (thread_index() >= 40) return;
  sync_threads();
}
KERNEL two_barriers(FLASHMAPS_PARAMETER Arguments) {
  if (warp_index() == 0) {
    sync_threads();
  } else {
    sync_threads();
  }
}
KERNEL barrier_in_a_branch(FLASHMAPS_PARAMETER Arguments) {
  if (lane_index() < 16) sync_threads();
  shuffle_xor(1, 1);
}
KERNEL lanes_leave_before_a_shuffle(FLASHMAPS_PARAMETER Arguments) {
  if (lane_index() == 7) return;
  shuffle_xor(1, 1);
}
KERNEL lanes_at_two_instructions(FLASHMAPS_PARAMETER Arguments) {
  std::uint32_t r[4];
  if (lane_index() < 31) {
    ldmatrix_x4(r, halves());
  } else {
    shuffle(1, 0);
  }
}
KERNEL copies_left_behind(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_4(ints() + thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
}
KERNEL beyond_shared_memory(FLASHMAPS_PARAMETER Arguments) {
  ints().store(4096 + thread_index(), 1);
}
KERNEL before_shared_memory(FLASHMAPS_PARAMETER Arguments) {
  ints().load(thread_index() - 3);
}
KERNEL unaligned_shared_memory(FLASHMAPS_PARAMETER Arguments) {
  shared_memory().from_byte<int>(2).load(thread_index());
}
KERNEL unaligned_row(FLASHMAPS_PARAMETER Arguments) {
  std::uint32_t r[4];
  ldmatrix_x4(r, halves() + 4 * thread_index());
}
KERNEL unaligned_copy(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_16(ints() + 4 * thread_index(), static_cast<const int*>(x.a) + thread_index());
  commit_copies();
  wait_copies<0>();
  sync_threads();
}
KERNEL beyond_global_memory(FLASHMAPS_PARAMETER Arguments x) {
  output(x, 64 + thread_index(), 1);
}
KERNEL copy_from_beyond_global_memory(FLASHMAPS_PARAMETER Arguments x) {
  copy_async_16(ints() + 4 * thread_index(), static_cast<const int*>(x.a) + 4 * thread_index(), 12);
  commit_copies();
  wait_copies<0>();
  sync_threads();
}
KERNEL two_threads_write_a_number(FLASHMAPS_PARAMETER Arguments x) {
  output(x, thread_index() % 63, 1);
}
KERNEL two_blocks_write_a_number(FLASHMAPS_PARAMETER Arguments x) {
  output(x, (thread_index() + 63 * block_index().x) % 64, 1);
}
KERNEL what_another_thread_wrote(FLASHMAPS_PARAMETER Arguments x) {
  output(x, thread_index(), 1);
  sync_threads();
  input<int>(x.out, thread_index() ^ 1);
}
KERNEL lane_that_is_not_there(FLASHMAPS_PARAMETER Arguments) {
  shuffle(1, 32 + lane_index());
}

// ---- What the planted errors are planted in: each of its lines matters.

KERNEL victim(FLASHMAPS_PARAMETER Arguments x) {
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
#define NAMED(name) {#name, name}
    NAMED(mma<Half>),
    NAMED(mma<BFloat>),
    NAMED(mma_tf32),
    NAMED(ldmatrix<false>),
    NAMED(ldmatrix<true>),
    {"tile<Half, false>", tile<Half, false>},
    {"tile<Half, true>", tile<Half, true>},
    {"tile<BFloat, false>", tile<BFloat, false>},
    {"tile<BFloat, true>", tile<BFloat, true>},
    NAMED(shuffles),
    NAMED(exp2_fast_of),
    NAMED(exp2_polynomial_of),
    NAMED(log2_fast_of),
    NAMED(round_tf32_of),
    NAMED(unpack_low<Half>),
    NAMED(unpack_low<BFloat>),
    NAMED(unpack_high<Half>),
    NAMED(unpack_high<BFloat>),
    NAMED(pack_both<Half>),
    NAMED(pack_both<BFloat>),
    NAMED(indices),
    NAMED(uninitialised),
    NAMED(copies),
    NAMED(barrier),
    NAMED(warp_barrier),
    NAMED(own_data),
    NAMED(bytes_of_a_word),
    NAMED(many_readers),
    NAMED(two_buffers),
    NAMED(own_copy),
    NAMED(matrix_after_warp_barrier),
    NAMED(no_barrier_in_the_warp),
    NAMED(no_barrier_between_warps),
    NAMED(warp_barrier_between_warps),
    NAMED(shuffle_for_a_barrier),
    NAMED(buffer_used_again),
    NAMED(two_writers),
    NAMED(part_of_a_word),
    NAMED(first_of_many_readers),
    NAMED(reader_of_another_warp),
    NAMED(matrix_without_barrier),
    NAMED(store_after_matrix),
    NAMED(copy_not_waited_for),
    NAMED(barrier_without_wait),
    NAMED(copy_not_committed),
    NAMED(wait_without_barrier),
    NAMED(waits_for_the_group_before),
    NAMED(copy_over_what_is_read),
    NAMED(two_copies_to_one_place),
    NAMED(some_leave_before_the_barrier),
    NAMED(two_barriers),
    NAMED(barrier_in_a_branch),
    NAMED(lanes_leave_before_a_shuffle),
    NAMED(lanes_at_two_instructions),
    NAMED(copies_left_behind),
    NAMED(beyond_shared_memory),
    NAMED(before_shared_memory),
    NAMED(unaligned_shared_memory),
    NAMED(unaligned_row),
    NAMED(unaligned_copy),
    NAMED(beyond_global_memory),
    NAMED(copy_from_beyond_global_memory),
    NAMED(two_threads_write_a_number),
    NAMED(two_blocks_write_a_number),
    NAMED(what_another_thread_wrote),
    NAMED(lane_that_is_not_there),
    NAMED(victim),
#undef NAMED
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

#if !defined(__CUDACC__)

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

// The sites called since the last time, one a line: primitive, file, line, calls, conflicts.
EXPORTED const char* take_sites() {
  static std::string text;
  text.clear();
  for (const emulation::Site& site : emulation::take_sites()) {
    text += site.primitive + " " + site.file + " " + std::to_string(site.line) + " " +
            std::to_string(site.calls) + " " + std::to_string(site.conflicts) + "\n";
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

#endif
