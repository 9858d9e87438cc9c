// The only place that knows which devices exist.
#include "core/device_factory.h"

#include "core/error.h"
#include "core/profiled_device.h"

namespace lora_da {

namespace {

std::unique_ptr<Device> makePlainDevice(const DeviceOptions& options) {
  if (options.device == "auto" || options.device == "cpu") return makeCpuDevice(options);
  throw Error(code::deviceUnavailable, "device " + options.device + " is not available: this build has cpu only");
}

}  // namespace

std::unique_ptr<Device> makeDevice(const DeviceOptions& options) {
  std::unique_ptr<Device> device = makePlainDevice(options);
  if (!options.profile) return device;
  return std::make_unique<ProfiledDevice>(std::move(device));
}

}  // namespace lora_da
