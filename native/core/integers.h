// Whole numbers of pieces.
#pragma once

#include <cstdint>

namespace lora_da {

constexpr int64_t ceilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t roundUp(int64_t value, int64_t grain) {
  return ceilDiv(value, grain) * grain;
}

}  // namespace lora_da
