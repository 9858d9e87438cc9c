// How the factory makes a device of each kind; makeDevice in device.h chooses.
#pragma once

#include <memory>

#include "core/device.h"

namespace lora_da {

// In native/cpu, or in no_cpu_device.cpp where the build leaves native/cpu out: that one throws Error(deviceUnavailable).
std::unique_ptr<Device> makeCpuDevice(const DeviceOptions& options);

}  // namespace lora_da
