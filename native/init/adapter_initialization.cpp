#include "init/adapter_initialization.h"

#include <chrono>

#include "core/error.h"

namespace lora_da {

namespace {

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool needsSamples(const InitializerNeeds& needs) {
  return needs.gradient || needs.inputMoment || needs.outputFactor;
}

}  // namespace

Statistics collectStatistics(Decoder& model, const std::vector<TokenBatch>& batches, InitializerNeeds needs, TokenMask mask,
                             const InitializationProgress& progress) {
  const auto& projections = model.projections();
  std::vector<bool> wanted(projections.size(), true);
  if (model.lora()) {
    for (size_t i = 0; i < projections.size(); ++i) wanted[i] = model.lora()->group(i) != nullptr;
  }
  Statistics statistics(model.device(), projections, wanted, needs, mask);
  for (size_t i = 0; i < batches.size(); ++i) {
    PackedBatch batch = packBatch(batches[i], model.spec().vocabSize);
    for (size_t sequence = 0; sequence < batch.labelsPerSequence.size(); ++sequence) {
      if (batch.labelsPerSequence[sequence] == 0) throw Error(code::invalidArgument, "a sample has no label tokens");
    }
    statistics.beginBatch(batch);
    model.collectPass(batch, statistics);
    progress(InitializationPhase::collect, static_cast<int64_t>(i + 1), static_cast<int64_t>(batches.size()));
  }
  return statistics;
}

AdapterInitializationResult initializeAdapters(Decoder& model, const std::vector<TokenBatch>& batches,
                                               const AdapterInitialization& initialization,
                                               const InitializationProgress& progress) {
  const Initializer& method = findInitializer(initialization.method);
  LoraSet* lora = model.lora();
  if (!lora) throw Error(code::invalidArgument, "the model has no adapters to initialize");
  AdapterInitializationResult result;
  result.rank = lora->rank();

  const auto collectStart = std::chrono::steady_clock::now();
  const bool collecting = needsSamples(method.needs);
  Statistics statistics = collectStatistics(model, collecting ? batches : std::vector<TokenBatch>(), method.needs,
                                            initialization.tokenMask, progress);
  result.collectSeconds = secondsSince(collectStart);

  const auto solveStart = std::chrono::steady_clock::now();
  InitializationWorkspace workspace(model.device());
  InputMoment moment;
  std::vector<AdapterFactors> all;
  const auto groups = static_cast<int64_t>(lora->groups().size());
  for (int64_t index = 0; index < groups; ++index) {
    const LoraGroup* group = lora->group(static_cast<size_t>(index));
    if (!group) continue;
    const GroupStatistics data = collecting ? statistics.take(static_cast<size_t>(index)) : GroupStatistics();
    if (method.needs.inputMoment) {
      moment.reset(static_cast<double*>(data.inputMoment.get()), group->in, group->blocks.size(), group->blocks.front().module);
    }
    for (const LoraBlock& block : group->blocks) {
      InitializationInput input;
      input.module = block.module;
      input.out = block.out;
      input.in = group->in;
      input.rank = lora->rank();
      input.options = initialization.options;
      if (method.needs.gradient) input.gradient = data.gradient.data() + block.offset * group->in;
      if (method.needs.inputMoment) input.inputMoment = &moment;
      if (method.needs.outputFactor) input.outputFactor = data.outputFactor.data() + block.offset;
      Factors factors;
      ModuleReport report;
      method.initialize(input, workspace, factors, report);
      report.module = block.module;
      all.push_back({block.module, block.out, group->in, lora->rank(), std::move(factors.a), std::move(factors.b)});
      result.modules.push_back(std::move(report));
    }
    progress(InitializationPhase::solve, index + 1, groups);
  }
  lora->write(model.device(), LoraSet::Array::value, all);
  result.solveSeconds = secondsSince(solveStart);
  return result;
}

}  // namespace lora_da
