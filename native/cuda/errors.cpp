#include "cuda/errors.h"

namespace lora_da::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const char* errorCode = status == cudaErrorMemoryAllocation ? code::outOfMemory : code::internal;
  throw Error(errorCode,
              std::string("CUDA: ") + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace lora_da::cuda
