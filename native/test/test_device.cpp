#include "test_device.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "core/profiled_device.h"
#include "guarded_device.h"

namespace lora_da::test {

bool TestDevice::onCpu() const {
  return name == "cpu" || name == "guarded-cpu";
}

std::unique_ptr<Device> TestDevice::make(DType computeType, int threads, size_t copyBudget, bool profile) const {
  DeviceOptions options;
  options.device = onCpu() ? "cpu" : name;
  options.computeType = computeType;
  options.threads = threads;
  options.copyBudget = copyBudget;
  std::unique_ptr<Device> device = makeDevice(options);
  if (name == "guarded-cpu") device = std::make_unique<GuardedDevice>(std::move(device));
  if (profile) device = std::make_unique<ProfiledDevice>(std::move(device));
  return device;
}

const std::vector<TestDevice>& devices() {
  static const std::vector<TestDevice> listed = [] {
    const char* names = std::getenv("LORA_DA_TEST_DEVICES");
    std::istringstream list(names ? names : "cpu");
    std::vector<TestDevice> result;
    for (std::string name; std::getline(list, name, ',');) result.push_back({name});
    return result;
  }();
  return listed;
}

doctest::skip cpuOnly(const char*, bool possible) {
  const auto isCpu = [](const TestDevice& device) { return device.name == "cpu"; };
  return doctest::skip(!possible || std::none_of(devices().begin(), devices().end(), isCpu));
}

bool smallCasesOnly() {
  return std::getenv("LORA_DA_TEST_SMALL") != nullptr;
}

}  // namespace lora_da::test
