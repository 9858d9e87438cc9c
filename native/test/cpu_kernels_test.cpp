// Kernels of the CPU device that are called as they are, without it. Left out of a build without the CPU device.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

const doctest::skip onCpu = cpuOnly("calls the CPU device's kernels");

}  // namespace

TEST_CASE("a softmax taken part by part, the target apart" * onCpu) {
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = cpuDevice(type);
    const auto& typed = type == DType::bf16 ? cpu::kernels().bf16 : cpu::kernels().f32;
    const uint64_t seed = freshSeed();
    INFO("seed ", seed, ", ", std::string(nameOf(type)));
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(-3, 5);
    const int64_t vocabulary = 301;
    TestMatrix exponentials(*device, type, 1, vocabulary);
    for (const int64_t part : {1, 7, 48, 301}) {
      std::vector<float> logits(static_cast<size_t>(vocabulary));
      for (float& logit : logits) logit = normal(random);
      const int64_t target = static_cast<int64_t>(random() % static_cast<uint64_t>(vocabulary));
      std::vector<float> parts = logits;
      std::vector<double> scale(logits.size(), 1.0);  // of each exponential, by the maxima that came after it
      cpu::RunningSoftmax row;
      for (int64_t first = 0; first < vocabulary; first += part) {
        const int64_t count = std::min(part, vocabulary - first);
        const Matrix out = exponentials.view().columns(first, count);
        const double factor = typed.addToSoftmax(parts.data() + first, count, target - first, row, out.data);
        CHECK(factor <= 1.0);
        for (int64_t i = 0; i < first; ++i) scale[static_cast<size_t>(i)] *= factor;
      }
      double largest = -1e30, sum = 0;
      for (int64_t i = 0; i < vocabulary; ++i) {
        if (i != target) largest = std::max(largest, static_cast<double>(logits[static_cast<size_t>(i)]));
      }
      const auto expected = [&](int64_t i) {
        return i == target ? 0.0 : std::exp(static_cast<double>(logits[static_cast<size_t>(i)]) - largest);
      };
      for (int64_t i = 0; i < vocabulary; ++i) {
        sum += expected(i);
        // Differences of up to 40 carry float32's rounding into the exponent.
        const double actual = exponentials.at(0, i) * scale[static_cast<size_t>(i)];
        CHECK(std::abs(actual - expected(i)) <= (type == DType::bf16 ? 4e-3 : 1e-5) * expected(i) + 1e-30);
      }
      CHECK(static_cast<double>(row.largest) == largest);
      CHECK(row.targetLogit == logits[static_cast<size_t>(target)]);
      CHECK(row.sum == doctest::Approx(sum).epsilon(1e-6));
    }
  }
}

TEST_CASE("a NaN logit makes the loss NaN" * onCpu) {
  std::vector<float> logits(100, 0.0f);
  logits[57] = std::nanf("");
  cpu::RunningSoftmax row;
  cpu::kernels().f32.addToSoftmax(logits.data(), 100, -1, row, nullptr);
  CHECK(std::isnan(row.sum));
}

TEST_CASE("LORA_DA_ISA chooses the kernels" * onCpu) {
  const char* wanted = std::getenv("LORA_DA_ISA");
  if (wanted) CHECK(std::string(cpu::kernels().isa) == wanted);
}
