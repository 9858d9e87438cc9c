// The only place that knows which devices exist.
#include "core/device_factory.h"

#include "core/cpu_info.h"
#include "core/cuda_library.h"
#include "core/error.h"
#include "core/profiled_device.h"

namespace lora_da {

namespace {

DeviceChoice cpuChoice() {
  return {"cpu", hasBfloat16Products(), ""};
}

DeviceChoice cudaChoice(const std::string& asked) {
  try {
    const DeviceDescription device = CudaLibrary::open().choose(asked);
    return {device.name, device.bfloat16, ""};
  } catch (const Error& error) {
    throw Error(error.code(), "device " + asked + " is not available: " + error.what());
  }
}

}  // namespace

DeviceChoice chooseDevice(const std::string& asked) {
  if (asked == "cpu") return cpuChoice();
  if (asked != "auto") return cudaChoice(asked);
  DeviceChoice choice = cpuChoice();
  if (!CudaLibrary::worthOpening()) return choice;
  try {
    return cudaChoice("cuda");
  } catch (const Error& error) {
    choice.note = error.what();
    return choice;
  }
}

DeviceReport describeDevices() {
  DeviceReport report;
  try {
    report = CudaLibrary::open().describe();
  } catch (const Error& error) {
    report.reason = error.what();
  }
  if (report.devices.empty()) {
    DeviceDescription missing;
    missing.name = "cuda";
    missing.reason = report.reason;
    report.devices.push_back(missing);
  }
  DeviceDescription cpu;
  cpu.name = "cpu";
  cpu.bfloat16 = hasBfloat16Products();
  report.devices.insert(report.devices.begin(), cpu);
  return report;
}

std::unique_ptr<Device> makeDevice(const DeviceOptions& options) {
  return makeDevice(chooseDevice(options.device), options);
}

std::unique_ptr<Device> makeDevice(const DeviceChoice& choice, const DeviceOptions& options) {
  DeviceOptions chosen = options;
  chosen.device = choice.device;
  std::unique_ptr<Device> device = chosen.device == "cpu" ? makeCpuDevice(chosen) : CudaLibrary::open().make(chosen);
  if (!options.profile) return device;
  return std::make_unique<ProfiledDevice>(std::move(device));
}

}  // namespace lora_da
