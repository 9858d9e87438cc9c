// Collection a layer at a time: the residual streams are kept outside of the pass, so that all batches can go through one layer
// before the first goes through the next. What a layer's backward needs is made again from the stream entering it, bit for bit.
#include <algorithm>

#include "model/decoder.h"

namespace lora_da {

namespace {

// One layer's activations; inputs share a buffer where a stream is not kept.
PassShape layerPassShape(const PackedBatch& batch) {
  return {batch.rows, batch.paddedLabelRows, Keep::nothing, true};
}

}  // namespace

StepBuffers Decoder::prepareLayerPass(PackedBatch& batch, const ResidualStreams& streams) {
  StepBuffers buffers = prepareStep(batch, nullptr, layerPassShape(batch));
  for (size_t i = 0; i < streams.inputs.size(); ++i) {
    if (streams.inputs[i].data) buffers.inputs[i] = streams.inputs[i];
  }
  buffers.setStreamGrad(streams.gradient);
  return buffers;
}

void Decoder::collectForward(PackedBatch& batch, const ResidualStreams& streams) {
  batch.scaleRowsBySequence();
  StepBuffers buffers = prepareLayerPass(batch, streams);
  const Pass pass{batch, buffers, nullptr, Keep::nothing, rotary_.get(*device_, spec_, batch.maxLength)};
  forward(pass);
  headForward(pass, true);
  files_.checkIntact();
}

void Decoder::forwardLayers(PackedBatch& batch, int64_t first, int64_t last, const ResidualStreams& streams) {
  StepBuffers buffers = prepareLayerPass(batch, streams);
  forwardLayers({batch, buffers, nullptr, Keep::nothing, rotary_.get(*device_, spec_, batch.maxLength)}, first, last);
  files_.checkIntact();
}

void Decoder::collectLayer(PackedBatch& batch, int64_t layer, const ResidualStreams& streams, ProjectionObserver& observer) {
  checkCancelled();
  StepBuffers buffers = prepareLayerPass(batch, streams);
  const Pass pass{batch, buffers, nullptr, Keep::nothing, rotary_.get(*device_, spec_, batch.maxLength), &observer};
  layerForward(layerContext(pass, layer), false);
  if (const Matrix* rounded = buffers.roundedGrad()) device_->convert(buffers.streamGrad, *rounded);
  layerBackward(layerContext(pass, layer));
  files_.checkIntact();
}

size_t Decoder::collectionBytes(PackedBatch batch, bool layerByLayer) const {
  PassShape shape = layerPassShape(batch);
  if (!layerByLayer) shape.keep = Keep::all;
  Arena arena;
  batch.layout(arena);
  layoutStep(arena, spec_, *device_, nullptr, shape);
  return arena.used();
}

size_t Decoder::residentBytes() const {
  return std::max(device_->memory().held, heldBefore_ + weights_.bytes + (lora_ ? lora_->bytes() : 0));
}

}  // namespace lora_da
