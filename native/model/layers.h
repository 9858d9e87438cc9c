// The two blocks of a decoder layer, each with its backward.
//
// The residual stream enters as buffers.inputs[layer], is buffers.layer(i).middle between the blocks and leaves as
// buffers.output(layer): each block's last product adds to it. In backward, buffers.streamGrad holds the gradient of the stream
// after the block and becomes the gradient before it, buffers.branchGrad the same in the compute type.
#pragma once

#include "model/batch.h"
#include "model/kv_cache.h"
#include "model/lora.h"
#include "model/step_buffers.h"
#include "model/weights.h"

namespace lora_da {

struct LayerContext {
  Device& device;
  const DecoderSpec& spec;
  const LayerWeights& weights;
  int64_t layer;
  const LoraSet* lora;  // null: without adapters
  const PackedBatch& batch;
  Rotary rotary;
  StepBuffers& buffers;
  ProjectionObserver* observer;  // null outside collection
  KvCache* cache;                // null outside generation

  // The adapters at a position in the layer (see groupsPerLayer), or null.
  const LoraGroup* group(size_t position) const {
    return lora ? lora->group(static_cast<size_t>(layer) * groupsPerLayer + position) : nullptr;
  }
  // The LoRA down-projection kept there, and scratch for its gradient: [T, k].
  Matrix down(size_t position) const { return narrow(buffers.layer(layer).down[position], position); }
  Matrix downGrad(size_t position) const { return narrow(buffers.downGrad, position); }

 private:
  Matrix narrow(Matrix view, size_t position) const {
    const LoraGroup* adapters = group(position);
    view.cols = view.stride = adapters ? adapters->k : 0;
    return view;
  }
};

void attentionForward(const LayerContext& context);
void attentionBackward(const LayerContext& context);

// `withOutput` false stops at LoRA's down-projection (recomputation).
void mlpForward(const LayerContext& context, bool withOutput);
void mlpBackward(const LayerContext& context);

inline void layerForward(const LayerContext& context, bool withOutput) {
  attentionForward(context);
  mlpForward(context, withOutput);
}
inline void layerBackward(const LayerContext& context) {
  mlpBackward(context);
  attentionBackward(context);
}

}  // namespace lora_da
