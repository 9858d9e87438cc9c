// How the factory makes a device of each kind, and which one an option means; makeDevice in device.h puts the two together.
#pragma once

#include <memory>
#include <string>

#include "core/device.h"
#include "core/device_plugin.h"

namespace lora_da {

// In native/cpu, or in no_cpu_device.cpp where the build leaves native/cpu out: that one throws Error(deviceUnavailable).
std::unique_ptr<Device> makeCpuDevice(const DeviceOptions& options);

struct DeviceChoice {
  std::string device;     // "cpu" or "cuda:i"
  bool bfloat16 = false;  // it multiplies bfloat16 matrices in hardware
  std::string note;       // why "auto" passes over CUDA where there is a driver for it; empty otherwise
};

// What auto | cpu | cuda[:i] means on this machine. auto is CUDA where it can be used, else the CPU, and never an error; a
// machine without an NVIDIA driver is not asked further. Throws Error(deviceUnavailable) saying why the device asked for cannot
// be had.
DeviceChoice chooseDevice(const std::string& asked);

// makeDevice of device.h for a device that is chosen already; options.device is not looked at.
std::unique_ptr<Device> makeDevice(const DeviceChoice& choice, const DeviceOptions& options);

// The machine's devices, the CPU first. Where there is no CUDA device, one by the name "cuda" says why.
DeviceReport describeDevices();

}  // namespace lora_da
