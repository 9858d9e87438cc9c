// Sums over the threads of a warp or a block, in an order that depends on nothing but their number.
#pragma once

#include "cuda/launch.h"

namespace lora_da::cuda {

inline constexpr int warpThreads = 32;
inline constexpr unsigned allLanes = 0xffffffffu;

// Over groups of `lanes` neighbours, a power of two; `mask` has the lanes of the own group at least. Every lane gets the sum.
template <class T>
__device__ inline T sumOfLanes(T value, int lanes = warpThreads, unsigned mask = allLanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
  return value;
}

// Over a block of `threads`; every thread gets the sum. `shared` has room for one value per warp and is used once between two
// barriers.
template <int threads, class T>
__device__ inline T sumOfBlock(T value, T* shared) {
  constexpr int warps = threads / warpThreads;
  static_assert(threads % warpThreads == 0 && warps <= warpThreads, "one warp adds the sums of all");
  const int lane = static_cast<int>(threadIdx.x) % warpThreads;
  value = sumOfLanes(value);
  if (lane == 0) shared[threadIdx.x / warpThreads] = value;
  __syncthreads();
  return sumOfLanes(lane < warps ? shared[lane] : T{0});
}

}  // namespace lora_da::cuda
