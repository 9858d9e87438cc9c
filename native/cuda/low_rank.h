// Laying the factors of a LoRA term beside the matrices that they are multiplied with.
#pragma once

#include "core/device.h"
#include "cuda/queue.h"

namespace lora_da::cuda {

// The inner size of products is kept a multiple of 8, as tensor cores want it: room beyond the factors holds zeros.
inline int64_t roundedRank(int64_t rank) {
  return (rank + 7) / 8 * 8;
}

// y [rows, cols] = x in its upper left corner, zeros elsewhere; one type.
void lay(Queue& queue, const Matrix& x, const Matrix& y);
// The same for x^T.
void layTransposed(Queue& queue, const Matrix& x, const Matrix& y);

}  // namespace lora_da::cuda
