// What a warp's lanes do together, by the fragment layouts that PTX documents.
#pragma once

#include "cuda/emulation/machine.h"

namespace flashmaps::cuda::emulation {

// What each lane brings to a meeting, and takes from it.
struct Exchange {
  std::uint32_t value = 0;
  int lane = 0;  // whose value it wants
  std::uint32_t result = 0;
};
struct Matrices {
  int row = 0;  // byte of shared memory
  std::uint32_t* r = nullptr;
};
struct Product {
  float* c = nullptr;
  const std::uint32_t* a = nullptr;
  std::uint32_t b0 = 0, b1 = 0;
};

void sync_warp(Lanes lanes, bool spoiled, Here here);
void exchange(Lanes lanes, bool spoiled, Here here);
void any(Lanes lanes, bool spoiled, Here here);
template <bool Transposed>
void ldmatrix(Lanes lanes, bool spoiled, Here here);
template <class T>  // Half, BFloat
void mma_16816(Lanes lanes, bool spoiled, Here here);
void mma_1688_tf32(Lanes lanes, bool spoiled, Here here);

}  // namespace flashmaps::cuda::emulation
