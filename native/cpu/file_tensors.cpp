// From a tensor of a checkpoint file to the compute type.
#include <cstring>

#include "core/error.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// File data may start at any byte, so elements are read with memcpy.
template <class T>
T readAt(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float readFloat(const HostTensor& tensor, int64_t index) {
  switch (tensor.dtype) {
    case DType::f32: return readAt<float>(tensor.data, index);
    case DType::bf16: return bf16ToFloat(readAt<uint16_t>(tensor.data, index));
    case DType::f16: return f16ToFloat(readAt<uint16_t>(tensor.data, index));
    default:
      throw Error(code::invalidTensor,
                  "tensor " + tensor.name + " has type " + nameOf(tensor.dtype) + ", expected F32, F16 or BF16");
  }
}

}  // namespace

void CpuDevice::convertFromFile(const HostTensor& tensor, void* target) {
  const int64_t count = tensor.rows * tensor.cols;
  if (tensor.dtype == computeType_) {
    std::memcpy(target, tensor.data, static_cast<size_t>(count) * sizeOf(computeType_));
    return;
  }
  readFloat(tensor, 0);  // an unknown type throws here, outside the parallel region
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t row = 0; row < tensor.rows; ++row) {
    for (int64_t i = row * tensor.cols; i < (row + 1) * tensor.cols; ++i) {
      const float value = readFloat(tensor, i);
      if (computeType_ == DType::bf16)
        static_cast<uint16_t*>(target)[i] = floatToBf16(value);
      else
        static_cast<float*>(target)[i] = value;
    }
  }
}

}  // namespace lora_da::cpu
