// The whole decoder on a small random checkpoint: properties that hold whatever the weights are.
#include <doctest/doctest.h>

#include <cmath>
#include <fstream>

#include "core/error.h"
#include "fisher/statistics.h"
#include "init/adapter_initialization.h"
#include "model/decoder.h"
#include "random_checkpoint.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

StepOptions plainStep(Recompute recompute = Recompute::none) {
  StepOptions options;
  options.optimizer.learningRate = 0.01f;
  options.recompute = recompute;
  return options;
}

}  // namespace

DEVICE_TEST_CASE("factor gradients are the slope of the loss") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  model->addLora(checkpoint.modules, 2, 1.5f);
  const std::vector<AdapterFactors> start = checkpoint.randomFactors(*model);
  model->lora()->write(model->device(), LoraSet::Array::value, start);
  const TokenBatch batch = checkpoint.batch({9, 14, 3});
  const auto loss = [&] {
    const Evaluation evaluation = model->evaluate(batch);
    double sum = 0, count = 0;
    for (size_t i = 0; i < evaluation.losses.size(); ++i) {
      sum += evaluation.losses[i] * evaluation.labelTokens[i];
      count += evaluation.labelTokens[i];
    }
    return sum / count;
  };
  // With beta1 = 0, the first moment after one step is the gradient itself.
  StepOptions options = plainStep();
  options.optimizer.beta1 = 0;
  model->trainStep({batch}, options);
  const std::vector<AdapterFactors> gradients = model->lora()->read(model->device(), LoraSet::Array::firstMoment);

  for (size_t module = 0; module < start.size(); ++module) {
    CAPTURE(start[module].module);
    // Along the gradient of one module's factors the slope is the gradient's squared norm.
    double squared = 0;
    for (const float g : gradients[module].a) squared += static_cast<double>(g) * static_cast<double>(g);
    for (const float g : gradients[module].b) squared += static_cast<double>(g) * static_cast<double>(g);
    const double step = 2e-3 / std::sqrt(squared);
    const auto lossAt = [&](double distance) {
      std::vector<AdapterFactors> moved = start;
      for (size_t i = 0; i < moved[module].a.size(); ++i)
        moved[module].a[i] += static_cast<float>(distance) * gradients[module].a[i];
      for (size_t i = 0; i < moved[module].b.size(); ++i)
        moved[module].b[i] += static_cast<float>(distance) * gradients[module].b[i];
      model->lora()->write(model->device(), LoraSet::Array::value, moved);
      return loss();
    };
    const double slope = (lossAt(step) - lossAt(-step)) / (2 * step);
    CHECK(slope == doctest::Approx(squared).epsilon(0.02));
  }
}

DEVICE_TEST_CASE("recomputing layers gives the same bits as keeping activations") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    RandomCheckpoint checkpoint(seed);
    const auto kept = checkpoint.load(tested, type), recomputed = checkpoint.load(tested, type);
    kept->addLora(checkpoint.modules, 3, 1.0f);
    recomputed->addLora(checkpoint.modules, 3, 1.0f);
    const auto start = checkpoint.randomFactors(*kept);
    kept->lora()->write(kept->device(), LoraSet::Array::value, start);
    recomputed->lora()->write(recomputed->device(), LoraSet::Array::value, start);
    const TokenBatch batch = checkpoint.batch({20, 7});
    const StepResult a = kept->trainStep({batch}, plainStep()), b = recomputed->trainStep({batch}, plainStep(Recompute::layer));
    CHECK(a.loss == b.loss);
    CHECK(a.gradNorm == b.gradNorm);
    CHECK(flatten(kept->lora()->read(kept->device(), LoraSet::Array::value)) ==
          flatten(recomputed->lora()->read(recomputed->device(), LoraSet::Array::value)));
  }
}

TEST_CASE("a step is cut into even passes between its sequences" * cpuOnly("no device takes part")) {
  RandomCheckpoint checkpoint(freshSeed());
  const TokenBatch batch = checkpoint.batch({40, 3, 30, 50, 2, 90});
  const auto lengthsOf = [](const std::vector<TokenBatch>& passes) {
    std::vector<std::vector<int32_t>> lengths;
    for (const TokenBatch& pass : passes) {
      lengths.emplace_back();
      for (size_t i = 0; i + 1 < pass.sequenceStarts.size(); ++i) {
        lengths.back().push_back(pass.sequenceStarts[i + 1] - pass.sequenceStarts[i]);
      }
    }
    return lengths;
  };
  using Lengths = std::vector<std::vector<int32_t>>;
  CHECK(lengthsOf(splitIntoPasses(batch, 215)) == Lengths{{40, 3, 30, 50, 2, 90}});
  CHECK(lengthsOf(splitIntoPasses(batch, 214)) == Lengths{{40, 3, 30, 50}, {2, 90}});
  CHECK(lengthsOf(splitIntoPasses(batch, 60)) == Lengths{{40, 3}, {30}, {50, 2}, {90}});
}

// A step on `large` as one batch and as the passes of at most so many tokens that it is cut into.
void compareWithPasses(const TestDevice& tested, RandomCheckpoint& checkpoint, const TokenBatch& large, int64_t most,
                       bool sameBits) {
  const std::vector<AdapterFactors> start = [&] {
    const auto model = checkpoint.load(tested);
    model->addLora(checkpoint.modules, 2, 1.5f);
    return checkpoint.randomFactors(*model);
  }();
  std::vector<std::vector<float>> gradients, factors;
  std::vector<StepResult> results;
  StepOptions options = plainStep();
  options.optimizer.beta1 = 0;  // the first moment after one step is the gradient itself
  for (const std::vector<TokenBatch>& batches : {std::vector<TokenBatch>{large}, splitIntoPasses(large, most)}) {
    const auto model = checkpoint.load(tested);
    model->addLora(checkpoint.modules, 2, 1.5f);
    model->lora()->write(model->device(), LoraSet::Array::value, start);
    results.push_back(model->trainStep(batches, options));
    gradients.push_back(flatten(model->lora()->read(model->device(), LoraSet::Array::firstMoment)));
    factors.push_back(flatten(model->lora()->read(model->device(), LoraSet::Array::value)));
  }
  if (sameBits) {
    CHECK(results[0].loss == results[1].loss);
    CHECK(results[0].gradNorm == results[1].gradNorm);
    CHECK(factors[0] == factors[1]);
  } else {
    CHECK(results[0].loss == doctest::Approx(results[1].loss).epsilon(1e-5));
    CHECK(relativeDifference(gradients[0], gradients[1]) < 1e-5);
  }
}

DEVICE_TEST_CASE("the gradients of a step's passes add up") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  compareWithPasses(tested, checkpoint, checkpoint.batch({60, 30, 40, 130}), 100, false);
}

DEVICE_TEST_CASE("a batch of more tokens than a pass takes is cut by itself") {
  if (smallCasesOnly()) return;
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto most = static_cast<int32_t>(tested.make(DType::f32)->passTokens());
  // One row alone exceeds a pass.
  compareWithPasses(tested, checkpoint, checkpoint.batch({most - 100, 300, 40, most + 70}), most, true);
}

DEVICE_TEST_CASE("steps that a device replays have the bits of steps that it does not") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  // All of 128 rows with as many label rows; only their sequences and labels differ.
  const std::vector<std::vector<int32_t>> lengths = {{20, 30, 40}, {100, 7}, {127}, {33, 33, 33}, {5, 88}};
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Recompute recompute : {Recompute::none, Recompute::layer}) {
      CAPTURE(nameOf(type));
      RandomCheckpoint checkpoint(seed);
      // A device that is profiled replays nothing.
      const auto replaying = checkpoint.load(tested, type), plain = checkpoint.load(tested, type, true);
      replaying->addLora(checkpoint.modules, 2, 1.5f);
      plain->addLora(checkpoint.modules, 2, 1.5f);
      const auto start = checkpoint.randomFactors(*plain);
      for (Decoder* model : {replaying.get(), plain.get()}) model->lora()->write(model->device(), LoraSet::Array::value, start);
      StepOptions options = plainStep(recompute);
      for (size_t i = 0; i < lengths.size(); ++i) {
        std::vector<TokenBatch> batches = {checkpoint.batch(lengths[i])};
        if (i % 2) batches.push_back(checkpoint.batch(lengths[0]));
        options.optimizer.step = static_cast<int64_t>(i) + 1;
        options.optimizer.learningRate = 0.02f / static_cast<float>(i + 1);
        const StepResult a = replaying->trainStep(batches, options), b = plain->trainStep(batches, options);
        CHECK(a.loss == b.loss);
        CHECK(a.gradNorm == b.gradNorm);
      }
      for (const auto array : {LoraSet::Array::value, LoraSet::Array::secondMoment}) {
        CHECK(flatten(replaying->lora()->read(replaying->device(), array)) ==
              flatten(plain->lora()->read(plain->device(), array)));
      }
      // The pass and the update.
      CHECK(replaying->device().recordings() == (tested.replays() ? 2 : 0));
    }
  }
}

DEVICE_TEST_CASE("a step that was cancelled leaves the device fit for the next") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto cancelled = checkpoint.load(tested), fresh = checkpoint.load(tested);
  cancelled->addLora(checkpoint.modules, 2, 1.0f);
  fresh->addLora(checkpoint.modules, 2, 1.0f);
  const auto start = checkpoint.randomFactors(*fresh);
  for (Decoder* model : {cancelled.get(), fresh.get()}) model->lora()->write(model->device(), LoraSet::Array::value, start);
  const TokenBatch batch = checkpoint.batch({20, 7});
  cancelled->cancelled = true;
  CHECK_THROWS_AS(cancelled->trainStep({batch}, plainStep()), Error);
  cancelled->cancelled = false;
  CHECK(cancelled->trainStep({batch}, plainStep()).gradNorm == fresh->trainStep({batch}, plainStep()).gradNorm);
  CHECK(flatten(cancelled->lora()->read(cancelled->device(), LoraSet::Array::value)) ==
        flatten(fresh->lora()->read(fresh->device(), LoraSet::Array::value)));
}

DEVICE_TEST_CASE("adapters on some modules only leave the others alone") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  const std::vector<std::string> some = {"layers.0.q_proj", "layers.0.v_proj", "layers.1.down_proj"};
  model->addLora(some, 2, 1.0f);
  const auto start = checkpoint.randomFactors(*model);
  model->lora()->write(model->device(), LoraSet::Array::value, start);
  for (int step = 0; step < 3; ++step) model->trainStep({checkpoint.batch({11, 5})}, plainStep());
  const auto trained = model->lora()->read(model->device(), LoraSet::Array::value);
  REQUIRE(trained.size() == some.size());
  for (size_t i = 0; i < some.size(); ++i) {
    CHECK(trained[i].module == some[i]);
    CHECK(trained[i].a != start[i].a);
    CHECK(trained[i].b != start[i].b);
  }
}

DEVICE_TEST_CASE("an adapter and its merged weights give the same logits") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  model->addLora(checkpoint.modules, 2, 0.8f);
  const auto factors = checkpoint.randomFactors(*model);
  model->lora()->write(model->device(), LoraSet::Array::value, factors);
  const TokenBatch batch = checkpoint.batch({12});
  const std::vector<float> adapted = model->logits(batch);

  std::fstream file(checkpoint.path, std::ios::binary | std::ios::in | std::ios::out);
  std::vector<std::pair<std::string, std::vector<float>>> merged;
  for (const AdapterFactors& entry : factors) merged.emplace_back(entry.module, model->mergedWeight(entry.module));
  for (const auto& [module, values] : merged) {
    for (const TensorSource& tensor : checkpoint.tensors) {
      if (tensor.name != module + ".weight") continue;
      file.seekp(static_cast<std::streamoff>(tensor.offset));
      file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
    }
  }
  file.close();
  const std::vector<float> plain = checkpoint.load(tested)->logits(batch);
  CHECK(relativeDifference(adapted, plain) < 1e-5);
}

DEVICE_TEST_CASE("generation with the cache continues as the full forward pass says") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  GenerateOptions options;
  options.inputIds = checkpoint.batch({7}).inputIds;
  options.maxNewTokens = 9;
  std::vector<int32_t> seen;
  const std::vector<int32_t> generated = model->generate(options, [&](int32_t id) { seen.push_back(id); });
  CHECK(seen == generated);
  std::vector<int32_t> ids = options.inputIds;
  for (const int32_t id : generated) {
    const auto length = static_cast<int32_t>(ids.size());
    const std::vector<float> logits = model->logits({ids, std::vector<int32_t>(ids.size(), -100), {0, length}});
    const auto last = logits.end() - checkpoint.spec.vocabSize;
    CHECK(id == static_cast<int32_t>(std::max_element(last, logits.end()) - last));
    ids.push_back(id);
  }
}

DEVICE_TEST_CASE("a NaN in the factors stops the step and leaves the factors as they were") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  model->addLora(checkpoint.modules, 2, 1.0f);
  auto factors = checkpoint.randomFactors(*model);
  factors[0].a[0] = std::numeric_limits<float>::quiet_NaN();
  model->lora()->write(model->device(), LoraSet::Array::value, factors);
  CHECK_THROWS_AS(model->trainStep({checkpoint.batch({8})}, plainStep()), Error);
  const auto after = model->lora()->read(model->device(), LoraSet::Array::value);
  CHECK(after[1].a == factors[1].a);
  CHECK(after[1].b == factors[1].b);
}

DEVICE_TEST_CASE("a checkpoint file cut while it is mapped is an error, not a dead process") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed);
  const auto model = checkpoint.load(tested);
  REQUIRE(truncate(checkpoint.path.c_str(), 64) == 0);
  try {
    model->logits(checkpoint.batch({6}));
    FAIL("expected an error");
  } catch (const Error& error) {
    CHECK(error.code() == code::fileTruncated);
    CHECK(std::string(error.what()).find(checkpoint.path) != std::string::npos);
  }
}

DEVICE_TEST_CASE("a sequence beyond what the rotary embedding holds for is refused") {
  RandomCheckpoint checkpoint(freshSeed());
  checkpoint.spec.positionLimit = 10;
  const auto model = checkpoint.load(tested);
  CHECK_NOTHROW(model->evaluate(checkpoint.batch({10})));
  CHECK_THROWS_AS(model->evaluate(checkpoint.batch({11})), Error);
}

TEST_CASE("bad batches are refused" * cpuOnly("no device takes part")) {
  CHECK_THROWS_AS(packBatch({{1, 99}, {1, 1}, {0, 2}}, 50), Error);
  CHECK_THROWS_AS(packBatch({{1, 2}, {1, 60}, {0, 2}}, 50), Error);
  CHECK_THROWS_AS(packBatch({{1, 2}, {1}, {0, 2}}, 50), Error);
  CHECK_THROWS_AS(packBatch({{1, 2}, {1, 2}, {0, 0, 2}}, 50), Error);
}

DEVICE_TEST_CASE("a sequence's loss does not depend on what else is in the batch") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    CAPTURE(nameOf(type));
    RandomCheckpoint checkpoint(seed);
    const auto model = checkpoint.load(tested, type);
    const std::vector<int32_t> lengths = {175, 3, 153, 64, 65, 190, 1, 40};
    const TokenBatch together = checkpoint.batch(lengths);
    const Evaluation packed = model->evaluate(together);
    for (size_t i = 0; i < lengths.size(); ++i) {
      CAPTURE(lengths[i]);
      const auto first = together.inputIds.begin() + together.sequenceStarts[i];
      const auto firstLabel = together.labels.begin() + together.sequenceStarts[i];
      const Evaluation alone =
          model->evaluate({{first, first + lengths[i]}, {firstLabel, firstLabel + lengths[i]}, {0, lengths[i]}});
      CHECK(alone.labelTokens[0] == packed.labelTokens[i]);
      if (alone.labelTokens[0] > 0) CHECK(alone.losses[0] == doctest::Approx(packed.losses[i]).epsilon(1e-3));
    }
  }
}
