// A frozen weight of the CUDA device: one row-major matrix, which every product reads as it is. Where a LoRA term comes with it,
// there is room for the term's factors beside it, so that both are one product (linear.cpp):
//   [ W  up^T ]   `room` columns behind each row
//   [ a       ]   `room` rows below the last one
#pragma once

#include "core/device.h"

namespace lora_da::cuda {

class CudaWeight : public Weight {
 public:
  Buffer memory;
  DType dtype = DType::f32;
  int64_t stride = 0;
  int64_t room = 0;

  Matrix view() const { return {memory.get(), dtype, out, in, stride}; }
  Matrix with(int64_t moreRows, int64_t moreCols) const { return {memory.get(), dtype, out + moreRows, in + moreCols, stride}; }
};

}  // namespace lora_da::cuda
