#include "cuda/library_errors.h"

namespace lora_da::cuda {

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const char* errorCode = status == CUBLAS_STATUS_ALLOC_FAILED ? code::outOfMemory : code::internal;
  throw Error(errorCode, std::string("cuBLAS: ") + what + ": " + cublasGetStatusString(status));
}

void check(cusolverStatus_t status, const char* what) {
  if (status == CUSOLVER_STATUS_SUCCESS) return;
  const char* errorCode = status == CUSOLVER_STATUS_ALLOC_FAILED ? code::outOfMemory : code::internal;
  throw Error(errorCode, std::string("cuSOLVER: ") + what + ": status " + std::to_string(static_cast<int>(status)));
}

}  // namespace lora_da::cuda
