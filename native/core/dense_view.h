// Float64 arrays of the dense algebra as operands of Device::matmul.
#pragma once

#include "core/device.h"

namespace lora_da {

// A whole device array.
inline Matrix denseView(const double* data, int64_t rows, int64_t cols) {
  return {const_cast<double*>(data), DType::f64, rows, cols, cols};
}

}  // namespace lora_da
