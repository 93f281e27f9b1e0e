#include "cuda/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// Saves the registers that a function must keep, swaps the stacks, and restores those of the other.
#if FLASHMAPS_OWN_SWITCH && defined(__x86_64__)
asm(R"(
.text
.globl flashmaps_switch_stacks
flashmaps_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif FLASHMAPS_OWN_SWITCH
asm(R"(
.text
.globl flashmaps_switch_stacks
flashmaps_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#endif

namespace flashmaps::cuda::emulation {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr std::size_t kGuard = 64 * 1024;  // a whole page, however large pages are
constexpr std::size_t kStride = kStack + kGuard;

}  // namespace

Stacks::~Stacks() {
  if (memory_ != nullptr) munmap(memory_, std::size_t(count_) * kStride);
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (memory_ != nullptr) munmap(memory_, std::size_t(count_) * kStride);
  memory_ = nullptr;
  count_ = 0;
  void* memory = mmap(nullptr, std::size_t(count) * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * kStride, kGuard, PROT_NONE);
}

void Stacks::prepare(int i, Context& context, void (*entry)()) const {
  std::byte* const bottom = memory_ + std::size_t(i) * kStride + kGuard;
  // Stacks that began at the same place of their pages would fight for the same lines of the cache.
  const std::size_t size = kStack - std::size_t(i % 64) * 192;
#if FLASHMAPS_OWN_SWITCH
  std::uint64_t* top = reinterpret_cast<std::uint64_t*>(bottom + size);  // 16-byte aligned
#if defined(__x86_64__)
  *--top = 0;  // where a caller's address would be
  *--top = reinterpret_cast<std::uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
#else
  for (int saved = 0; saved < 20; ++saved) *--top = 0;
  top[11] = reinterpret_cast<std::uint64_t>(entry);  // x30, to which `ret` goes
#endif
  context.stack_pointer = top;
#else
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = bottom;
  context.state.uc_stack.ss_size = size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#endif
}

}  // namespace flashmaps::cuda::emulation
