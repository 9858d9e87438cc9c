// Sequences laid end to end without padding between them; rows are rounded up to a multiple of 64 so that shapes repeat.
#pragma once

#include <cstdint>
#include <vector>

#include "core/device.h"
#include "model/arena.h"

namespace lora_da {

// As it comes from the caller. labels: -100 is no label; position t predicts labels[t + 1] of its own sequence.
struct TokenBatch {
  std::vector<int32_t> inputIds;
  std::vector<int32_t> labels;
  std::vector<int32_t> sequenceStarts;  // sequences + 1 entries
};

struct PackedBatch {
  int64_t rows = 0;       // T
  int64_t tokens = 0;     // rows that belong to a sequence
  int64_t labelRows = 0;  // rows that predict a label
  int64_t paddedLabelRows = 0;
  int64_t maxLength = 0;                                  // of a sequence
  std::vector<int32_t> ids, positions, rowFirst, rowEnd;  // [T] each
  std::vector<int32_t> labelIndex, targets;               // [paddedLabelRows]; index -1 and target 0 for padding
  std::vector<int32_t> labelSequence;                     // [labelRows]: the sequence a label row belongs to
  std::vector<int32_t> labelsPerSequence;
  std::vector<float> rowScale;  // [paddedLabelRows]: weight of each label row in the loss; 0 for padding
  Sequences sequences;

  // Device copies, made by upload().
  const int32_t* deviceIds = nullptr;
  const int32_t* devicePositions = nullptr;
  const int32_t* deviceLabelIndex = nullptr;
  const int32_t* deviceTargets = nullptr;
  const float* deviceRowScale = nullptr;

  int64_t sequenceCount() const { return sequences.count(); }
  // Every label row counts `scale`: the training loss, with scale = 1 / label tokens of the step.
  void scaleRows(float scale);
  // Every label row counts 1 / label tokens of its sequence: the collection loss.
  void scaleRowsBySequence();
  void layout(Arena& arena);
  void upload(Device& device);
};

// A training step of more tokens than `most` goes through the model one pass after the other: the gradients add up to the same,
// while activations take no more than a pass needs. The batch cut between sequences into passes of about the same size, in order;
// only a longer sequence has more than `most` tokens.
std::vector<TokenBatch> splitIntoPasses(const TokenBatch& batch, int64_t most);

// Throws Error(invalidArgument) on ids outside the vocabulary, ragged arrays or empty sequences.
PackedBatch packBatch(const TokenBatch& batch, int64_t vocabSize);

// Rows that a batch of `count` takes, a multiple of 64.
int64_t roundRows(int64_t count);

}  // namespace lora_da
