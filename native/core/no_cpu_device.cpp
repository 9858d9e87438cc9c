// Stands for native/cpu in a build without it (CMake option LORA_DA_CPU).
#include "core/device_factory.h"
#include "core/error.h"

namespace lora_da {

std::unique_ptr<Device> makeCpuDevice(const DeviceOptions&) {
  throw Error(code::deviceUnavailable, "device cpu is not available: this build was made without it (LORA_DA_CPU=OFF)");
}

}  // namespace lora_da
