// The only place that knows which devices exist.
#include "core/device.h"
#include "core/error.h"
#include "cpu/cpu_device.h"

namespace lora_da {

std::unique_ptr<Device> makeDevice(const DeviceOptions& options) {
  if (options.device == "auto" || options.device == "cpu") return std::make_unique<cpu::CpuDevice>(options);
  throw Error(code::deviceUnavailable, "device " + options.device + " is not available: this build has cpu only");
}

}  // namespace lora_da
