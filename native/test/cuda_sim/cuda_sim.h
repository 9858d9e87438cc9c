// What stands in for nvcc where a .cu file is compiled as plain C++: qualifiers that vanish, threadIdx and its kin, intrinsics,
// launches. Included by cuda/launch.h; the CUDA runtime's own headers come before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <memory>
#include <tuple>

#include "cuda_sim_api.h"
#include "intrinsics.h"
#include "simt.h"
#include "tensor_core_sim.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
// Left undefined on purpose: shared memory comes from sharedMemory<T>().
#define __shared__ static_assert(false, "shared memory comes from sharedMemory<T>()");

namespace cuda_sim {

struct Launch {
  const void* kernel = nullptr;
  dim3 grid;
  dim3 block;
  size_t sharedBytes = 0;
  cudaStream_t stream = nullptr;
  std::function<void()> body;             // one thread's run
  std::vector<const void*> pointers;      // parameters that are pointers: each must be null or device or pinned memory
  std::vector<const void*> maybeAddress;  // words of parameters passed by value, which may be pointers
};
cudaError_t launch(Launch launch);

template <class T>
void noteParameter(Launch& launch, const T& parameter) {
  if constexpr (std::is_pointer<T>::value) {
    launch.pointers.push_back(static_cast<const void*>(parameter));
  } else if constexpr (sizeof(T) >= sizeof(void*) && !std::is_arithmetic<T>::value) {
    for (size_t offset = 0; offset + sizeof(void*) <= sizeof(T); offset += sizeof(void*)) {
      const void* word;
      std::memcpy(&word, reinterpret_cast<const unsigned char*>(&parameter) + offset, sizeof word);
      launch.maybeAddress.push_back(word);
    }
  }
}

}  // namespace cuda_sim

// Fused operations of bf16, which the header has for nvcc only.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __float2bfloat16_rn(__bfloat162float(a) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

// The overloads for kernels that the runtime's header has for nvcc only.
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

namespace lora_da::cuda {

template <class T>
T* sharedMemory() {
  return static_cast<T*>(cuda_sim::blockSharedMemory());
}

template <class... Parameters, class... Arguments>
cudaError_t launchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t sharedBytes, cudaStream_t stream,
                         Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel gets as many arguments as it has parameters");
  static_assert((std::is_trivially_copyable<Parameters>::value && ...), "a kernel's parameters are copied byte by byte");
  auto parameters = std::make_shared<std::tuple<Parameters...>>(static_cast<Parameters>(arguments)...);
  cuda_sim::Launch launch;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = grid;
  launch.block = block;
  launch.sharedBytes = sharedBytes;
  launch.stream = stream;
  launch.body = [kernel, parameters] { std::apply(kernel, *parameters); };
  std::apply([&](const auto&... each) { (cuda_sim::noteParameter(launch, each), ...); }, *parameters);
  return cuda_sim::launch(std::move(launch));
}

}  // namespace lora_da::cuda
