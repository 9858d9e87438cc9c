#include "card.h"

#include <utility>
#include <vector>

namespace lora_da::bench {

double publishedPeak(const std::string& deviceName) {
  // Longer names first: the first that is found in the device's name counts.
  static const std::vector<std::pair<const char*, double>> teraflops = {
      {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989},         {"H200", 989},      {"GH200", 989},
      {"H800", 989},      {"B200", 2250},    {"A100", 312},         {"A800", 312},      {"A30", 165},
      {"A10G", 70},       {"A10", 125},      {"A40", 150},          {"L40S", 362},      {"L40", 181},
      {"L4", 121},        {"RTX 4090", 165}, {"RTX 6000 Ada", 364}, {"RTX A6000", 155}, {"RTX 3090", 71}};
  for (const auto& [part, value] : teraflops) {
    if (deviceName.find(part) != std::string::npos) return value * 1e12;
  }
  return 0;
}

namespace {

double squareProductRate(Device& device, DType type, int64_t order, const Repeats& repeats) {
  const size_t bytes = static_cast<size_t>(order * order) * sizeOf(type);
  const Buffer memory[] = {device.allocate(bytes, "product"), device.allocate(bytes, "product"),
                           device.allocate(bytes, "product")};
  Matrix operands[3];
  for (int i = 0; i < 3; ++i) operands[i] = {memory[i].get(), type, order, order, order};
  fillRandom(device, operands[0]);
  fillRandom(device, operands[1]);
  const double seconds = secondsOf(
      device, repeats, [&] { device.matmul(Transpose::no, operands[0], Transpose::yes, operands[1], 1.0f, false, operands[2]); });
  const auto n = static_cast<double>(order);
  return 2 * n * n * n / seconds;
}

double copyBandwidth(Device& device, int64_t bytes, const Repeats& repeats) {
  const auto size = static_cast<size_t>(bytes);
  const Buffer from = device.allocate(size, "copy"), to = device.allocate(size, "copy");
  device.zero(from.get(), size);
  const double seconds = secondsOf(device, repeats, [&] { device.copy(to.get(), from.get(), size); });
  return 2 * static_cast<double>(bytes) / seconds;
}

}  // namespace

Card measureCard(Device& device, const CardSizes& sizes, const Repeats& repeats) {
  Card card;
  card.bandwidth = copyBandwidth(device, sizes.copyBytes, repeats);
  card.productRate = squareProductRate(device, device.computeType(), sizes.product, repeats);
  card.doubleRate = squareProductRate(device, DType::f64, sizes.doubleProduct, repeats);
  const double published = device.computeType() == DType::bf16 ? publishedPeak(device.name()) : 0;
  card.peak = published > 0 ? published : card.productRate;
  card.peakSource = published > 0 ? "the data sheet's dense bf16 peak" : "a large product measured in the same run";
  return card;
}

}  // namespace lora_da::bench
