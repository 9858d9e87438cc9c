// A decoder with its adapters on one device: the passes that train, evaluate, collect and generate.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"
#include "model/arena.h"
#include "model/batch.h"
#include "model/decoder_spec.h"
#include "model/kv_cache.h"
#include "model/layers.h"
#include "model/lora.h"
#include "model/rotary.h"
#include "model/step_buffers.h"
#include "model/weights.h"

namespace lora_da {

struct StepOptions {
  AdamWStep optimizer;
  Recompute recompute = Recompute::none;
};

struct StepResult {
  double loss = 0;      // cross-entropy summed over the step and divided by its label tokens
  double gradNorm = 0;  // L2 norm of the adapters' gradients before clipping
};

struct Evaluation {
  std::vector<double> losses;  // per sequence: mean over its label tokens; NaN where it has none
  std::vector<int32_t> labelTokens;
};

struct GenerateOptions {
  std::vector<int32_t> inputIds;
  int64_t maxNewTokens = 0;
  double temperature = 0;  // 0: greedy
  double topP = 1;
  uint64_t seed = 0;
  std::vector<int32_t> stopIds;
};

struct MemoryPlan {
  size_t weights = 0, activations = 0, adapters = 0, workspace = 0;  // bytes
};

class Decoder {
 public:
  Decoder(DecoderSpec spec, std::vector<TensorSource> tensors, std::unique_ptr<Device> device,
          const std::function<void(int64_t, int64_t)>& progress);

  const DecoderSpec& spec() const { return spec_; }
  Device& device() { return *device_; }
  int64_t parameters() const { return weights_.parameters; }
  size_t weightBytes() const { return weights_.bytes; }
  LoraSet* lora() { return lora_ ? &*lora_ : nullptr; }
  // All groups of linear modules in layer order, as LoraSet indexes them.
  const std::vector<const Projection*>& projections() const { return projections_; }

  // Adapters for the named modules; earlier ones and their optimizer state go. Throws Error(invalidArgument) naming an unknown
  // module.
  void addLora(const std::vector<std::string>& modules, int64_t rank, float scaling);
  void removeLora() { lora_.reset(); }

  // One optimizer step over all micro-batches. Throws Error(nonFinite), with the factors as they were, when loss or gradient norm
  // is not finite.
  StepResult trainStep(const std::vector<TokenBatch>& batches, const StepOptions& options);
  Evaluation evaluate(const TokenBatch& batch);
  // Every token's logits [tokens, vocabulary].
  std::vector<float> logits(const TokenBatch& batch);
  // Forward and backward of the collection loss through the base model, without adapters; `observer` sees every group.
  void collectPass(PackedBatch& batch, ProjectionObserver& observer);
  // The same a layer at a time (layer_pass.cpp), without adapters. Forward through the model keeps the streams entering the
  // layers that `streams` has memory for and leaves the loss's gradient there; forwardLayers makes those of layers first+1 ..
  // last again from that of `first`; backward makes a layer's activations again from its input.
  void collectForward(PackedBatch& batch, const ResidualStreams& streams);
  void forwardLayers(PackedBatch& batch, int64_t first, int64_t last, const ResidualStreams& streams);
  void collectLayer(PackedBatch& batch, int64_t layer, const ResidualStreams& streams, ProjectionObserver& observer);
  // Bytes of the step buffers of a collection pass, whole or a layer at a time.
  size_t collectionBytes(PackedBatch batch, bool layerByLayer) const;
  // Bytes that the process holds with this model before any pass: what is resident, or what the weights and adapters will make of
  // it where their pages have not been read yet.
  size_t residentBytes() const;
  // New token ids, the stop token included when one came.
  std::vector<int32_t> generate(const GenerateOptions& options, const std::function<void(int32_t)>& onToken);
  // W + scaling B A in float32 [out, in].
  std::vector<float> mergedWeight(const std::string& module);
  // What the device's scratch follows, for the layer whose attention sees most.
  StepShape stepShape(int64_t rows, int64_t labelRows, int64_t longest) const;
  // Of a training step; maxLength: of its sequences.
  MemoryPlan planMemory(int64_t tokens, int64_t labelTokens, int64_t maxLength, Recompute recompute);

  // Checked between layers and tokens; the work in progress then throws Error(aborted).
  std::atomic<bool> cancelled{false};

 private:
  struct Pass {
    PackedBatch& batch;
    StepBuffers& buffers;
    const LoraSet* lora;
    Keep keep;
    Rotary rotary;
    ProjectionObserver* observer = nullptr;
    KvCache* cache = nullptr;
  };

  StepBuffers prepareStep(PackedBatch& batch, const LoraSet* lora, const PassShape& shape);
  LayerContext layerContext(const Pass& pass, int64_t layer);
  void forward(const Pass& pass);
  // Layers first .. last-1 from the stream entering the first; what follows the last one is the next input, or the final stream.
  void forwardLayers(const Pass& pass, int64_t first, int64_t last);
  StepBuffers prepareLayerPass(PackedBatch& batch, const ResidualStreams& streams);
  // Losses of the label rows; with `gradient` also the gradient of the residual stream after the last layer.
  void headForward(const Pass& pass, bool gradient);
  void backward(const Pass& pass);
  void lossesAndGradients(PackedBatch& batch, const LoraSet* lora, Keep keep, ProjectionObserver* observer);
  void nextLogits(PackedBatch& batch, KvCache& cache, std::vector<float>& host);
  void checkCancelled() const;
  const float* finalNorm() const { return static_cast<const float*>(weights_.finalNorm.get()); }

  DecoderSpec spec_;
  std::unique_ptr<Device> device_;
  size_t heldBefore_;  // bytes of the device's memory before the weights
  CheckpointFiles files_;
  DecoderWeights weights_;
  std::vector<const Projection*> projections_;
  std::optional<LoraSet> lora_;
  RotaryTable rotary_;
  Arena arena_;
  Buffer totals_;         // float64: loss, gradient norm
  Buffer optimizerStep_;  // AdamWStep
  Buffer nextLogits_;     // float32 [vocabulary], for generation
};

}  // namespace lora_da
