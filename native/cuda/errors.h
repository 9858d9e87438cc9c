// Errors of CUDA and its libraries as the core's exception.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.h"

namespace lora_da::cuda {

// "0.20 GB of 8.00 GB are free", on the calling thread's device.
std::string freeMemory();

// Throws Error(internal), or Error(outOfMemory) where that is what CUDA reports, naming `what` was being done.
void check(cudaError_t status, const char* what);

}  // namespace lora_da::cuda
