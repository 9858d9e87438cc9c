// Threads, warps and barriers as kernels see them. Every thread of a block is a fiber that runs until it waits for others.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// Set by the scheduler whenever another thread goes on.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace cuda_sim {

enum class Barrier { plain, any, all, count };

// Waits for all threads of the block that have not exited. Returns what the kind makes of their predicates.
int blockBarrier(Barrier kind, int predicate, const char* file, int line);

// Waits for the lanes of `mask`. The last to arrive calls `finish` for all of them: lanes[i] is what lane i gave as `mine`,
// which lives on that lane's stack and so can hold arguments and results.
using WarpFinish = void (*)(unsigned mask, void* const* lanes);
void warpTogether(unsigned mask, const char* operation, void* mine, WarpFinish finish, const char* file, int line);

unsigned laneIndex();
// The lanes of this warp that have not exited.
unsigned liveLanes();

void* blockSharedMemory();

template <class T>
struct ShuffleLane {
  T value;
  unsigned source;
  T result;
};

// What a lane outside the mask would give is undefined: 0xFF bytes.
template <class T>
void finishShuffle(unsigned mask, void* const* lanes) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    auto& mine = *static_cast<ShuffleLane<T>*>(lanes[lane]);
    if (mask >> mine.source & 1u) {
      mine.result = static_cast<ShuffleLane<T>*>(lanes[mine.source])->value;
    } else {
      std::memset(static_cast<void*>(&mine.result), 0xFF, sizeof(T));
    }
  }
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* operation, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value, "only plain values can be shuffled");
  ShuffleLane<T> mine{value, source, value};
  warpTogether(mask, operation, &mine, finishShuffle<T>, file, line);
  return mine.result;
}

template <class T>
struct ReduceLane {
  T value;
  T (*combine)(T, T);
};

template <class T>
void finishReduce(unsigned mask, void* const* lanes) {
  ReduceLane<T>* first = nullptr;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    auto* each = static_cast<ReduceLane<T>*>(lanes[lane]);
    if (first) {
      first->value = first->combine(first->value, each->value);
    } else {
      first = each;
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) static_cast<ReduceLane<T>*>(lanes[lane])->value = first->value;
  }
}

template <class T>
T reduce(unsigned mask, T value, T (*combine)(T, T), const char* operation, const char* file, int line) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "only 32-bit integers are reduced");
  ReduceLane<T> mine{value, combine};
  warpTogether(mask, operation, &mine, finishReduce<T>, file, line);
  return mine.value;
}

struct VoteLane {
  bool predicate;
  unsigned ballot;
};
unsigned ballot(unsigned mask, bool predicate, const char* operation, const char* file, int line);

}  // namespace cuda_sim

// The caller's place tells barriers apart: the compiler may copy a call, but not the line it stands on.
#define CUDA_SIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_SIM_PLACE) {
  cuda_sim::blockBarrier(cuda_sim::Barrier::plain, 0, file, line);
}
inline int __syncthreads_or(int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::blockBarrier(cuda_sim::Barrier::any, predicate, file, line);
}
inline int __syncthreads_and(int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::blockBarrier(cuda_sim::Barrier::all, predicate, file, line);
}
inline int __syncthreads_count(int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::blockBarrier(cuda_sim::Barrier::count, predicate, file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SIM_PLACE) {
  cuda_sim::warpTogether(
      mask, "__syncwarp", nullptr, [](unsigned, void* const*) {}, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_SIM_PLACE) {
  const unsigned segment = cuda_sim::laneIndex() & ~static_cast<unsigned>(width - 1);
  return cuda_sim::shuffle(mask, value, segment | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)),
                           "__shfl_sync", file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_SIM_PLACE) {
  const unsigned lane = cuda_sim::laneIndex();
  const unsigned inSegment = lane & static_cast<unsigned>(width - 1);
  return cuda_sim::shuffle(mask, value, delta > inSegment ? lane : lane - delta, "__shfl_up_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_SIM_PLACE) {
  const unsigned lane = cuda_sim::laneIndex();
  const unsigned inSegment = lane & static_cast<unsigned>(width - 1);
  const bool inside = delta < static_cast<unsigned>(width) - inSegment;
  return cuda_sim::shuffle(mask, value, inside ? lane + delta : lane, "__shfl_down_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int laneMask, int width = warpSize, CUDA_SIM_PLACE) {
  const unsigned lane = cuda_sim::laneIndex();
  const unsigned last = lane | static_cast<unsigned>(width - 1);
  const unsigned source = lane ^ static_cast<unsigned>(laneMask);
  return cuda_sim::shuffle(mask, value, source <= last ? source : lane, "__shfl_xor_sync", file, line);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, CUDA_SIM_PLACE) {
  return cuda_sim::reduce<T>(
      mask, value, [](T a, T b) { return a + b; }, "__reduce_add_sync", file, line);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CUDA_SIM_PLACE) {
  return cuda_sim::reduce<T>(
      mask, value, [](T a, T b) { return a < b ? b : a; }, "__reduce_max_sync", file, line);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CUDA_SIM_PLACE) {
  return cuda_sim::reduce<T>(
      mask, value, [](T a, T b) { return b < a ? b : a; }, "__reduce_min_sync", file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::ballot(mask, predicate != 0, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::ballot(mask, predicate != 0, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_SIM_PLACE) {
  return cuda_sim::ballot(mask, predicate != 0, "__all_sync", file, line) == mask;
}
inline unsigned __activemask() {
  return cuda_sim::liveLanes();
}
