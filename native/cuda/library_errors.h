// Statuses of cuBLAS, cuBLASLt and cuSOLVER as the core's exception; overloads of errors.h' check.
#pragma once

#include <cublas_v2.h>
#include <cusolver_common.h>

#include "cuda/errors.h"

namespace lora_da::cuda {

void check(cublasStatus_t status, const char* what);
void check(cusolverStatus_t status, const char* what);

}  // namespace lora_da::cuda
