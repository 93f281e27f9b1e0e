#include "cuda/emulation/warp.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda/primitives.h"

namespace flashmaps::cuda::emulation {
namespace {

template <class Argument>
Argument& of_lane(Lanes lanes, int lane) {
  return *static_cast<Argument*>(lanes[lane]);
}

// c[16x8] += a[16xK] b[Kx8], spread over the lanes. a and b are already floats, and their products
// exact where they come from 16 bits; in what order hardware adds them is not documented.
template <int K>
void multiply(Lanes lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const to = of_lane<Product>(lanes, lane).c;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) to[i] += c[g + i / 2 * 8][2 * t + i % 2];
  }
}

}  // namespace

void sync_warp(Lanes, bool spoiled, Here) {
  if (!spoiled) sync_warp_here();
}

void exchange(Lanes lanes, bool spoiled, Here here) {
  for (int lane = 0; lane < kWarp; ++lane) {
    Exchange& own = of_lane<Exchange>(lanes, lane);
    if (own.lane < 0 || own.lane >= kWarp) {
      throw std::runtime_error("lane " + std::to_string(lane) + " asks for the value of lane " +
                               std::to_string(own.lane) + " at " + place(here));
    }
    own.result = of_lane<Exchange>(lanes, spoiled ? lane : own.lane).value;
  }
}

void any(Lanes lanes, bool, Here) {
  std::uint32_t all = 0;
  for (int lane = 0; lane < kWarp; ++lane) all |= of_lane<Exchange>(lanes, lane).value;
  for (int lane = 0; lane < kWarp; ++lane) of_lane<Exchange>(lanes, lane).result = all;
}

// Every row goes to several lanes, so it counts as read by the warp, not by the lane that gave its
// address.
template <bool Transposed>
void ldmatrix(Lanes lanes, bool spoiled, Here here) {
  int turns = 0;  // more than the four that it takes
  for (int m = 0; m < 4; ++m) {
    std::uint16_t matrix[8][8];
    int from[8];
    int of_banks[8] = {};  // how many rows want each group of four banks
    for (int row = 0; row < 8; ++row) {
      from[row] = of_lane<Matrices>(lanes, 8 * m + row).row;
      std::memcpy(matrix[row], read_shared_as_warp(from[row], 16, here), 16);
      if (std::find(from, from + row, from[row]) == from + row) ++of_banks[from[row] / 16 % 8];
    }
    turns += *std::max_element(of_banks, of_banks + 8) - 1;
    const int to = spoiled && (m == 1 || m == 2) ? 3 - m : m;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t low = Transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const std::uint32_t high = Transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      of_lane<Matrices>(lanes, lane).r[to] = low | high << 16;
    }
  }
  note_conflicts(Transposed ? Primitive::LdmatrixTrans : Primitive::Ldmatrix, here, turns);
}
template void ldmatrix<false>(Lanes, bool, Here);
template void ldmatrix<true>(Lanes, bool, Here);

template <class T>
void mma_16816(Lanes lanes, bool spoiled, Here) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& own = of_lane<Product>(lanes, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const Float2 pair = unpack<T>(own.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = pair.x;
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const Float2 pair = unpack<T>((i == 0) != spoiled ? own.b0 : own.b1);
      b[2 * t + i * 8][g] = pair.x;
      b[2 * t + i * 8 + 1][g] = pair.y;
    }
  }
  multiply<16>(lanes, a, b);
}
template void mma_16816<Half>(Lanes, bool, Here);
template void mma_16816<BFloat>(Lanes, bool, Here);

void mma_1688_tf32(Lanes lanes, bool spoiled, Here) {
  // The lowest 13 bits of each number are not looked at.
  const auto number = [](std::uint32_t bits) { return from_bits(bits & 0xffffe000u); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& own = of_lane<Product>(lanes, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = number(own.a[i]);
    b[t][g] = number(spoiled ? own.b1 : own.b0);
    b[t + 4][g] = number(spoiled ? own.b0 : own.b1);
  }
  multiply<8>(lanes, a, b);
}

}  // namespace flashmaps::cuda::emulation
