// Fibers: many stacks in one thread of the host, and the jump from one to another.
#pragma once

#include <cstddef>
#include <memory>

// A few instructions where they are known; elsewhere POSIX, which asks the kernel for the signal
// mask at every jump and takes twenty times as long.
#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(FLASHMAPS_UCONTEXT)
#define FLASHMAPS_OWN_SWITCH 1
#else
#define FLASHMAPS_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace flashmaps::cuda::emulation {

// Where a fiber goes on.
struct Context {
#if FLASHMAPS_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

// Memory for stacks, each with a page below it that nothing may touch.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  void reserve(int count);

  // From here on `context` begins `entry` on stack i. `entry` must not return.
  void prepare(int i, Context& context, void (*entry)()) const;

 private:
  std::byte* memory_ = nullptr;
  int count_ = 0;
};

// Goes on at `to`; returns when something goes on at `from`.
#if FLASHMAPS_OWN_SWITCH
extern "C" void flashmaps_switch_stacks(void** from, void* to) asm("flashmaps_switch_stacks");
inline void switch_to(Context& from, const Context& to) {
  flashmaps_switch_stacks(&from.stack_pointer, to.stack_pointer);
}
#else
inline void switch_to(Context& from, const Context& to) {
  swapcontext(&from.state, &to.state);
}
#endif

}  // namespace flashmaps::cuda::emulation
