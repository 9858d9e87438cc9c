// The reference folders (their README says what each value is): where they are, and what expected.json and inputs.jsonl hold.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint_folder.h"
#include "fisher/statistics.h"
#include "init/initializer.h"
#include "model/batch.h"

namespace lora_da::test {

struct ReferenceModule {
  double relativeGap = 0;
  // Only in the harsh folder: how far float32 statistics alone move the result.
  double float32ProductError = 0, float32Angle = 0;
};

struct ReferenceStart {
  std::string label;
  int64_t rank = 0;
  TokenMask mask = TokenMask::attention;
  InitializationOptions options;
  std::map<std::string, ReferenceModule> modules;
};

struct ReferenceStep {
  double loss = 0, gradNorm = 0, learningRate = 0;
};

struct ReferenceTrajectory {
  int64_t rank = 0;
  float scaling = 0, weightDecay = 0;
  std::vector<ReferenceStep> steps;
};

struct ReferenceContinuation {
  std::vector<int32_t> prompt, continuation;
};

struct ReferenceRow {
  std::vector<int32_t> inputIds, labels;
};

class ReferenceFolder {
 public:
  explicit ReferenceFolder(const std::string& name);

  std::string path;
  DecoderSpec spec;
  TensorFile tensors;
  std::vector<ReferenceRow> rows;
  std::vector<double> losses;
  std::vector<int32_t> labelTokens;
  std::vector<ReferenceStart> starts;
  std::map<std::string, ReferenceTrajectory> trajectories;
  std::vector<ReferenceContinuation> greedy;

  TokenBatch batch(size_t first, size_t count) const;
  TokenBatch batch() const { return batch(0, rows.size()); }
};

// LORA_DA_REFERENCE, else ../shared/reference beside the checkout.
std::string referenceRoot();
bool hasReference(const std::string& name);

}  // namespace lora_da::test
