// Passes over the dense matrices that the device's operations and the eigensolver share.
#pragma once

#include <cstdint>

#include "cuda/queue.h"

namespace lora_da::cuda {

// a [n, n] += value I.
void addToDiagonal(Queue& queue, double* a, int64_t n, double value);

}  // namespace lora_da::cuda
