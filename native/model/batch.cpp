#include "model/batch.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace lora_da {

namespace {

constexpr int64_t rowMultiple = 64;
constexpr int32_t noLabel = -100;

template <class T>
const T* uploadInto(Device& device, const T* target, const std::vector<T>& values) {
  if (!values.empty()) device.upload(const_cast<T*>(target), values.data(), values.size() * sizeof(T));
  return target;
}

}  // namespace

int64_t roundRows(int64_t count) {
  return (count + rowMultiple - 1) / rowMultiple * rowMultiple;
}

std::vector<TokenBatch> splitIntoPasses(const TokenBatch& batch, int64_t most) {
  const auto& starts = batch.sequenceStarts;
  const auto tokens = static_cast<int64_t>(batch.inputIds.size());
  // What is not well formed goes on whole, to packBatch, which says so.
  const bool wellFormed = starts.size() >= 2 && starts.front() == 0 && starts.back() == tokens &&
                          batch.labels.size() == batch.inputIds.size() && std::is_sorted(starts.begin(), starts.end());
  if (!wellFormed || tokens <= most) return {batch};
  const int64_t passes = (tokens + most - 1) / most, even = (tokens + passes - 1) / passes;
  std::vector<TokenBatch> result;
  for (size_t sequence = 0; sequence + 1 < starts.size(); ++sequence) {
    const int32_t first = starts[sequence], last = starts[sequence + 1];
    const auto held = result.empty() ? 0 : static_cast<int64_t>(result.back().inputIds.size());
    if (result.empty() || held >= even || held + (last - first) > most) result.push_back({{}, {}, {0}});
    TokenBatch& pass = result.back();
    pass.inputIds.insert(pass.inputIds.end(), batch.inputIds.begin() + first, batch.inputIds.begin() + last);
    pass.labels.insert(pass.labels.end(), batch.labels.begin() + first, batch.labels.begin() + last);
    pass.sequenceStarts.push_back(static_cast<int32_t>(pass.inputIds.size()));
  }
  return result;
}

PackedBatch packBatch(const TokenBatch& batch, int64_t vocabSize) {
  PackedBatch packed;
  const auto& starts = batch.sequenceStarts;
  packed.tokens = static_cast<int64_t>(batch.inputIds.size());
  if (batch.labels.size() != batch.inputIds.size() || starts.size() < 2 || starts.front() != 0 ||
      starts.back() != packed.tokens) {
    throw Error(code::invalidArgument,
                "a batch's labels and sequenceStarts do not fit its " + std::to_string(packed.tokens) + " inputIds");
  }
  packed.rows = roundRows(packed.tokens);
  packed.ids.assign(static_cast<size_t>(packed.rows), 0);
  packed.positions.assign(static_cast<size_t>(packed.rows), 0);
  packed.rowFirst.resize(static_cast<size_t>(packed.rows));
  packed.rowEnd.resize(static_cast<size_t>(packed.rows));
  for (int64_t t = packed.tokens; t < packed.rows; ++t) {
    packed.rowFirst[static_cast<size_t>(t)] = packed.rowEnd[static_cast<size_t>(t)] = static_cast<int32_t>(t);
  }
  packed.sequences.hostStarts = starts;
  for (size_t sequence = 0; sequence + 1 < starts.size(); ++sequence) {
    const int32_t first = starts[sequence], last = starts[sequence + 1];
    if (last <= first) throw Error(code::invalidArgument, "sequence " + std::to_string(sequence) + " of a batch is empty");
    packed.maxLength = std::max<int64_t>(packed.maxLength, last - first);
    int32_t labels = 0;
    for (int32_t t = first; t < last; ++t) {
      const auto i = static_cast<size_t>(t);
      const int32_t id = batch.inputIds[i];
      if (id < 0 || id >= vocabSize) {
        throw Error(code::invalidArgument,
                    "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocabSize) + " tokens");
      }
      packed.ids[i] = id;
      packed.positions[i] = t - first;
      packed.rowFirst[i] = first;
      packed.rowEnd[i] = last;
      const int32_t target = t + 1 < last ? batch.labels[i + 1] : noLabel;
      if (target == noLabel) continue;
      if (target < 0 || target >= vocabSize) {
        throw Error(code::invalidArgument,
                    "label " + std::to_string(target) + " is outside the vocabulary of " + std::to_string(vocabSize) + " tokens");
      }
      packed.labelIndex.push_back(t);
      packed.targets.push_back(target);
      packed.labelSequence.push_back(static_cast<int32_t>(sequence));
      ++labels;
    }
    packed.labelsPerSequence.push_back(labels);
  }
  packed.labelRows = static_cast<int64_t>(packed.labelIndex.size());
  packed.paddedLabelRows = roundRows(packed.labelRows);
  packed.labelIndex.resize(static_cast<size_t>(packed.paddedLabelRows), -1);
  packed.targets.resize(static_cast<size_t>(packed.paddedLabelRows), 0);
  packed.scaleRows(1.0f);
  return packed;
}

void PackedBatch::scaleRows(float scale) {
  rowScale.assign(static_cast<size_t>(paddedLabelRows), 0.0f);
  std::fill(rowScale.begin(), rowScale.begin() + labelRows, scale);
}

void PackedBatch::scaleRowsBySequence() {
  rowScale.assign(static_cast<size_t>(paddedLabelRows), 0.0f);
  for (size_t i = 0; i < labelSequence.size(); ++i) {
    rowScale[i] = 1.0f / static_cast<float>(labelsPerSequence[static_cast<size_t>(labelSequence[i])]);
  }
}

void PackedBatch::layout(Arena& arena) {
  deviceIds = arena.array<int32_t>(rows);
  devicePositions = arena.array<int32_t>(rows);
  deviceLabelIndex = arena.array<int32_t>(paddedLabelRows);
  deviceTargets = arena.array<int32_t>(paddedLabelRows);
  deviceRowScale = arena.array<float>(paddedLabelRows);
  sequences.rowFirst = arena.array<int32_t>(rows);
  sequences.rowEnd = arena.array<int32_t>(rows);
}

void PackedBatch::upload(Device& device) {
  uploadInto(device, deviceIds, ids);
  uploadInto(device, devicePositions, positions);
  uploadInto(device, deviceLabelIndex, labelIndex);
  uploadInto(device, deviceTargets, targets);
  uploadInto(device, deviceRowScale, rowScale);
  uploadInto(device, sequences.rowFirst, rowFirst);
  uploadInto(device, sequences.rowEnd, rowEnd);
}

}  // namespace lora_da
