// Which CUDA devices the machine has, which of them a name means, and why one cannot be used.
#pragma once

#include <string>

#include "core/device_plugin.h"

namespace lora_da::cuda {

// All devices, with driver and libraries. Makes no context, takes no device memory.
DeviceReport describeDevices();

// The device that "cuda" (the first that can be used) or "cuda:i" means. Throws Error(deviceUnavailable) saying what is wrong.
DeviceDescription chooseDevice(const std::string& name);

// Makes that device the calling thread's. Returns it as messages call it: "cuda:0 NVIDIA H100 80GB HBM3".
std::string useDevice(const std::string& name);

}  // namespace lora_da::cuda
