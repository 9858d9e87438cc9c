#include "test_device.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "guarded_device.h"

namespace lora_da::test {

bool TestDevice::onCpu() const {
  return name == "cpu" || name == "guarded-cpu";
}

std::unique_ptr<Device> TestDevice::make(DType computeType, WeightLayout layout, int threads) const {
  DeviceOptions options;
  options.device = onCpu() ? "cpu" : name;
  options.computeType = computeType;
  options.threads = threads;
  options.copyBudget = layout == WeightLayout::mapped ? 0 : size_t{1} << 30;
  options.prepack = layout == WeightLayout::prepacked;
  std::unique_ptr<Device> device = makeDevice(options);
  if (name == "guarded-cpu") device = std::make_unique<GuardedDevice>(std::move(device));
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

std::vector<WeightLayout> weightLayouts(const TestDevice& tested) {
  if (!tested.onCpu()) return {WeightLayout::copied};
  return {WeightLayout::mapped, WeightLayout::copied, WeightLayout::prepacked};
}

doctest::skip cpuOnly(const char*, bool possible) {
  const auto isCpu = [](const TestDevice& device) { return device.name == "cpu"; };
  return doctest::skip(!possible || std::none_of(devices().begin(), devices().end(), isCpu));
}

bool smallCasesOnly() {
  return std::getenv("LORA_DA_TEST_SMALL") != nullptr;
}

}  // namespace lora_da::test
