// Starts a model's adapters with a method of the table: collects what the method needs, computes every module's factors, sets
// them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fisher/collection_plan.h"
#include "fisher/statistics.h"
#include "init/initializer.h"
#include "model/decoder.h"

namespace lora_da {

struct AdapterInitialization {
  std::string method;
  TokenMask tokenMask = TokenMask::attention;
  InitializationOptions options;
  CollectionRequest collection;
};

struct AdapterInitializationResult {
  int64_t rank = 0;
  std::vector<ModuleReport> modules;   // in the model's order
  std::optional<CollectionPlan> plan;  // absent for a method without data
  double collectSeconds = 0;
  double solveSeconds = 0;
};

// collect, then solve; or in layer-major order both by turns, counted together.
enum class InitializationPhase { collect, solve, layers };

constexpr const char* nameOf(InitializationPhase phase) {
  constexpr const char* names[] = {"collect", "solve", "layers"};
  return names[static_cast<int>(phase)];
}

// Called with (phase, done, total); may throw to stop.
using InitializationProgress = std::function<void(InitializationPhase, int64_t, int64_t)>;

// One forward and backward pass over the batches, for all groups that have an adapted module (or all, without adapters).
Statistics collectStatistics(Decoder& model, const std::vector<TokenBatch>& batches, InitializerNeeds needs, TokenMask mask,
                             const InitializationProgress& progress);

// The plan that initializeAdapters would follow; absent for a method without data. Throws as it does before it collects.
std::optional<CollectionPlan> planInitialization(Decoder& model, const std::vector<TokenBatch>& batches,
                                                 const AdapterInitialization& initialization);

// Throws Error(notPositiveDefinite) naming the module, Error(invalidArgument) on samples without labels, Error(outOfMemory) where
// no plan fits, before anything is collected. The factors change only
// when all modules succeeded.
AdapterInitializationResult initializeAdapters(Decoder& model, const std::vector<TokenBatch>& batches,
                                               const AdapterInitialization& initialization,
                                               const InitializationProgress& progress);

}  // namespace lora_da
