// What both implementations of cuda/primitives.h speak of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmaps::cuda {

constexpr int kWarp = 32;

struct Half {  // IEEE binary16
  std::uint16_t bits;
};
struct BFloat {  // the upper half of a float
  std::uint16_t bits;
};
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(16) Bits4 {
  std::uint32_t x, y, z, w;
};
struct Index3 {
  int x = 0, y = 0, z = 0;
};

// Where a launch goes: torch's current stream, and the device that it belongs to.
struct Stream {
  std::uintptr_t handle = 0;
  int device = 0;
};

// What a device has room for.
struct Limits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // that one block may ask for
  int architecture = 0;  // 80, 89, 90, 100
};

}  // namespace flashmaps::cuda
