// Gradient norm and AdamW against torch.optim.AdamW's formula in float64.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

struct Tensor {
  DeviceVector<float> value, grad, firstMoment, secondMoment;
  DeviceVector<uint16_t> shadow;
  std::vector<double> v, m, s;  // the same in float64: value and moments

  // `shifted`: which of the five begins an element behind where vectors may be read and written.
  Tensor(Device& device, size_t count, std::mt19937_64& random, int shifted = -1)
      : value(device, std::vector<float>(count), shifted == 0),
        grad(device, std::vector<float>(count), shifted == 1),
        firstMoment(device, std::vector<float>(count), shifted == 2),
        secondMoment(device, std::vector<float>(count), shifted == 3),
        shadow(device, std::vector<uint16_t>(count), shifted == 4) {
    std::normal_distribution<double> normal;
    for (float& x : value.edit()) x = static_cast<float>(0.1 * normal(random));
    v.assign(value.host().begin(), value.host().end());
    m.assign(count, 0.0);
    s.assign(count, 0.0);
    newGrad(random);
  }
  void newGrad(std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    for (float& x : grad.edit()) x = static_cast<float>(std::pow(10.0, 2 * normal(random) - 3) * normal(random));
  }
  Parameter parameter() {
    Parameter p;
    p.value = value.data();
    p.grad = grad.data();
    p.firstMoment = firstMoment.data();
    p.secondMoment = secondMoment.data();
    p.shadow = shadow.data();
    p.count = static_cast<int64_t>(value.size());
    return p;
  }
  void expectStep(const AdamWStep& step, double gradScale) {
    const double beta1 = step.beta1, beta2 = step.beta2, rate = step.learningRate;
    const double correction1 = 1 - std::pow(beta1, static_cast<double>(step.step));
    const double correction2 = 1 - std::pow(beta2, static_cast<double>(step.step));
    for (size_t i = 0; i < v.size(); ++i) {
      const double g = grad[i] * gradScale;
      v[i] *= 1 - rate * static_cast<double>(step.weightDecay);
      m[i] = beta1 * m[i] + (1 - beta1) * g;
      s[i] = beta2 * s[i] + (1 - beta2) * g * g;
      v[i] -= rate / correction1 * m[i] / (std::sqrt(s[i]) / std::sqrt(correction2) + static_cast<double>(step.epsilon));
    }
  }
};

struct Problem {
  std::vector<Tensor> tensors;

  Problem(Device& device, std::mt19937_64& random) {
    for (size_t count : {1, 7, 130, 8192, 8193, 40001}) tensors.emplace_back(device, count, random);
    // More of them than a device may take at a time.
    for (int i = 0; i < 70; ++i) tensors.emplace_back(device, static_cast<size_t>(20 + i), random, i % 6 - 1);
  }
  std::vector<Parameter> parameters() {
    std::vector<Parameter> result;
    for (Tensor& t : tensors) result.push_back(t.parameter());
    return result;
  }
  double norm() const {
    double sum = 0;
    for (const Tensor& t : tensors) {
      for (float g : t.grad.host()) sum += static_cast<double>(g) * static_cast<double>(g);
    }
    return std::sqrt(sum);
  }
};

}  // namespace

DEVICE_TEST_CASE("gradNorm is the norm over all parameters, the same bits each time") {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const auto device = tested.make(DType::f32);
  Problem p(*device, random);
  const DeviceVector<double> norm(*device, {-1}), again(*device, {-1});
  device->gradNorm(p.parameters(), norm.data());
  device->gradNorm(p.parameters(), again.data());
  CHECK(norm[0] == doctest::Approx(p.norm()).epsilon(1e-12));
  CHECK(again[0] == norm[0]);
}

TEST_CASE("gradNorm has the same bits for any number of threads" * cpuOnly("no other device has threads")) {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::vector<double> norms;
  for (int threads : {1, 2, 3}) {
    std::mt19937_64 random(seed);
    const auto device = cpuDevice(DType::f32, threads);
    Problem p(*device, random);
    const DeviceVector<double> norm(*device, {-1});
    device->gradNorm(p.parameters(), norm.data());
    norms.push_back(norm[0]);
    CHECK(norms.back() == norms.front());
  }
}

DEVICE_TEST_CASE("the norm of no gradient is zero") {
  const auto device = tested.make(DType::f32);
  const DeviceVector<double> norm(*device, {-1});
  device->gradNorm({}, norm.data());
  CHECK(norm[0] == 0);
}

DEVICE_TEST_CASE("adamw takes torch's steps, clips, and refreshes the shadows") {
  for (float maxGradNorm : {0.0f, 1.0f, 1e9f}) {
    const uint64_t seed = freshSeed();
    INFO("seed ", seed, ", maxGradNorm ", maxGradNorm);
    std::mt19937_64 random(seed);
    const auto device = tested.make(DType::bf16);
    Problem p(*device, random);
    AdamWStep step;
    step.learningRate = 1e-2f;
    step.weightDecay = 0.1f;
    step.maxGradNorm = maxGradNorm;
    const DeviceVector<double> norm(*device, {0}), loss(*device, {1});
    for (step.step = 1; step.step <= 5; ++step.step) {
      device->gradNorm(p.parameters(), norm.data());
      const double gradScale = maxGradNorm > 0 ? std::min(1.0, static_cast<double>(maxGradNorm) / (norm[0] + 1e-6)) : 1;
      const DeviceVector<AdamWStep> deviceStep(*device, {step});
      device->adamw(p.parameters(), deviceStep.data(), norm.data(), loss.data());
      for (Tensor& t : p.tensors) {
        t.expectStep(step, gradScale);
        t.newGrad(random);
      }
    }
    double worst = 0, worstMoment = 0;
    bool shadows = true;
    for (const Tensor& t : p.tensors) {
      for (size_t i = 0; i < t.v.size(); ++i) {
        worst = std::max(worst, std::abs(t.value[i] - t.v[i]));
        worstMoment = std::max(worstMoment, std::abs(t.secondMoment[i] - t.s[i]) / (t.s[i] + 1e-30));
        shadows = shadows && t.shadow[i] == floatToBf16(t.value[i]);
      }
    }
    CHECK(worst < 2e-7);
    CHECK(worstMoment < 1e-6);
    CHECK(shadows);
  }
}

DEVICE_TEST_CASE("adamw works without shadows") {
  std::mt19937_64 random(freshSeed());
  const auto device = tested.make(DType::f32);
  Tensor t(*device, 33, random);
  Parameter parameter = t.parameter();
  parameter.shadow = nullptr;
  AdamWStep step;
  step.learningRate = 1e-3f;
  const DeviceVector<AdamWStep> deviceStep(*device, {step});
  const DeviceVector<double> norm(*device, {1}), loss(*device, {1});
  device->adamw({parameter}, deviceStep.data(), norm.data(), loss.data());
  t.expectStep(step, 1);
  for (size_t i = 0; i < 33; ++i) CHECK(t.value[i] == doctest::Approx(t.v[i]).epsilon(1e-6));
}

DEVICE_TEST_CASE("adamw changes nothing after a norm or loss that is not finite") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const struct { double norm, loss; } bad[] = {{nan, 1}, {infinity, 1}, {1, nan}, {1, -infinity}};
  for (const auto& numbers : bad) {
    std::mt19937_64 random(freshSeed());
    const auto device = tested.make(DType::bf16);
    Tensor t(*device, 100, random);
    const std::vector<float> before = t.value.host();
    AdamWStep step;
    step.learningRate = 1;
    const DeviceVector<AdamWStep> deviceStep(*device, {step});
    const DeviceVector<double> norm(*device, {numbers.norm}), loss(*device, {numbers.loss});
    device->adamw({t.parameter()}, deviceStep.data(), norm.data(), loss.data());
    CHECK(t.value.host() == before);
    CHECK(t.firstMoment.host() == std::vector<float>(100, 0.0f));
    CHECK(t.shadow.host() == std::vector<uint16_t>(100, 0));
  }
}
