// Sizes of memory in messages.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

namespace lora_da {

// "1.50 GB"
inline std::string gigabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace lora_da
