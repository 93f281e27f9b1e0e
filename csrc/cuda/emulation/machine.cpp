#include "cuda/emulation/machine.h"

#include <bit>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "cuda/emulation/controls.h"
#include "cuda/emulation/fiber.h"

namespace flashmaps::cuda::emulation {

Running running;

namespace {

constexpr const char* kNames[] = {
    "sync_threads",  "sync_warp",   "wait_copies",       "copy_async_16",
    "copy_async_4",  "ldmatrix_x4", "ldmatrix_x4_trans", "mma_16816",
    "mma_1688_tf32", "shuffle_xor", "shuffle",           "any_lane",
};
const char* name_of(Primitive primitive) {
  return kNames[int(primitive)];
}

// An asynchronous copy that has begun and not landed.
struct Copy {
  int to = 0, size = 0, bytes = 0;
  const void* from = nullptr;
  Here here;
  int group = 0;
  bool spoiled = false;
};

struct Thread {
  Context context;
  bool ended = false;
  Primitive waits_for = {};  // if it waits
  Here here;
  std::vector<Copy> copies;  // in the order of their groups
  int groups = 0;            // committed so far
};

struct Warp {
  std::uint32_t ready = 0;    // lanes that can go on
  std::uint32_t arrived = 0;  // at the meeting that is going on
  Primitive primitive = {};
  Here here;
  void* arguments[kWarp] = {};
};

struct Machine {
  const std::function<void()>* kernel = nullptr;
  int warps = 0;
  int alive = 0;    // threads that have not ended
  int arrived = 0;  // of them, those at the barrier
  Here barrier;
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / kWarp];
  Context host;
  std::exception_ptr error;

  Stacks stacks;
  std::vector<std::byte> shared;
  Races races;
  // By which thread of which block each four bytes of global memory have been written.
  std::unordered_map<std::uintptr_t, std::pair<std::int64_t, int>> writers;
};
Machine machine;
std::mutex one_launch;

Limits the_limits = {4, 163 * 1024, 80};
std::vector<Memory> the_memory;

struct Line {
  Primitive primitive;
  const char* file;
  unsigned line;
  auto operator<=>(const Line&) const = default;
};
struct Count {
  std::int64_t calls = 0, conflicts = 0;
};
std::map<Line, Count> counts;
Site planted;

// Notes the call; is an error planted here?
bool is_spoiled(Primitive primitive, Here here) {
  ++counts[{primitive, here.file_name(), here.line()}].calls;
  return !planted.primitive.empty() && planted.line == int(here.line()) &&
         planted.primitive == name_of(primitive) &&
         place(here) == planted.file + ":" + std::to_string(planted.line);
}

std::string who() {
  return "thread " + std::to_string(running.thread);
}
std::string at(Primitive primitive, Here here) {
  return std::string(name_of(primitive)) + " (" + place(here) + ")";
}

Thread& self() {
  return machine.thread[running.thread];
}
Warp& own_warp() {
  return machine.warp[running.thread / kWarp];
}
std::uint32_t own_bit() {
  return 1u << (running.thread % kWarp);
}

// What everybody waits for, when nobody can go on.
[[noreturn]] void report_standstill() {
  const auto state = [](int i) {
    const Thread& thread = machine.thread[i];
    return thread.ended ? std::string("ended") : "wait at " + at(thread.waits_for, thread.here);
  };
  std::string text = "nobody can go on: ";
  for (int i = 0; i < running.threads;) {
    int end = i + 1;
    const std::string here = state(i);
    while (end < running.threads && state(end) == here) ++end;
    text += (i > 0 ? "; threads " : "threads ") + std::to_string(i) + " to " +
            std::to_string(end - 1) + " " + here;
    i = end;
  }
  throw std::runtime_error(text);
}

// The next thread that can go on: of this warp if there is one, so that meetings are short.
int next_ready() {
  const int lane = running.thread % kWarp;
  const int first = running.thread / kWarp;
  if (const std::uint32_t ready = std::rotr(machine.warp[first].ready, lane); ready != 0) {
    return first * kWarp + (lane + std::countr_zero(ready)) % kWarp;
  }
  for (int step = 1; step < machine.warps; ++step) {
    const int w = (first + step) % machine.warps;
    if (const std::uint32_t ready = machine.warp[w].ready; ready != 0) {
      return w * kWarp + std::countr_zero(ready);
    }
  }
  report_standstill();
}

void go_on_with(int next) {
  Context& here = self().context;
  running.thread = next;
  switch_to(here, machine.thread[next].context);
}

// Lets others go on until one of them makes this thread ready again.
void wait_at(Primitive primitive, Here here) {
  Thread& thread = self();
  thread.waits_for = primitive;
  thread.here = here;
  own_warp().ready &= ~own_bit();
  go_on_with(next_ready());
}

void land(const Copy& copy) {
  std::byte* const to = machine.shared.data() + copy.to;
  if (copy.bytes > 0) std::memcpy(to, copy.from, std::size_t(copy.bytes));
  if (!copy.spoiled) std::memset(to + copy.bytes, 0, std::size_t(copy.size - copy.bytes));
  machine.races.end_copy(running.thread, copy.to, copy.size, copy.here);
}

// A fiber's whole life. It does not return: there is nothing below it on its stack.
void run_thread() {
  try {
    (*machine.kernel)();
    if (!self().copies.empty()) {
      throw std::runtime_error(who() + " ends without having waited for its copy at " +
                               place(self().copies.front().here));
    }
    self().ended = true;
    own_warp().ready &= ~own_bit();
    if (--machine.alive > 0) go_on_with(next_ready());
  } catch (...) {
    machine.error = std::current_exception();
  }
  switch_to(self().context, machine.host);
}

void run_block() {
  std::memset(machine.shared.data(), 0xff, machine.shared.size());  // NaN in every format
  machine.races.sync_threads();
  machine.alive = running.threads;
  machine.arrived = 0;
  machine.error = nullptr;
  for (int i = 0; i < running.threads; ++i) {
    Thread& thread = machine.thread[i];
    thread.ended = false;
    thread.copies.clear();
    thread.groups = 0;
    machine.stacks.prepare(i, thread.context, run_thread);
  }
  for (int w = 0; w < machine.warps; ++w) {
    machine.warp[w].ready = ~0u;
    machine.warp[w].arrived = 0;
  }
  running.thread = 0;
  switch_to(machine.host, machine.thread[0].context);
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
}

std::byte* check_shared(int offset, int bytes, const char* does, Here here) {
  if (offset >= 0 && offset % bytes == 0 && offset + bytes <= int(machine.shared.size())) {
    return machine.shared.data() + offset;
  }
  throw std::runtime_error(who() + " " + does + " " + std::to_string(bytes) + " bytes at byte " +
                           std::to_string(offset) + " of shared memory at " + place(here) +
                           (offset % bytes != 0
                                ? ", which must be aligned to their number"
                                : "; there are " + std::to_string(machine.shared.size())));
}

// Calls `complain` with where it is if some byte is not within the memory that was declared.
template <class Complain>
void check_bounds(std::uintptr_t begin, int bytes, Complain complain) {
  const Memory* nearest = nullptr;
  std::int64_t distance = 0;
  for (const Memory& memory : the_memory) {
    const std::int64_t offset = std::int64_t(begin - memory.address);
    if (offset >= 0 && offset + bytes <= memory.bytes) return;
    const std::int64_t beyond = offset < 0 ? -offset : offset + bytes - memory.bytes;
    if (nearest == nullptr || beyond < distance) {
      nearest = &memory;
      distance = beyond;
    }
  }
  if (nearest == nullptr) return;
  complain("at byte " + std::to_string(std::int64_t(begin - nearest->address)) + " of " +
           nearest->name + ", which has " + std::to_string(nearest->bytes));
}

}  // namespace

void set_limits(const Limits& limits) {
  the_limits = limits;
}
Limits current_limits() {
  return the_limits;
}

void set_memory(std::vector<Memory> memory) {
  the_memory = std::move(memory);
}

std::vector<Site> take_sites() {
  std::vector<Site> sites;
  for (const auto& [line, count] : std::exchange(counts, {})) {
    const std::string where = place(line.file, line.line);
    sites.push_back({name_of(line.primitive), where.substr(0, where.rfind(':')), int(line.line),
                     count.calls, count.conflicts});
  }
  return sites;
}

void plant(const std::string& primitive, const std::string& file, int line) {
  bool known = primitive.empty();
  for (const char* name : kNames) known = known || primitive == name;
  if (!known) throw std::invalid_argument("plant: no primitive is called " + primitive);
  planted = {primitive, file, line, 0, 0};
}

void run(const char* name, Index3 grid, int threads, int shared_bytes,
         const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::string launch = std::string("emulated kernel ") + name;
  const auto demand = [&](bool condition, const std::string& what) {
    if (!condition) throw std::runtime_error(launch + ": " + what);
  };
  demand(threads > 0 && threads <= kMaxThreads && threads % kWarp == 0,
         "a block of " + std::to_string(threads) + " threads; it takes whole warps, at most 1024");
  demand(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y <= 65535 && grid.z <= 65535,
         "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
             std::to_string(grid.z) + " blocks; each must be at least 1, y and z at most 65535");
  demand(shared_bytes >= 0 && shared_bytes <= the_limits.shared_bytes,
         std::to_string(shared_bytes) + " bytes of shared memory; the device has " +
             std::to_string(the_limits.shared_bytes));

  machine.kernel = &kernel;
  machine.warps = threads / kWarp;
  machine.stacks.reserve(threads);
  machine.shared.resize(std::size_t(shared_bytes));
  machine.races.begin(shared_bytes);
  machine.writers.clear();
  running.threads = threads;
  running.grid = grid;
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; ++x) {
        running.block = {x, y, z};
        try {
          run_block();
        } catch (const std::exception& error) {
          throw std::runtime_error(launch + ", block (" + std::to_string(x) + ", " +
                                   std::to_string(y) + ", " + std::to_string(z) +
                                   "): " + error.what());
        }
      }
    }
  }
}

void sync_threads(Here here) {
  if (is_spoiled(Primitive::SyncThreads, here)) return;
  if (machine.arrived == 0) {
    machine.barrier = here;
  } else if (machine.barrier.line() != here.line()) {
    throw std::runtime_error("threads wait at different barriers: " + who() + " at " +
                             at(Primitive::SyncThreads, here) + ", others at " +
                             at(Primitive::SyncThreads, machine.barrier));
  }
  if (++machine.arrived < running.threads) {
    wait_at(Primitive::SyncThreads, here);
    return;
  }
  machine.arrived = 0;
  machine.races.sync_threads();
  for (int w = 0; w < machine.warps; ++w) machine.warp[w].ready = ~0u;
}

void meet(Primitive primitive, Here here, void* argument,
          void (*execute)(Lanes arguments, bool spoiled, Here here)) {
  Warp& warp = own_warp();
  if (warp.arrived == 0) {
    warp.primitive = primitive;
    warp.here = here;
  } else if (warp.primitive != primitive || warp.here.line() != here.line()) {
    const int other = running.thread / kWarp * kWarp + std::countr_zero(warp.arrived);
    throw std::runtime_error("lanes of a warp diverge: " + who() + " is at " + at(primitive, here) +
                             ", thread " + std::to_string(other) + " at " +
                             at(warp.primitive, warp.here));
  }
  warp.arguments[running.thread % kWarp] = argument;
  warp.arrived |= own_bit();
  if (warp.arrived != ~0u) {
    wait_at(primitive, here);
    return;
  }
  warp.arrived = 0;
  warp.ready = ~0u;
  execute(warp.arguments, is_spoiled(primitive, here), here);
}

void note_conflicts(Primitive primitive, Here here, int turns) {
  counts[{primitive, here.file_name(), here.line()}].conflicts += turns;
}

void sync_warp_here() {
  machine.races.sync_warp(running.thread / kWarp);
}

const std::byte* read_shared(int offset, int bytes, Here here) {
  const std::byte* const from = check_shared(offset, bytes, "reads", here);
  machine.races.read(running.thread, offset, bytes, here);
  return from;
}

std::byte* write_shared(int offset, int bytes, Here here) {
  std::byte* const to = check_shared(offset, bytes, "writes", here);
  machine.races.write(running.thread, offset, bytes, here);
  return to;
}

const std::byte* read_shared_as_warp(int offset, int bytes, Here here) {
  const std::byte* const from = check_shared(offset, bytes, "reads", here);
  machine.races.read(whole_warp(running.thread / kWarp), offset, bytes, here);
  return from;
}

void copy_async(int to, const void* from, int size, int bytes, Here here) {
  check_shared(to, size, "copies", here);
  if (bytes < 0 || bytes > size || reinterpret_cast<std::uintptr_t>(from) % std::uintptr_t(size)) {
    throw std::runtime_error(who() + " copies " + std::to_string(bytes) + " of " +
                             std::to_string(size) + " bytes asynchronously at " + place(here) +
                             ", from an address that must be aligned to " + std::to_string(size));
  }
  if (bytes > 0) check_global(from, bytes, false, here);
  machine.races.begin_copy(running.thread, to, size, here);
  std::memset(machine.shared.data() + to, 0xff, std::size_t(size));  // until it lands
  const Primitive primitive = size == 16 ? Primitive::CopyAsync16 : Primitive::CopyAsync4;
  self().copies.push_back(
      {to, size, bytes, from, here, self().groups, is_spoiled(primitive, here)});
}

void commit_copies() {
  ++self().groups;
}

void wait_copies(int groups, Here here) {
  if (is_spoiled(Primitive::WaitCopies, here)) return;
  std::vector<Copy>& copies = self().copies;
  std::size_t landed = 0;
  while (landed < copies.size() && copies[landed].group < self().groups - groups) {
    land(copies[landed++]);
  }
  copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(landed));
}

void check_global(const void* address, int bytes, bool writes, Here here) {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(address);
  const auto complain = [&](const std::string& why) {
    throw std::runtime_error(who() + (writes ? " writes " : " reads ") + std::to_string(bytes) +
                             " bytes of global memory at " + place(here) + ", " + why);
  };
  if (std::has_single_bit(unsigned(bytes)) && begin % std::uintptr_t(bytes) != 0) {
    complain("which must be aligned to their number");
  }
  check_bounds(begin, bytes, complain);
  if (!writes && machine.writers.empty()) return;
  const auto [x, y, z] = running.block;
  const std::int64_t block = (std::int64_t(z) * running.grid.y + y) * running.grid.x + x;
  const std::pair<std::int64_t, int> own{block, running.thread};
  for (std::uintptr_t word = begin / 4; word <= (begin + std::uintptr_t(bytes) - 1) / 4; ++word) {
    const auto found = machine.writers.find(word);
    if (found != machine.writers.end() && found->second != own) {
      complain("which thread " + std::to_string(found->second.second) + " of block " +
               std::to_string(found->second.first) + " has written; this is block " +
               std::to_string(block));
    }
    if (writes && bytes >= 4) machine.writers.emplace(word, own);
  }
}

}  // namespace flashmaps::cuda::emulation
