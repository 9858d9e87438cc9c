// What a shared object that holds a device (native/cuda) offers to device_factory.cpp, which opens it at run time. C++ objects
// cross this boundary, so both sides must come from the same headers: the abi entry point says which, and is compared before
// anything else is called. The entry points throw nothing: an error is in the status.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/error.h"

namespace lora_da {

// One device of the machine.
struct DeviceDescription {
  std::string name;               // what --device takes: "cpu", "cuda:0"
  std::string model;              // "NVIDIA H100 80GB HBM3"
  std::string reason;             // why it cannot be used; empty where it can
  size_t memory = 0;              // bytes in all
  std::string computeCapability;  // "9.0"; empty where there is no such thing
  bool bfloat16 = false;          // multiplies bfloat16 matrices in hardware
};

struct DeviceReport {
  std::vector<DeviceDescription> devices;
  std::string reason;                                          // why there is none; empty otherwise
  std::vector<std::pair<std::string, std::string>> libraries;  // name, version
};

// How a call into the plug-in ended; an empty code: well.
using PluginStatus = ErrorText;

namespace plugin {

// A hash of the headers that the shared object was compiled with; `headers` of the caller's own is LORA_DA_PLUGIN_ABI.
using Abi = const char*();
using Describe = void(DeviceReport& report, PluginStatus& status);
// The device that a name means: "cuda" the first that can be used, "cuda:i" that one.
using Choose = void(const std::string& name, DeviceDescription& chosen, PluginStatus& status);
// A device of the caller's, or null.
using Make = Device*(const DeviceOptions& options, PluginStatus& status);

inline constexpr const char* abiName = "lora_da_cuda_abi";
inline constexpr const char* describeName = "lora_da_cuda_describe";
inline constexpr const char* chooseName = "lora_da_cuda_choose";
inline constexpr const char* makeName = "lora_da_cuda_make";

}  // namespace plugin

}  // namespace lora_da
