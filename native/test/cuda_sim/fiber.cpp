#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CUDA_SIM_UCONTEXT)
// Saves what a callee must keep on the old stack and takes it from the new one.
asm(R"(
.text
.p2align 4
.type cuda_sim_switch, @function
cuda_sim_switch:
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
.size cuda_sim_switch, .-cuda_sim_switch
)");
extern "C" void cuda_sim_switch(void** saved, void* loaded);
#endif

namespace cuda_sim {

namespace {

// Instrumented code needs larger frames.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t usableBytes = size_t{512} << 10;
#else
constexpr size_t usableBytes = size_t{256} << 10;
#endif

void allocateStack(Fiber& fiber) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, usableBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("CUDA simulator: a thread's stack");
    std::abort();
  }
  fiber.stack = static_cast<unsigned char*>(memory) + page;
  fiber.stackBytes = usableBytes;
}

}  // namespace

void prepareFiber(Fiber& fiber, void (*entry)(), unsigned index) {
  if (!fiber.stack) allocateStack(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.stackBytes);
#endif
  fiber.fakeStack = nullptr;
  // All stacks are alike: with equal tops their hot lines would fall into the same few sets of the cache.
  const size_t offset = size_t{index % 16} * 448;
#if !defined(CUDA_SIM_UCONTEXT)
  auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stackBytes - offset - 64);
  *--top = nullptr;  // where a return address would be, so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stackPointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stackBytes - offset;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void adoptThread(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
  }
  fiber.stack = static_cast<unsigned char*>(stack);
  fiber.stackBytes = bytes;
#else
  (void)fiber;
#endif
}

void switchFiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fakeStack, to.stack, to.stackBytes);
#endif
#if !defined(CUDA_SIM_UCONTEXT)
  cuda_sim_switch(&from.stackPointer, to.stackPointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fakeStack, nullptr, nullptr);
#endif
}

void fiberEntered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace cuda_sim
