// Ten AdamW steps at the sizes of a real model, SmolLM2-135M with two of its layers, on a device and on the CPU from the same
// start: uneven rows in two shapes of a step that take turns, so that from the third step on everything is replayed.
//
// Tolerances. A float32 sum of n terms errs by about sqrt(n) u of the root of their squares' sum (u = 2^-24; Higham 2002, sec.
// 2.8), so a chain of sums by sqrt(n1 + n2 + ...) u, and two devices' difference by sqrt(2) of that. Losses: the sums on the way
// to a logit, of the logits' size, for the label's logit and for the mean of the others. Gradients: those sums, the ones back, of
// which the head's over the vocabulary is the longest, and the ones over tokens. Factors: with an epsilon above the size of the
// (clipped) gradients an AdamW step is smooth in them, |d step / d gradient| <= rate / epsilon through either moment; so each
// step adds 2 rate / epsilon of the gradients' error. (With the usual 1e-8 the first step is the gradients' signs, which
// rounding turns over where they are near zero.)
//
// bfloat16: the distance to the CPU's float32 is at most 1.5 times that of the CPU's bfloat16; losses are within 1.5 times the
// error that logits have in transformers (reference_test.cpp).
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "model/decoder.h"
#include "random_checkpoint.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

constexpr int64_t layers = 2, rank = 8;
constexpr int steps = 10;
constexpr float learningRate = 5e-3f, epsilon = 1e-2f;
constexpr double logitSize = 2;            // random_checkpoint.h
constexpr double bf16LogitError = 1.3e-2;  // of transformers' logits (reference_test.cpp)

// Lengths of the sums on the way to a logit (projections, scores, values of at most 64 keys), and on the way back to a factor's
// gradient over at most 128 tokens.
constexpr int64_t forwardSums = layers * (576 + 64 + 64 + 576 + 576 + 1536) + 576;
constexpr int64_t backwardSums = 49152 + layers * (576 + 2 * 1536 + 576 + 3 * 64 + 960) + 128;

double roundingError(int64_t sums) {
  return std::sqrt(2.0 * static_cast<double>(sums)) / (1 << 24);
}

DecoderSpec smolLm2() {
  DecoderSpec spec;
  spec.vocabSize = 49152;
  spec.hiddenSize = 576;
  spec.intermediateSize = 1536;
  spec.layers = layers;
  spec.heads = 9;
  spec.kvHeads = 3;
  spec.headDim = 64;
  spec.normEpsilon = 1e-5f;
  spec.attentionScale = 0.125f;
  spec.windows.assign(layers, 0);
  for (int i = 0; i < 32; ++i) spec.inverseFrequencies.push_back(static_cast<float>(std::pow(100000.0, -i / 32.0)));
  spec.tiedHead = true;
  spec.attentionInputs = {
      {"self_attn.q_proj", 576, 576, false}, {"self_attn.k_proj", 192, 576, false}, {"self_attn.v_proj", 192, 576, false}};
  spec.attentionOutput = {"self_attn.o_proj", 576, 576, false};
  spec.mlpInputs = {{"mlp.gate_proj", 1536, 576, false}, {"mlp.up_proj", 1536, 576, false}};
  spec.mlpOutput = {"mlp.down_proj", 576, 1536, false};
  spec.names = {"model.embed_tokens.weight",
                "model.layers.{i}",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
                "",
                "",
                "model.norm.weight",
                ""};
  return spec;
}

struct Trajectory {
  std::vector<double> losses, gradNorms;
  std::vector<std::vector<float>> factors;  // at the start and after each step
  std::vector<float> firstGradient;         // clipped, times 1 - beta1
  std::vector<size_t> recordings;           // after each step

  double moved() const { return distance(factors.front(), factors.back()); }
  // After a step, of two trajectories.
  static double between(const Trajectory& a, const Trajectory& b, int step) {
    return distance(a.factors[static_cast<size_t>(step)], b.factors[static_cast<size_t>(step)]);
  }

 private:
  static double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    return std::sqrt(sum);
  }
};

class Training {
 public:
  explicit Training(uint64_t seed) : checkpoint_(seed, smolLm2(), DType::bf16) {
    for (int32_t i = 0; i < steps; ++i)
      batches_.push_back(
          checkpoint_.batch(i % 2 == 0 ? std::vector<int32_t>{40, 3, 60 - i, 1, 20 + i} : std::vector<int32_t>{7 + i, 30, 12}));
  }

  Trajectory run(const TestDevice& where, DType type) {
    const auto model = checkpoint_.load(where, type);
    Device& device = model->device();
    model->addLora(checkpoint_.modules, rank, 2.0f);
    if (start_.empty()) start_ = checkpoint_.randomFactors(*model);
    model->lora()->write(device, LoraSet::Array::value, start_);
    Trajectory trajectory;
    trajectory.factors.push_back(flatten(start_));
    StepOptions options;
    options.optimizer.learningRate = learningRate;
    options.optimizer.epsilon = epsilon;
    options.optimizer.weightDecay = 0.01f;
    options.optimizer.maxGradNorm = 1;
    options.optimizer.step = 0;
    for (const TokenBatch& batch : batches_) {
      ++options.optimizer.step;
      const StepResult result = model->trainStep({batch}, options);
      trajectory.losses.push_back(result.loss);
      trajectory.gradNorms.push_back(result.gradNorm);
      trajectory.factors.push_back(flatten(model->lora()->read(device, LoraSet::Array::value)));
      trajectory.recordings.push_back(device.recordings());
      if (options.optimizer.step == 1)
        trajectory.firstGradient = flatten(model->lora()->read(device, LoraSet::Array::firstMoment));
    }
    return trajectory;
  }

 private:
  RandomCheckpoint checkpoint_;
  std::vector<TokenBatch> batches_;
  std::vector<AdapterFactors> start_;
};

bool hasCpu() {
  try {
    cpuDevice(DType::f32);
    return true;
  } catch (const Error& error) {
    if (error.code() != code::deviceUnavailable) throw;
    return false;
  }
}

}  // namespace

DEVICE_TEST_CASE("ten steps of SmolLM2's shape are those of the CPU") {
  if (tested.onCpu()) return;
  if (!hasCpu()) {
    MESSAGE("skipped: this build has no CPU device");
    return;
  }
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  Training training(seed);
  const Trajectory expected = training.run({"cpu"}, DType::f32);

  const Trajectory found = training.run(tested, DType::f32);
  const double gradientError = roundingError(forwardSums + backwardSums);
  CHECK(relativeDifference(found.firstGradient, expected.firstGradient) < gradientError);
  // The norm of the clipped gradients is at most 1.
  const double factorError = 2 * static_cast<double>(learningRate / epsilon) * gradientError;
  CHECK(expected.moved() > 100 * steps * factorError);
  for (int step = 1; step <= steps; ++step) {
    CAPTURE(step);
    const auto i = static_cast<size_t>(step - 1);
    const double lossError = 2 * logitSize * roundingError(forwardSums);
    CHECK(std::abs(found.losses[i] - expected.losses[i]) <
          lossError + expected.gradNorms[i] * Trajectory::between(found, expected, step - 1));
    CHECK(Trajectory::between(found, expected, step) < step * factorError);
  }

  const Trajectory cpuRounded = training.run({"cpu"}, DType::bf16), rounded = training.run(tested, DType::bf16);
  CHECK(relativeDifference(rounded.firstGradient, expected.firstGradient) <
        1.5 * relativeDifference(cpuRounded.firstGradient, expected.firstGradient));
  for (int step = 1; step <= steps; ++step) {
    CAPTURE(step);
    const auto i = static_cast<size_t>(step - 1);
    CHECK(std::abs(rounded.losses[i] - expected.losses[i]) < 2 * logitSize * 1.5 * bf16LogitError);
    CHECK(Trajectory::between(rounded, expected, step) < 1.5 * Trajectory::between(cpuRounded, expected, step));
  }

  // The pass over each of the two shapes, and the update.
  for (const Trajectory* trajectory : {&found, &rounded}) {
    CHECK(trajectory->recordings[1] == 3);
    CHECK(trajectory->recordings.back() == 3);
  }
}
