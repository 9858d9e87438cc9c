// The two orders of collection, and the choice between them.
#include <doctest/doctest.h>

#include "core/error.h"
#include "fisher/layer_major.h"
#include "init/adapter_initialization.h"
#include "random_checkpoint.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

const InitializationProgress ignoreProgress = [](auto...) {};

std::vector<TokenBatch> threeBatches(RandomCheckpoint& checkpoint) {
  return {checkpoint.batch({9, 30, 41, 5}), checkpoint.batch({64}), checkpoint.batch({12, 17})};
}

// Work for LoRA-DA on every module, or on those of the layers from `firstLayer` on.
CollectionWork loraDaWork(Decoder& model, const std::vector<TokenBatch>& batches, int64_t firstLayer = 0) {
  CollectionWork work;
  for (const TokenBatch& batch : batches) work.batches.push_back(packBatch(batch, model.spec().vocabSize));
  work.method = findInitializer("lora-da");
  work.rank = 2;
  for (const Projection* group : model.projections()) {
    const bool wanted = group->index >= static_cast<size_t>(firstLayer) * groupsPerLayer;
    work.wanted.push_back(wanted);
    work.modules.push_back(wanted ? group->parts.size() : 0);
  }
  return work;
}

struct HostStatistics {
  std::vector<float> gradient;
  std::vector<double> inputMoment, outputFactor;
};

HostStatistics takeToHost(Decoder& model, Statistics& statistics, size_t group) {
  GroupStatistics taken = statistics.take(group);
  const int64_t in = model.projections()[group]->in, out = model.projections()[group]->out;
  HostStatistics host{std::vector<float>(static_cast<size_t>(out * in)), std::vector<double>(static_cast<size_t>(in * in)),
                      std::move(taken.outputFactor)};
  auto* moment = static_cast<double*>(taken.inputMoment.get());
  model.device().mirrorLower(moment, in);
  model.device().download(host.gradient.data(), taken.gradient.get(), host.gradient.size() * sizeof(float));
  model.device().download(host.inputMoment.data(), moment, host.inputMoment.size() * sizeof(double));
  model.device().synchronize();
  return host;
}

AdapterInitialization loraDa(TokenMask mask, CollectionRequest collection) {
  AdapterInitialization initialization;
  initialization.method = "lora-da";
  initialization.tokenMask = mask;
  initialization.options.population = 100;
  initialization.options.damping = 1e-3;
  initialization.collection = collection;
  return initialization;
}

}  // namespace

DEVICE_TEST_CASE("layer-major order adds up the same bits as sample-major") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    RandomCheckpoint checkpoint(seed, 5);
    const auto model = checkpoint.load(tested, type);
    const std::vector<TokenBatch> batches = threeBatches(checkpoint);
    for (const TokenMask mask : {TokenMask::attention, TokenMask::labels}) {
      Statistics together = collectStatistics(*model, batches, {true, true, true}, mask, ignoreProgress);
      std::vector<HostStatistics> expected;
      for (size_t i = 0; i < model->projections().size(); ++i) expected.push_back(takeToHost(*model, together, i));
      for (const int64_t layersPerCheckpoint : {1, 2, 3, 5}) {
        CAPTURE(layersPerCheckpoint);
        for (const int64_t firstLayer : {0, 3}) {
          CollectionWork work = loraDaWork(*model, batches, firstLayer);
          int64_t steps = 0, layersSeen = 0;
          const auto compare = [&](int64_t layer, Statistics& statistics) {
            ++layersSeen;
            CHECK(statistics.samples() == 7);
            for (size_t i = static_cast<size_t>(layer) * groupsPerLayer; i < static_cast<size_t>(layer + 1) * groupsPerLayer;
                 ++i) {
              const HostStatistics found = takeToHost(*model, statistics, i);
              CHECK(found.gradient == expected[i].gradient);
              CHECK(found.inputMoment == expected[i].inputMoment);
              CHECK(found.outputFactor == expected[i].outputFactor);
            }
          };
          collectByLayer(*model, work, mask, layersPerCheckpoint, compare, [&] { ++steps; });
          CHECK(layersSeen == 5 - firstLayer);
          CHECK(steps == layerMajorSteps(*model, work, layersPerCheckpoint));
        }
      }
    }
  }
}

DEVICE_TEST_CASE("both plans start adapters with the same bits and report modules in the model's order") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  RandomCheckpoint checkpoint(seed, 3);
  const std::vector<TokenBatch> batches = threeBatches(checkpoint);
  const std::vector<std::string> some = {"layers.1.q_proj", "layers.1.v_proj", "layers.2.gate_proj", "layers.2.down_proj"};
  for (const auto& modules : {checkpoint.modules, some}) {
    for (const TokenMask mask : {TokenMask::attention, TokenMask::labels}) {
      std::vector<AdapterInitializationResult> results;
      std::vector<std::vector<float>> factors;
      for (const CollectionOrder order : {CollectionOrder::sampleMajor, CollectionOrder::layerMajor}) {
        const auto model = checkpoint.load(tested);
        model->addLora(modules, 2, 1.0f);
        results.push_back(initializeAdapters(*model, batches, loraDa(mask, {order, 0}), ignoreProgress));
        factors.push_back(flatten(model->lora()->read(model->device(), LoraSet::Array::value)));
        CHECK(results.back().plan->order == order);
      }
      CHECK(factors[0] == factors[1]);
      REQUIRE(results[1].modules.size() == modules.size());
      for (size_t i = 0; i < modules.size(); ++i) {
        CHECK(results[1].modules[i].module == modules[i]);
        CHECK(results[1].modules[i].sigma == results[0].modules[i].sigma);
        CHECK(results[1].modules[i].conditionNumber == results[0].modules[i].conditionNumber);
      }
    }
  }
}

DEVICE_TEST_CASE("an initialization that does not fit says what it needs and leaves the factors alone") {
  RandomCheckpoint checkpoint(freshSeed());
  const auto model = checkpoint.load(tested);
  model->addLora(checkpoint.modules, 2, 1.0f);
  const auto start = checkpoint.randomFactors(*model);
  model->lora()->write(model->device(), LoraSet::Array::value, start);
  const std::vector<TokenBatch> batches = threeBatches(checkpoint);
  for (const auto& order : {std::optional<CollectionOrder>(), std::optional(CollectionOrder::sampleMajor)}) {
    try {
      initializeAdapters(*model, batches, loraDa(TokenMask::attention, {order, 1000}), ignoreProgress);
      FAIL("expected an error");
    } catch (const Error& error) {
      const std::string message = error.what();
      CAPTURE(message);
      CHECK(error.code() == code::outOfMemory);
      for (const char* part : {"7 samples", "the memory budget is 0.00 GB", "--samples", "--max-length"}) {
        CHECK(message.find(part) != std::string::npos);
      }
      CHECK((message.find("layer-major") != std::string::npos) == order.has_value());
    }
  }
  CHECK(flatten(model->lora()->read(model->device(), LoraSet::Array::value)) == flatten(start));
}

// The first model loads what the device's libraries load once.
DEVICE_TEST_CASE("a start holds no more of its device's memory than its plan says") {
  if (tested.onCpu()) return;                   // its memory is the process', the test's own included
  constexpr size_t rounding = size_t{8} << 20;  // a driver hands memory out in pages of megabytes
  for (const auto order : {CollectionOrder::sampleMajor, CollectionOrder::layerMajor}) {
    for (const bool loaded : {false, true}) {
      RandomCheckpoint checkpoint(freshSeed(), 3);
      const auto model = checkpoint.load(tested);
      const std::vector<TokenBatch> batches = threeBatches(checkpoint);
      model->addLora(checkpoint.modules, 2, 1);
      size_t most = 0;
      const auto watch = [&](auto...) { most = std::max(most, model->device().memory().held); };
      const AdapterInitializationResult result =
          initializeAdapters(*model, batches, loraDa(TokenMask::attention, {order, 0}), watch);
      REQUIRE(most > 0);
      if (loaded) CHECK(most <= result.plan->total() + rounding);
    }
  }
}

// Plans count what the process holds, so that budgets a few MB apart tell nothing while freed memory rests.
DEVICE_TEST_CASE("the fastest plan that fits is taken, with as many streams kept as fit" * doctest::skip(!ownHeap)) {
  RandomCheckpoint checkpoint(freshSeed(), 5);
  const auto model = checkpoint.load(tested);
  // A stream of 2^16 tokens takes 6 MB; nothing is computed here.
  const CollectionWork work = loraDaWork(*model, {checkpoint.batch(std::vector<int32_t>(1 << 10, 64))});
  const size_t stream = static_cast<size_t>(work.rows() * model->spec().hiddenSize) * sizeof(float);
  const CollectionPlan all = sampleMajorPlan(*model, work);
  const CollectionPlan kept = layerMajorPlan(*model, work, 1), second = layerMajorPlan(*model, work, 2);
  CHECK(kept.streams == 6 * stream);
  CHECK(second.streams == 4 * stream);
  CHECK(layerMajorPlan(*model, work, 5).streams == 6 * stream);
  CollectionWork upper = work;
  std::fill_n(upper.wanted.begin(), 3 * groupsPerLayer, false);
  CHECK(layerMajorPlan(*model, upper, 1).streams == 3 * stream);
  CHECK(kept.statistics * 5 == all.statistics);
  CHECK(kept.activations < all.activations);

  const auto chosen = [&](size_t budget) { return chooseCollectionPlan(*model, work, {std::nullopt, budget}); };
  CHECK(chosen(0).order == CollectionOrder::sampleMajor);
  CHECK(chosen(all.total() + stream / 2).order == CollectionOrder::sampleMajor);
  CHECK(chosen(kept.total() + stream / 2).order == CollectionOrder::layerMajor);
  CHECK(chosen(kept.total() + stream / 2).layersPerCheckpoint == 1);
  CHECK(chosen(second.total() + stream / 2).layersPerCheckpoint == 2);
  CHECK_THROWS_AS(chosen(second.total() - stream / 2), Error);
}
