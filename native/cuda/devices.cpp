#include "cuda/devices.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <cstdlib>

#include "cuda/errors.h"

namespace lora_da::cuda {

namespace {

// bf16 products of the tensor cores and asynchronous copies to shared memory (tensor_core.h).
constexpr int leastCapability = 8;

// 13020 is CUDA 13.2.
std::string versionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <class Property>
std::string libraryVersion(Property property) {
  int major = 0, minor = 0, patch = 0;
  property(MAJOR_VERSION, &major);
  property(MINOR_VERSION, &minor);
  property(PATCH_LEVEL, &patch);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

int driverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string driverReason() {
  const int version = driverVersion();
  const std::string needed = CUDART_VERSION >= 13000 ? "580" : "525";
  if (version == 0) {
    return "there is no NVIDIA driver (libcuda.so.1): install driver " + needed +
           " or later, in a container let the host's in (--gpus all)";
  }
  return "the NVIDIA driver is too old: it goes up to CUDA " + versionText(version) + ", this build is of CUDA " +
         versionText(CUDART_VERSION) + "; install driver " + needed + " or later";
}

std::string noDeviceReason() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  const std::string hint = visible ? " (CUDA_VISIBLE_DEVICES is \"" + std::string(visible) + "\")" : "";
  return "the NVIDIA driver finds no GPU" + hint;
}

std::string reasonOf(cudaError_t status) {
  if (status == cudaErrorInsufficientDriver) return driverReason();
  if (status == cudaErrorNoDevice) return noDeviceReason();
  return std::string("CUDA does not start: ") + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
}

DeviceDescription describe(int index) {
  DeviceDescription device;
  device.name = "cuda:" + std::to_string(index);
  cudaDeviceProp properties;
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, index); status != cudaSuccess) {
    cudaGetLastError();
    device.reason = reasonOf(status);
    return device;
  }
  device.model = properties.name;
  device.memory = properties.totalGlobalMem;
  device.computeCapability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  device.bfloat16 = properties.major >= leastCapability;
  if (properties.major < leastCapability) {
    device.reason = "its compute capability is " + device.computeCapability + ", the kernels need " +
                    std::to_string(leastCapability) + ".0 (Ampere) or later";
  }
  return device;
}

[[noreturn]] void unavailable(const std::string& reason) {
  throw Error(code::deviceUnavailable, reason);
}

std::string listed(const std::vector<DeviceDescription>& devices) {
  std::string list;
  for (const DeviceDescription& device : devices) list += (list.empty() ? "" : ", ") + device.name + " " + device.model;
  return list;
}

}  // namespace

DeviceReport describeDevices() {
  DeviceReport report;
  const int driver = driverVersion();
  report.libraries = {{"CUDA driver", driver > 0 ? "up to CUDA " + versionText(driver) : "none"},
                      {"CUDA runtime", versionText(CUDART_VERSION)},
                      {"cuBLAS", libraryVersion(cublasGetProperty)},
                      {"cuSOLVER", libraryVersion(cusolverGetProperty)}};
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    report.reason = reasonOf(status == cudaSuccess ? cudaErrorNoDevice : status);
    return report;
  }
  for (int index = 0; index < count; ++index) report.devices.push_back(describe(index));
  return report;
}

DeviceDescription chooseDevice(const std::string& name) {
  const DeviceReport report = describeDevices();
  if (report.devices.empty()) unavailable(report.reason);
  const bool any = name == "cuda";
  for (const DeviceDescription& device : report.devices) {
    if (any ? device.reason.empty() : device.name == name) {
      if (!device.reason.empty()) unavailable(device.model + ": " + device.reason);
      return device;
    }
  }
  if (any) unavailable(report.devices.front().model + ": " + report.devices.front().reason);
  unavailable("the machine has " + listed(report.devices));
}

std::string useDevice(const std::string& name) {
  const DeviceDescription device = chooseDevice(name);
  const std::string fullName = device.name + " " + device.model;
  const int index = std::stoi(device.name.substr(device.name.find(':') + 1));
  const cudaError_t status = cudaSetDevice(index);
  if (status == cudaSuccess) return fullName;
  cudaGetLastError();
  if (status == cudaErrorMemoryAllocation) {
    throw Error(code::outOfMemory,
                fullName + " has no memory left for CUDA itself: other processes hold it (nvidia-smi lists them)");
  }
  unavailable(fullName + ": " + reasonOf(status));
}

}  // namespace lora_da::cuda
