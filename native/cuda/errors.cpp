#include "cuda/errors.h"

#include "core/memory_text.h"

namespace lora_da::cuda {

std::string freeMemory() {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return gigabytes(free) + " of " + gigabytes(total) + " are free";
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it stays otherwise and is found again by the next launch
    throw Error(code::outOfMemory,
                std::string("CUDA has not enough memory for ") + what + ": " + freeMemory() + " on the device");
  }
  throw Error(code::internal,
              std::string("CUDA: ") + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace lora_da::cuda
