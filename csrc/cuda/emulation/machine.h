// The emulated machine: one block at a time, its threads as fibers of one thread of the host.
//
// A thread runs until it comes to something that others must take part in, and goes on when they
// have. So nothing runs at the same time as anything else, results do not depend on chance, and
// where nobody can go on, somebody waits for what will not come: that is an error, not a hang.
#pragma once

#include <functional>

#include "cuda/emulation/races.h"
#include "cuda/types.h"

namespace flashmaps::cuda::emulation {

// What can be waited for or spoiled; the order is that of `names` in machine.cpp.
enum class Primitive {
  SyncThreads,
  SyncWarp,
  WaitCopies,
  CopyAsync16,
  CopyAsync4,
  Ldmatrix,
  LdmatrixTrans,
  Mma16816,
  Mma1688,
  ShuffleXor,
  Shuffle,
  AnyLane,
};

// The thread that is running, of which block of what launch.
struct Running {
  int thread = 0;
  int threads = 0;
  Index3 block, grid;
};
extern Running running;

Limits current_limits();

// Runs `kernel` once for each thread of each block. Throws what went wrong, with where.
void run(const char* name, Index3 grid, int threads, int shared_bytes,
         const std::function<void()>& kernel);

void sync_threads(Here here);

// A meeting of a warp's lanes. The last one to come calls `execute` with what each of them brought;
// `spoiled` if an error is planted here.
using Lanes = void* const (&)[kWarp];
void meet(Primitive primitive, Here here, void* argument,
          void (*execute)(Lanes arguments, bool spoiled, Here here));

// Shared memory, after all checks. `bytes` is also the alignment.
const std::byte* read_shared(int offset, int bytes, Here here);
std::byte* write_shared(int offset, int bytes, Here here);
const std::byte* read_shared_as_warp(int offset, int bytes, Here here);  // within a meeting
void sync_warp_here();                                                   // within a meeting
void note_conflicts(Primitive primitive, Here here, int turns);

void copy_async(int to, const void* from, int size, int bytes, Here here);
void commit_copies();
void wait_copies(int groups, Here here);

// Global memory: aligned to `bytes`, within bounds, and, in one launch, written and then read by
// one thread only, as nothing orders what others do.
void check_global(const void* address, int bytes, bool writes, Here here);

}  // namespace flashmaps::cuda::emulation
