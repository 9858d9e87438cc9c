// Statistics that hold an infinity or a NaN are refused by name before they spread.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "core/error.h"

namespace lora_da {

template <class T>
void requireFinite(const T* values, int64_t count, const std::string& module, const char* statistic) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    bad += !(values[i] <= std::numeric_limits<T>::max() && values[i] >= std::numeric_limits<T>::lowest());
  }
  if (bad == 0) return;
  throw Error(
      code::nonFinite,
      module + ": " + statistic + " holds " + std::to_string(bad) +
          " values that are infinite or not a number; collect it in float32, or look for overflow in the model's activations");
}

}  // namespace lora_da
