// Scratch memory that several arrays or threads share is cut at whole cache lines.
#pragma once

#include <cstddef>

namespace lora_da::cpu {

constexpr size_t cacheLines(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace lora_da::cpu
