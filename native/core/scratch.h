// Device memory that grows to the largest request and is then reused: nothing is allocated in a steady step.
#pragma once

#include "core/device.h"

namespace lora_da {

class Scratch {
 public:
  // At least `bytes`; earlier contents are lost when it grows.
  void* reserve(Device& device, size_t bytes, const char* purpose) {
    if (bytes > bytes_) {
      // The old memory goes first, so that both never exist together.
      memory_.reset();
      bytes_ = 0;
      memory_ = device.allocate(bytes, purpose);
      bytes_ = bytes;
    }
    return memory_.get();
  }

 private:
  Buffer memory_;
  size_t bytes_ = 0;
};

}  // namespace lora_da
