// Float64 arrays on the device that the initializations share: each grows to its largest request and is then reused, so that
// hundreds of modules cost a handful of allocations.
#pragma once

#include <algorithm>
#include <string>
#include <utility>

#include "core/dense_view.h"
#include "core/device.h"

namespace lora_da {

class DeviceArray {
 public:
  // At least `count` doubles; earlier contents are lost when it grows.
  double* reserve(Device& device, int64_t count, const std::string& purpose) {
    if (count > count_) {
      buffer_.reset();
      buffer_ = device.allocate(static_cast<size_t>(count) * sizeof(double), purpose);
      count_ = count;
    }
    return get();
  }
  // The same, but keeps what is there; growing by and by costs little.
  double* extend(Device& device, int64_t count, const std::string& purpose) {
    if (count > count_) {
      DeviceArray larger;
      larger.reserve(device, std::max(count, 2 * count_), purpose);
      if (count_ > 0) device.copy(larger.get(), get(), static_cast<size_t>(count_) * sizeof(double));
      *this = std::move(larger);
    }
    return get();
  }
  double* get() const { return static_cast<double*>(buffer_.get()); }

 private:
  Buffer buffer_;
  int64_t count_ = 0;
};

// One per run of an initialization.
struct InitializationWorkspace {
  explicit InitializationWorkspace(Device& target) : device(target) {}

  Device& device;
  DeviceArray outputScale, delta, gram, omega, values, vectors, projected, krylov, coefficients;
};

}  // namespace lora_da
