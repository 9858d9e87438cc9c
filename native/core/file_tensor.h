// Elements of a checkpoint file's tensor as float32. File data may start at any byte, so elements are read with memcpy.
#pragma once

#include <cstring>

#include "core/device.h"
#include "core/error.h"

namespace lora_da {

namespace file_tensor {

template <class Stored, class Widen, class Body>
void overElements(const char* data, int64_t first, int64_t count, Widen widen, Body body) {
  for (int64_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, data + (first + i) * static_cast<int64_t>(sizeof value), sizeof value);
    body(i, widen(value));
  }
}

}  // namespace file_tensor

// body(i, value) for elements first .. first + count - 1 of the tensor, i from 0. Throws Error(invalidTensor) unless the file
// holds F32, F16 or BF16.
template <class Body>
void forFileElements(const HostTensor& tensor, int64_t first, int64_t count, Body body) {
  const char* data = static_cast<const char*>(tensor.data);
  switch (tensor.dtype) {
    case DType::f32:
      return file_tensor::overElements<float>(
          data, first, count, [](float value) { return value; }, body);
    case DType::f16: return file_tensor::overElements<uint16_t>(data, first, count, f16ToFloat, body);
    case DType::bf16: return file_tensor::overElements<uint16_t>(data, first, count, bf16ToFloat, body);
    default:
      throw Error(code::invalidTensor,
                  "tensor " + tensor.name + " has type " + nameOf(tensor.dtype) + ", expected F32, F16 or BF16");
  }
}

// Elements first .. first + count - 1 in `type`, float32 or bfloat16. Copied where the file holds that type already.
inline void convertFileElements(const HostTensor& tensor, int64_t first, int64_t count, DType type, void* target) {
  if (tensor.dtype == type) {
    const auto width = static_cast<int64_t>(sizeOf(type));
    std::memcpy(target, static_cast<const char*>(tensor.data) + first * width, static_cast<size_t>(count * width));
  } else if (type == DType::bf16) {
    auto* values = static_cast<uint16_t*>(target);
    forFileElements(tensor, first, count, [=](int64_t i, float value) { values[i] = floatToBf16(value); });
  } else {
    auto* values = static_cast<float*>(target);
    forFileElements(tensor, first, count, [=](int64_t i, float value) { values[i] = value; });
  }
}

}  // namespace lora_da
