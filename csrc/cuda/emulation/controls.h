// What tests may set before emulated kernels run, and ask afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulation/races.h"
#include "cuda/types.h"

namespace flashmaps::cuda::emulation {

// What limits(device) answers.
void set_limits(const Limits& limits);

// Memory that kernels may read and write. While there is any, all other memory is out of bounds.
struct Memory {
  std::uintptr_t address = 0;
  std::int64_t bytes = 0;
  std::string name;
};
void set_memory(std::vector<Memory> memory);

// A line at which kernels called a primitive that can be spoiled.
struct Site {
  std::string primitive;  // a key of the table below
  std::string file;       // without folders
  int line = 0;
  std::int64_t calls = 0;      // of warps, or of threads where a primitive is not a warp's
  std::int64_t conflicts = 0;  // for how many turns ldmatrix had to wait for a bank
};
// Those called since the last time that they were asked for.
std::vector<Site> take_sites();

// An error planted at a line, to see whether it is found. One at a time; an empty name for none.
//
//   sync_threads, sync_warp           do nothing
//   wait_copies                       does not wait
//   copy_async_16, copy_async_4       leave NaN where zeros are to be filled in
//   ldmatrix_x4, ldmatrix_x4_trans    exchange the second and the third matrix
//   mma_16816, mma_1688_tf32          take b1 for b0 and b0 for b1
//   shuffle_xor, shuffle              return the lane's own number
void plant(const std::string& primitive, const std::string& file, int line);

}  // namespace flashmaps::cuda::emulation
