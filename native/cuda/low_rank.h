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
// y [out, cols]: rows are the outputs, block i's factors, transposed, in its columns [i rank, (i + 1) rank), zeros elsewhere.
void layBlocks(Queue& queue, const UpProjection& up, const Matrix& y);

}  // namespace lora_da::cuda
