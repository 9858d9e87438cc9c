#include "init/adapter_initialization.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "fisher/layer_major.h"

namespace lora_da {

namespace {

using Clock = std::chrono::steady_clock;

double secondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

bool needsSamples(const InitializerNeeds& needs) {
  return needs.gradient || needs.inputMoment || needs.outputFactor;
}

std::vector<PackedBatch> packLabelled(const Decoder& model, const std::vector<TokenBatch>& batches) {
  std::vector<PackedBatch> packed;
  for (const TokenBatch& batch : batches) {
    packed.push_back(packBatch(batch, model.spec().vocabSize));
    for (const int32_t labels : packed.back().labelsPerSequence) {
      if (labels == 0) throw Error(code::invalidArgument, "a sample has no label tokens");
    }
  }
  return packed;
}

void collectSamples(Decoder& model, std::vector<PackedBatch>& batches, Statistics& statistics,
                    const InitializationProgress& progress) {
  for (size_t i = 0; i < batches.size(); ++i) {
    statistics.beginBatch(batches[i]);
    model.collectPass(batches[i], statistics);
    progress(InitializationPhase::collect, static_cast<int64_t>(i + 1), static_cast<int64_t>(batches.size()));
  }
}

// The factors of all modules, found group by group, several groups at once where the device gains by it, and set together.
class Solver {
 public:
  Solver(Decoder& model, const Initializer& method, const AdapterInitialization& initialization)
      : device_(model.device()),
        lora_(*model.lora()),
        method_(method),
        initialization_(initialization),
        groups_(lora_.groups().size()) {}

  // The modules of these groups, whose statistics are taken one by one; groupDone is called after each, by one thread at a time.
  void solve(const std::vector<size_t>& indices, Statistics& statistics, const std::function<void()>& groupDone) {
    int64_t order = 0;
    for (const size_t index : indices) order = std::max(order, lora_.groups()[index].in);
    // They go with this call: the next layer's statistics take their place.
    std::vector<std::unique_ptr<Worker>> workers;
    for (int i = 0; i < device_.concurrency(order); ++i) workers.push_back(std::make_unique<Worker>(device_));
    std::mutex mutex;
    device_.concurrently(order, static_cast<int64_t>(indices.size()), [&](int64_t item, int worker) {
      const size_t index = indices[static_cast<size_t>(item)];
      solveGroup(*workers[static_cast<size_t>(worker)], index, statistics.take(index));
      const std::lock_guard<std::mutex> lock(mutex);
      groupDone();
    });
  }
  std::vector<ModuleReport> finish() {
    std::vector<AdapterFactors> factors;
    std::vector<ModuleReport> reports;
    for (Group& group : groups_) {
      std::move(group.factors.begin(), group.factors.end(), std::back_inserter(factors));
      std::move(group.reports.begin(), group.reports.end(), std::back_inserter(reports));
    }
    lora_.write(device_, LoraSet::Array::value, factors);
    return reports;
  }

 private:
  struct Group {
    std::vector<AdapterFactors> factors;
    std::vector<ModuleReport> reports;
  };
  // What one thread works with.
  struct Worker {
    explicit Worker(Device& device) : workspace(device) {}
    InitializationWorkspace workspace;
    InputMoment moment;
  };

  void solveGroup(Worker& worker, size_t index, const GroupStatistics& data) {
    const LoraGroup& group = lora_.groups()[index];
    if (method_.needs.inputMoment) {
      worker.moment.reset(static_cast<double*>(data.inputMoment.get()), group.in, group.blocks.size(),
                          group.blocks.front().module);
    }
    for (const LoraBlock& block : group.blocks) {
      InitializationInput input;
      input.module = block.module;
      input.out = block.out;
      input.in = group.in;
      input.rank = lora_.rank();
      input.options = initialization_.options;
      if (method_.needs.gradient) input.gradient = static_cast<const float*>(data.gradient.get()) + block.offset * group.in;
      if (method_.needs.inputMoment) input.inputMoment = &worker.moment;
      if (method_.needs.outputFactor) input.outputFactor = data.outputFactor.data() + block.offset;
      Factors factors;
      ModuleReport report;
      method_.initialize(input, worker.workspace, factors, report);
      report.module = block.module;
      groups_[index].factors.push_back(
          {block.module, block.out, group.in, lora_.rank(), std::move(factors.a), std::move(factors.b)});
      groups_[index].reports.push_back(std::move(report));
    }
  }

  Device& device_;
  LoraSet& lora_;
  const Initializer& method_;
  const AdapterInitialization& initialization_;
  std::vector<Group> groups_;
};

CollectionWork workOf(Decoder& model, const Initializer& method, const std::vector<TokenBatch>& batches) {
  if (!model.lora()) throw Error(code::invalidArgument, "the model has no adapters to initialize");
  const LoraSet& lora = *model.lora();
  CollectionWork work;
  if (needsSamples(method.needs)) work.batches = packLabelled(model, batches);
  work.method = method;
  work.rank = lora.rank();
  for (size_t i = 0; i < lora.groups().size(); ++i) {
    const LoraGroup* group = lora.group(i);
    work.wanted.push_back(group != nullptr);
    work.modules.push_back(group ? group->blocks.size() : 0);
  }
  return work;
}

std::optional<CollectionPlan> planOf(Decoder& model, const CollectionWork& work, const AdapterInitialization& initialization) {
  if (!needsSamples(work.method.needs)) return std::nullopt;
  return chooseCollectionPlan(model, work, initialization.collection);
}

// All modules at once. Without samples there is nothing to collect first.
void runSampleMajor(Decoder& model, CollectionWork& work, TokenMask mask, Solver& solver, const InitializationProgress& progress,
                    AdapterInitializationResult& result) {
  const auto collectStart = Clock::now();
  Statistics statistics(model.device(), model.projections(), work.wanted, work.method.needs, mask,
                        maskedTokens(work.batches, mask));
  collectSamples(model, work.batches, statistics, progress);
  result.collectSeconds = secondsSince(collectStart);

  const auto solveStart = Clock::now();
  std::vector<size_t> groups;
  for (size_t index = 0; index < work.wanted.size(); ++index) {
    if (work.wanted[index]) groups.push_back(index);
  }
  int64_t done = 0;
  solver.solve(groups, statistics, [&] { progress(InitializationPhase::solve, ++done, static_cast<int64_t>(groups.size())); });
  result.modules = solver.finish();
  result.solveSeconds = secondsSince(solveStart);
}

void runLayerMajor(Decoder& model, CollectionWork& work, TokenMask mask, Solver& solver, const InitializationProgress& progress,
                   AdapterInitializationResult& result) {
  const int64_t layersPerCheckpoint = result.plan->layersPerCheckpoint;
  const auto groups = static_cast<int64_t>(std::count(work.wanted.begin(), work.wanted.end(), true));
  const int64_t total = layerMajorSteps(model, work, layersPerCheckpoint) + groups;
  int64_t done = 0;
  const auto step = [&] { progress(InitializationPhase::layers, ++done, total); };
  const auto start = Clock::now();
  const auto solve = [&](int64_t layer, Statistics& statistics) {
    const auto solveStart = Clock::now();
    std::vector<size_t> layerGroups;
    for (size_t i = 0; i < groupsPerLayer; ++i) {
      const size_t index = static_cast<size_t>(layer) * groupsPerLayer + i;
      if (work.wanted[index]) layerGroups.push_back(index);
    }
    solver.solve(layerGroups, statistics, step);
    result.solveSeconds += secondsSince(solveStart);
  };
  collectByLayer(model, work, mask, layersPerCheckpoint, solve, step);
  result.modules = solver.finish();
  result.collectSeconds = secondsSince(start) - result.solveSeconds;
}

}  // namespace

Statistics collectStatistics(Decoder& model, const std::vector<TokenBatch>& batches, InitializerNeeds needs, TokenMask mask,
                             const InitializationProgress& progress) {
  const auto& projections = model.projections();
  std::vector<bool> wanted(projections.size(), true);
  if (model.lora()) {
    for (size_t i = 0; i < projections.size(); ++i) wanted[i] = model.lora()->group(i) != nullptr;
  }
  std::vector<PackedBatch> packed = packLabelled(model, batches);
  Statistics statistics(model.device(), projections, wanted, needs, mask, maskedTokens(packed, mask));
  collectSamples(model, packed, statistics, progress);
  return statistics;
}

std::optional<CollectionPlan> planInitialization(Decoder& model, const std::vector<TokenBatch>& batches,
                                                 const AdapterInitialization& initialization) {
  return planOf(model, workOf(model, findInitializer(initialization.method), batches), initialization);
}

AdapterInitializationResult initializeAdapters(Decoder& model, const std::vector<TokenBatch>& batches,
                                               const AdapterInitialization& initialization,
                                               const InitializationProgress& progress) {
  const Initializer& method = findInitializer(initialization.method);
  CollectionWork work = workOf(model, method, batches);
  AdapterInitializationResult result;
  result.rank = work.rank;
  result.plan = planOf(model, work, initialization);
  Solver solver(model, method, initialization);
  if (result.plan && result.plan->order == CollectionOrder::layerMajor) {
    runLayerMajor(model, work, initialization.tokenMask, solver, progress, result);
  } else {
    runSampleMajor(model, work, initialization.tokenMask, solver, progress, result);
  }
  return result;
}

}  // namespace lora_da
