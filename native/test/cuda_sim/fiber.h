// Stacks of their own and switching between them: on x86-64 a few instructions, elsewhere ucontext.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(CUDA_SIM_UCONTEXT)
#define CUDA_SIM_UCONTEXT
#endif
#if defined(CUDA_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_sim {

struct Fiber {
#if defined(CUDA_SIM_UCONTEXT)
  ucontext_t context;
#else
  void* stackPointer = nullptr;
#endif
  unsigned char* stack = nullptr;  // lowest address; below it a page that faults
  size_t stackBytes = 0;
  void* fakeStack = nullptr;  // AddressSanitizer's
};

// Makes the fiber start with `entry`, which never returns, when it is next switched to. `index` spreads the stacks' tops over the
// cache. May be called again for a fiber that was left in the middle.
void prepareFiber(Fiber& fiber, void (*entry)(), unsigned index);
// A fiber that stands for the calling thread, to switch back to.
void adoptThread(Fiber& fiber);
void switchFiber(Fiber& from, Fiber& to);
// To be called first in `entry`.
void fiberEntered();

}  // namespace cuda_sim
