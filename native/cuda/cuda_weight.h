// A frozen weight of the CUDA device: one row-major matrix, which every product reads as it is.
#pragma once

#include "core/device.h"

namespace lora_da::cuda {

class CudaWeight : public Weight {
 public:
  Buffer memory;
  DType dtype = DType::f32;

  Matrix view() const { return {memory.get(), dtype, out, in, in}; }
};

}  // namespace lora_da::cuda
