// One block of device memory that a step's buffers are laid out in, front to back. The same layout code runs twice: on a counting
// arena to learn the size, then on a real one.
#pragma once

#include <algorithm>
#include <string>

#include "core/device.h"
#include "core/error.h"

namespace lora_da {

class Arena {
 public:
  // Makes room for `bytes`; keeps what is there if it suffices. Layouts made before are void.
  void reserve(Device& device, size_t bytes, const std::string& purpose) {
    if (bytes <= capacity_) return;
    memory_.reset();
    capacity_ = 0;
    memory_ = device.allocate(bytes, purpose);
    capacity_ = bytes;
  }
  void rewind() { used_ = 0; }
  size_t used() const { return used_; }
  size_t capacity() const { return capacity_; }

  void* take(size_t bytes) {
    const size_t offset = used_;
    used_ += (bytes + alignment - 1) / alignment * alignment;
    if (!memory_) return nullptr;
    if (used_ > capacity_) throw Error(code::internal, "a step's buffers outgrew their plan");
    return static_cast<char*>(memory_.get()) + offset;
  }
  template <class T>
  T* array(int64_t count) {
    return static_cast<T*>(take(static_cast<size_t>(count) * sizeof(T)));
  }
  Matrix matrix(DType type, int64_t rows, int64_t cols, int64_t room = 0) {
    const int64_t stride = cols + room;
    return {take(static_cast<size_t>(rows * stride) * sizeOf(type)), type, rows, cols, stride, room};
  }

 private:
  static constexpr size_t alignment = 64;
  Buffer memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace lora_da
