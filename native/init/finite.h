// Statistics that hold an infinity or a NaN are refused by name before they spread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "core/device.h"
#include "core/error.h"

namespace lora_da {

inline void requireNoneBad(int64_t bad, const std::string& module, const char* statistic) {
  if (bad == 0) return;
  throw Error(
      code::nonFinite,
      module + ": " + statistic + " holds " + std::to_string(bad) +
          " values that are infinite or not a number; collect it in float32, or look for overflow in the model's activations");
}

// values [count], host memory.
inline void requireFinite(const double* values, int64_t count, const std::string& module, const char* statistic) {
  requireNoneBad(std::count_if(values, values + count, [](double value) { return !std::isfinite(value); }), module, statistic);
}

// values [rows, cols], device memory.
inline void requireFinite(Device& device, const Matrix& values, const std::string& module, const char* statistic) {
  requireNoneBad(device.countNonFinite(values), module, statistic);
}

}  // namespace lora_da
