// Keys and values of the tokens seen so far, per layer, for generation.
#pragma once

#include <vector>

#include "core/device.h"

namespace lora_da {

struct KvCache {
  int64_t capacity = 0;  // rows
  int64_t length = 0;    // rows filled before the current pass
  Buffer memory;
  std::vector<Matrix> keys, values;  // per layer [capacity, kvWidth], compute type

  KvCache(Device& device, int64_t layers, int64_t rows, int64_t width) : capacity(rows) {
    const DType type = device.computeType();
    const int64_t elements = rows * width;
    memory = device.allocate(static_cast<size_t>(2 * layers * elements) * sizeOf(type),
                             "key/value cache of " + std::to_string(rows) + " tokens");
    char* next = static_cast<char*>(memory.get());
    for (int64_t i = 0; i < 2 * layers; ++i) {
      (i < layers ? keys : values).push_back({next, type, rows, width, width});
      next += static_cast<size_t>(elements) * sizeOf(type);
    }
  }
};

}  // namespace lora_da
