// The entry points of the shared object (core/device_plugin.h). Nothing else of it is visible.
#include "core/device_plugin.h"
#include "core/error.h"
#include "cuda/cuda_device.h"
#include "cuda/devices.h"

namespace {

using namespace lora_da;

// The status of work(), whatever it throws.
template <class Work>
void guarded(PluginStatus& status, Work work) {
  try {
    work();
    status = {};
  } catch (const std::exception&) {
    status = handledError();
  }
}

}  // namespace

#define LORA_DA_ENTRY_POINT extern "C" __attribute__((visibility("default")))

LORA_DA_ENTRY_POINT const char* lora_da_cuda_abi() {
  return LORA_DA_PLUGIN_ABI;
}

LORA_DA_ENTRY_POINT void lora_da_cuda_describe(DeviceReport& report, PluginStatus& status) {
  guarded(status, [&] { report = cuda::describeDevices(); });
}

LORA_DA_ENTRY_POINT void lora_da_cuda_choose(const std::string& name, DeviceDescription& chosen, PluginStatus& status) {
  guarded(status, [&] { chosen = cuda::chooseDevice(name); });
}

LORA_DA_ENTRY_POINT Device* lora_da_cuda_make(const DeviceOptions& options, PluginStatus& status) {
  Device* device = nullptr;
  guarded(status, [&] { device = new cuda::CudaDevice(options); });
  return device;
}
