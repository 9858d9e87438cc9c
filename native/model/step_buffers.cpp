#include "model/step_buffers.h"

#include <algorithm>

namespace lora_da {

namespace {

// Largest number of rows in the A factors of one position over all layers.
int64_t widestDown(const LoraSet& lora, size_t position) {
  int64_t widest = 0;
  for (size_t i = position; i < lora.groups().size(); i += groupsPerLayer) widest = std::max(widest, lora.groups()[i].k);
  return widest;
}

LayerActivations layoutLayer(Arena& arena, const DecoderSpec& spec, DType type, const LoraSet* lora, int64_t room, int64_t rows,
                             bool normInputs) {
  LayerActivations kept;
  if (normInputs) {
    kept.attentionInput = arena.matrix(type, rows, spec.hiddenSize);
    kept.mlpInput = arena.matrix(type, rows, spec.hiddenSize);
  }
  kept.attentionRstd = arena.array<float>(rows);
  kept.qkv = arena.matrix(type, rows, spec.qkvWidth());
  if (spec.headNorm) {
    kept.qkvRaw = arena.matrix(type, rows, spec.qkvWidth());
    kept.queryRstd = arena.array<float>(rows * spec.heads);
    kept.keyRstd = arena.array<float>(rows * spec.kvHeads);
  }
  kept.context = arena.matrix(type, rows, spec.queryWidth(), room);
  kept.lse = arena.array<float>(rows * spec.heads);
  kept.mlpRstd = arena.array<float>(rows);
  kept.gateUp = arena.matrix(type, rows, 2 * spec.intermediateSize, room);
  for (size_t i = 0; lora && i < groupsPerLayer; ++i) kept.down[i] = arena.matrix(type, rows, widestDown(*lora, i));
  return kept;
}

}  // namespace

StepBuffers layoutStep(Arena& arena, const DecoderSpec& spec, const Device& device, const LoraSet* lora, const PassShape& shape) {
  StepBuffers buffers;
  const DType type = device.computeType();
  const int64_t room = lora ? device.lowRankRoom() : 0;
  const int64_t rows = shape.rows, labels = shape.labelRows;
  const int64_t hidden = spec.hiddenSize;
  // The float32 stream itself stays only where it is what backward reads, or what a layer is made again from.
  const bool normInputs = shape.backward && type != DType::f32;
  const bool streamsStay = shape.keep == Keep::layerInputs || (shape.keep == Keep::all && !normInputs);
  for (int64_t i = 0; i < spec.layers; ++i) {
    buffers.inputs.push_back(i == 0 || streamsStay ? arena.matrix(DType::f32, rows, hidden) : buffers.inputs.front());
  }
  const int64_t kept = shape.keep == Keep::all ? spec.layers : 1;
  for (int64_t i = 0; i < kept; ++i) {
    buffers.layers.push_back(layoutLayer(arena, spec, type, lora, room, rows, normInputs));
    buffers.layers.back().middle = i == 0 || !normInputs ? arena.matrix(DType::f32, rows, hidden) : buffers.layers.front().middle;
  }

  buffers.normed = arena.matrix(type, rows, hidden, room);
  buffers.hidden = arena.matrix(type, rows, spec.intermediateSize, room);
  buffers.finalStream = arena.matrix(DType::f32, rows, hidden);
  if (normInputs) buffers.finalInput = arena.matrix(type, rows, hidden);
  buffers.finalRstd = arena.array<float>(rows);
  buffers.labelNormed = arena.matrix(type, labels, hidden);
  buffers.losses = arena.array<float>(labels);
  if (!shape.backward) return buffers;

  buffers.labelGrad = arena.matrix(DType::f32, labels, hidden);
  buffers.streamGrad = arena.matrix(DType::f32, rows, hidden, type == DType::f32 ? room : 0);
  buffers.branchGrad = type == DType::f32 ? buffers.streamGrad : arena.matrix(type, rows, hidden, room);
  buffers.normedGrad = arena.matrix(DType::f32, rows, hidden);
  buffers.hiddenGrad = arena.matrix(type, rows, spec.intermediateSize);
  buffers.contextGrad = arena.matrix(type, rows, spec.queryWidth());
  buffers.qkvGrad = arena.matrix(type, rows, spec.qkvWidth(), room);
  int64_t widest = 0;
  for (size_t i = 0; lora && i < groupsPerLayer; ++i) widest = std::max(widest, widestDown(*lora, i));
  buffers.downGrad = arena.matrix(type, rows, widest);
  return buffers;
}

}  // namespace lora_da
