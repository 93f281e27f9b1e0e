// Who read and wrote which byte of shared memory, and whether a barrier stands between.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace flashmaps::cuda::emulation {

// A line of a kernel.
using Here = std::source_location;
std::string place(const char* file, unsigned line);
inline std::string place(Here here) {
  return place(here.file_name(), here.line());
}

// Who reads or writes: a thread, or a warp as a whole.
using Actor = int;
constexpr int kMaxThreads = 1024;
constexpr Actor whole_warp(int warp) {
  return kMaxThreads + warp;
}
constexpr int warp_of(Actor actor) {
  return actor < kMaxThreads ? actor / 32 : actor - kMaxThreads;
}

// Two accesses to a byte, by two actors, one of them a write, are a race unless one is ordered
// before the other: by a barrier of the block between them or, within a warp, by one of that warp.
// A warp as a whole is another actor than each of its lanes.
//
// What is found does not depend on the order in which threads happened to run: it is what the
// barriers leave open.
class Races {
 public:
  // A launch begins: nothing has been read or written.
  void begin(int shared_bytes);

  void sync_threads();
  void sync_warp(int warp);

  // These throw where there is a race. An asynchronous copy, of whole words, is a write that
  // conflicts with every other access from `begin_copy` to `end_copy`, even of its own thread; from
  // then on it counts as written at that moment.
  void read(Actor actor, int offset, int bytes, Here here);
  void write(Actor actor, int offset, int bytes, Here here);
  void begin_copy(Actor actor, int offset, int bytes, Here here);
  void end_copy(Actor actor, int offset, int bytes, Here here);

 private:
  // An access, packed, as there are four for each word. Time 0 is none.
  struct Stamp {
    std::uint32_t time = 0;
    std::uint32_t actor : 11 = 0;
    std::uint32_t file : 5 = 0;
    std::uint32_t line : 15 = 0;
    std::uint32_t copying : 1 = 0;
  };
  // The last write, and of the reads since then the last, another of the same warp since that
  // warp's barrier, and one of another warp since the block's. Whatever write conflicts with some
  // read conflicts with one of these three.
  struct Cell {
    Stamp write, read, beside, elsewhere;
  };

  Stamp stamp(Actor actor, Here here);
  template <class Touch>
  void for_cells(int offset, int bytes, Touch touch);
  bool conflict(const Stamp& before, const Stamp& now) const;
  void touch_read(Cell& cell, const Stamp& now, int offset) const;
  void touch_write(Cell& cell, const Stamp& now, int offset) const;
  [[noreturn]] void report(const Stamp& before, const char* did, const Stamp& now, const char* does,
                           int offset) const;

  // Time passes at barriers. An access has the time of its warp's last one.
  std::uint32_t clock_ = 1;
  std::uint32_t block_time_ = 1;  // of the block's last barrier
  std::uint32_t warp_time_[kMaxThreads / 32] = {};

  // One cell for each word until a part of it is accessed, then one for each of its bytes.
  std::vector<Cell> words_;
  std::vector<Cell> bytes_;
  std::vector<std::uint8_t> split_;

  std::vector<const char*> files_;  // a stamp has an index
};

}  // namespace flashmaps::cuda::emulation
