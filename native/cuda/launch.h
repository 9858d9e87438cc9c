// What kernels are written with, so that the same source compiles under nvcc and, as plain C++, for the host simulator
// (native/test/cuda_sim): a launch goes through launchKernel, shared memory through sharedMemory, never through a static
// __shared__ variable, and tensor-core and asynchronous-copy instructions through tensor_core.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

namespace lora_da::cuda {

// The block's dynamic shared memory, as many bytes as the launch gave.
template <class T>
__device__ inline T* sharedMemory() {
  extern __shared__ __align__(128) unsigned char lora_da_shared[];
  return reinterpret_cast<T*>(lora_da_shared);
}

template <class... Parameters, class... Arguments>
cudaError_t launchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t sharedBytes, cudaStream_t stream,
                         Arguments... arguments) {
  kernel<<<grid, block, sharedBytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace lora_da::cuda

#else
#include "cuda_sim.h"
#endif
