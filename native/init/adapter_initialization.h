// Starts a model's adapters with a method of the table: collects what the method needs, computes every module's factors, sets
// them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fisher/statistics.h"
#include "init/initializer.h"
#include "model/decoder.h"

namespace lora_da {

struct AdapterInitialization {
  std::string method;
  TokenMask tokenMask = TokenMask::attention;
  InitializationOptions options;
};

struct AdapterInitializationResult {
  int64_t rank = 0;
  std::vector<ModuleReport> modules;
  double collectSeconds = 0;
  double solveSeconds = 0;
};

enum class InitializationPhase { collect, solve };
// Called with (phase, done, total); may throw to stop.
using InitializationProgress = std::function<void(InitializationPhase, int64_t, int64_t)>;

// One forward and backward pass over the batches, for all groups that have an adapted module (or all, without adapters).
Statistics collectStatistics(Decoder& model, const std::vector<TokenBatch>& batches, InitializerNeeds needs, TokenMask mask,
                             const InitializationProgress& progress);

// Throws Error(notPositiveDefinite) naming the module, Error(invalidArgument) on samples without labels. The factors change only
// when all modules succeeded.
AdapterInitializationResult initializeAdapters(Decoder& model, const std::vector<TokenBatch>& batches,
                                               const AdapterInitialization& initialization,
                                               const InitializationProgress& progress);

}  // namespace lora_da
