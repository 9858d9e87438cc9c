// The shared object that holds the CUDA device (native/cuda), found and opened when a CUDA device is first asked for. There is
// one for each major version of CUDA: liblora_da_cuda13.so, liblora_da_cuda12.so. It is never closed.
//
// Where it is looked for: LORA_DA_CUDA_LIBRARY, the path of one; else beside this binary. Its cuBLAS and cuSOLVER are the user's:
// those that the dynamic linker finds, else those of CUDA_HOME, CUDA_PATH or /usr/local/cuda*.
#pragma once

#include <memory>
#include <string>

#include "core/device.h"
#include "core/device_plugin.h"

namespace lora_da {

class CudaLibrary {
 public:
  // False where a CUDA device cannot be: no driver, and no library named. Takes no time.
  static bool worthOpening();
  // Throws Error(deviceUnavailable): what was looked for, what is missing and what helps.
  static const CudaLibrary& open();

  DeviceReport describe() const;
  // What `name`, cuda or cuda:i, means; throws Error(deviceUnavailable).
  DeviceDescription choose(const std::string& name) const;
  std::unique_ptr<Device> make(const DeviceOptions& options) const;

 private:
  explicit CudaLibrary(const std::string& path);

  plugin::Describe* describe_ = nullptr;
  plugin::Choose* choose_ = nullptr;
  plugin::Make* make_ = nullptr;
};

}  // namespace lora_da
