// Fibers, the threads of an emulated block: stacks, and the switch between them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lfcc::emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 256 << 10;  // with the red zones around every array
#else
constexpr size_t stack_bytes = 64 << 10;
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, and continues at the point where the other stack was left.
extern "C" void lfcc_emulation_switch(void** stack_pointer, void* other_stack_pointer);
asm(R"(
  .pushsection .text
  .weak lfcc_emulation_switch
  .hidden lfcc_emulation_switch
  .type lfcc_emulation_switch, @function
lfcc_emulation_switch:
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
  .size lfcc_emulation_switch, . - lfcc_emulation_switch
  .popsection
)");
#endif

// A stack and its resume address.
struct Fiber {
  char* stack = nullptr;  // for an operating system thread unknown until AddressSanitizer reports it
  size_t bytes = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* shadow = nullptr;
#endif
};

#if defined(__SANITIZE_ADDRESS__)
inline Fiber* left_fiber = nullptr;

inline void arrived(void* shadow) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(shadow, &bottom, &bytes);
  left_fiber->stack = static_cast<char*>(const_cast<void*>(bottom));
  left_fiber->bytes = bytes;
}
#endif

// Must be the first call on a fiber's stack.
inline void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  arrived(nullptr);
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  left_fiber = &from;
  __sanitizer_start_switch_fiber(&from.shadow, to.stack, to.bytes);
#endif
#if defined(__x86_64__)
  lfcc_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  arrived(from.shadow);
#endif
}

// Allocates the stack of the fiber, which is never freed, above a guard page.
inline void allocate_stack(Fiber& fiber) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(
      nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.bytes = stack_bytes;
}

// The next switch to the fiber enters `entry`, which must not return, from the top of the stack. `number` shifts the
// top: stacks are a power of two apart, so equal depths of all would map to one cache line.
inline void prepare_fiber(Fiber& fiber, void (*entry)(), unsigned number) {
  char* top = fiber.stack + fiber.bytes - number % 32 * 128;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);  // an interrupted function leaves its red zones
  fiber.shadow = nullptr;
#endif
#if defined(__x86_64__)
  void* frame[8] = {};  // six registers, the return address, and the (null) return address of the entry
  std::memcpy(&frame[6], &entry, sizeof entry);
  std::memcpy(top - sizeof frame, frame, sizeof frame);
  fiber.stack_pointer = top - sizeof frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(top - fiber.stack);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

}  // namespace lfcc::emulation
