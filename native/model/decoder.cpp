#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "model/layers.h"

namespace lora_da {

Decoder::Decoder(DecoderSpec spec, std::vector<TensorSource> tensors, std::unique_ptr<Device> device,
                 const std::function<void(int64_t, int64_t)>& progress)
    : spec_(std::move(spec)), device_(std::move(device)), heldBefore_(device_->memory().held), files_(std::move(tensors)) {
  weights_ = loadWeights(*device_, spec_, files_, [&](int64_t done, int64_t total) {
    checkCancelled();
    progress(done, total);
  });
  for (const LayerWeights& layer : weights_.layers) {
    for (const Projection* group : {&layer.attentionInputs, &layer.attentionOutput, &layer.mlpInputs, &layer.mlpOutput}) {
      projections_.push_back(group);
    }
  }
  totals_ = device_->allocate(2 * sizeof(double), "step totals");
  optimizerStep_ = device_->allocate(sizeof(AdamWStep), "optimizer step");
}

void Decoder::checkCancelled() const {
  if (cancelled.load(std::memory_order_relaxed)) throw Error(code::aborted, "the operation was aborted");
}

void Decoder::addLora(const std::vector<std::string>& modules, int64_t rank, float scaling) {
  std::map<std::string, bool> wanted;
  for (const std::string& module : modules) wanted[module] = false;
  std::vector<LoraGroupShape> shapes;
  for (const Projection* group : projections_) {
    LoraGroupShape shape{group->in, group->out, {}};
    for (const ProjectionPart& part : group->parts) {
      const auto found = wanted.find(part.module);
      if (found == wanted.end()) continue;
      found->second = true;
      shape.blocks.push_back({part.module, part.offset, part.out});
    }
    shapes.push_back(std::move(shape));
  }
  for (const auto& [module, known] : wanted) {
    if (!known) throw Error(code::invalidArgument, "the model has no linear module " + module);
  }
  lora_.reset();
  lora_.emplace(*device_, shapes, rank, scaling);
}

// --- passes --------------------------------------------------------------------------------------------------------

StepBuffers Decoder::prepareStep(PackedBatch& batch, const LoraSet* lora, const PassShape& shape) {
  const auto layout = [&](Arena& arena) {
    arena.rewind();
    batch.layout(arena);
    return layoutStep(arena, spec_, *device_, lora, shape);
  };
  Arena counting;
  layout(counting);
  arena_.reserve(*device_, counting.used(), "activations of " + std::to_string(batch.tokens) + " tokens");
  StepBuffers buffers = layout(arena_);
  batch.upload(*device_);
  return buffers;
}

LayerContext Decoder::layerContext(const Pass& pass, int64_t layer) {
  return {*device_,    spec_,        weights_.layers[static_cast<size_t>(layer)],
          layer,       pass.lora,    pass.batch,
          pass.rotary, pass.buffers, pass.observer,
          pass.cache};
}

void Decoder::forward(const Pass& pass) {
  device_->embed(pass.batch.deviceIds, *weights_.embedding, spec_.embeddingScale, pass.buffers.inputs[0]);
  forwardLayers(pass, 0, spec_.layers);
}

void Decoder::forwardLayers(const Pass& pass, int64_t first, int64_t last) {
  const StepBuffers& buffers = pass.buffers;
  for (int64_t layer = first; layer < last; ++layer) {
    checkCancelled();
    layerForward(layerContext(pass, layer), true);
  }
  if (last < spec_.layers) return;
  device_->rmsNorm(buffers.finalStream, finalNorm(), spec_.normEpsilon, buffers.normed, buffers.finalRstd,
                   buffers.finalInput.data ? &buffers.finalInput : nullptr);
}

void Decoder::headForward(const Pass& pass, bool gradient) {
  StepBuffers& buffers = pass.buffers;
  const PackedBatch& batch = pass.batch;
  if (batch.labelRows > 0) {
    device_->gatherRows(buffers.normed, batch.deviceLabelIndex, buffers.labelNormed);
    device_->headLoss(buffers.labelNormed, weights_.head(), batch.deviceTargets, batch.deviceRowScale, buffers.losses,
                      gradient ? &buffers.labelGrad : nullptr);
  }
  if (!gradient) return;
  const auto zero = [&](const Matrix& m) { device_->zero(m.data, static_cast<size_t>(m.rows * m.stride) * sizeOf(m.dtype)); };
  zero(buffers.normedGrad);
  zero(buffers.streamGrad);
  if (const Matrix* rounded = buffers.roundedGrad()) zero(*rounded);
  if (batch.labelRows == 0) return;
  device_->scatterAddRows(buffers.labelGrad, batch.deviceLabelIndex, buffers.normedGrad);
  device_->rmsNormGrad(buffers.finalInput.data ? buffers.finalInput : buffers.finalStream, buffers.finalRstd, finalNorm(),
                       buffers.normedGrad, buffers.streamGrad, buffers.roundedGrad());
}

void Decoder::backward(const Pass& pass) {
  for (int64_t layer = spec_.layers - 1; layer >= 0; --layer) {
    checkCancelled();
    // The last layer's activations are still those of forward.
    if (pass.keep == Keep::layerInputs && layer + 1 < spec_.layers) layerForward(layerContext(pass, layer), false);
    layerBackward(layerContext(pass, layer));
  }
}

void Decoder::lossesAndGradients(PackedBatch& batch, const LoraSet* lora, Keep keep, ProjectionObserver* observer) {
  StepBuffers buffers = prepareStep(batch, lora, {batch.rows, batch.paddedLabelRows, keep, true});
  const Pass pass{batch, buffers, lora, keep, rotary_.get(*device_, spec_, batch.maxLength), observer};
  const auto enqueue = [&] {
    forward(pass);
    headForward(pass, true);
    backward(pass);
    if (batch.labelRows > 0) {
      device_->sumLosses(buffers.losses, batch.deviceRowScale, batch.paddedLabelRows, static_cast<double*>(totals_.get()));
    }
  };
  // What an observer does with a batch is its own affair: it may allocate and upload.
  if (observer)
    enqueue();
  else
    device_->recorded(enqueue);
}

// --- what callers ask for ------------------------------------------------------------------------------------------

StepResult Decoder::trainStep(const std::vector<TokenBatch>& batches, const StepOptions& options) {
  if (!lora_) throw Error(code::invalidArgument, "the model has no adapters to train");
  std::vector<PackedBatch> packed;
  int64_t labels = 0;
  for (const TokenBatch& batch : batches) {
    for (const TokenBatch& pass : splitIntoPasses(batch, device_->passTokens())) {
      packed.push_back(packBatch(pass, spec_.vocabSize));
      labels += packed.back().labelRows;
    }
  }
  if (labels == 0) throw Error(code::invalidArgument, "the step has no label tokens");

  auto* totals = static_cast<double*>(totals_.get());
  device_->upload(optimizerStep_.get(), &options.optimizer, sizeof(AdamWStep));
  device_->zero(totals, 2 * sizeof(double));
  lora_->zeroGradients(*device_);
  const Keep keep = options.recompute == Recompute::layer ? Keep::layerInputs : Keep::all;
  for (PackedBatch& batch : packed) {
    batch.scaleRows(1.0f / static_cast<float>(labels));
    lossesAndGradients(batch, &*lora_, keep, nullptr);
  }
  files_.checkIntact();
  const std::vector<Parameter> parameters = lora_->parameters();
  device_->recorded([&] {
    device_->gradNorm(parameters, totals + 1);
    device_->adamw(parameters, static_cast<const AdamWStep*>(optimizerStep_.get()), totals + 1, totals);
  });

  double host[2];
  device_->download(host, totals, sizeof host);
  device_->synchronize();
  if (!std::isfinite(host[0]) || !std::isfinite(host[1])) {
    const char* what = std::isfinite(host[0]) ? "gradient norm" : "loss";
    throw Error(code::nonFinite, std::string("the ") + what + " is not finite");
  }
  return {host[0], host[1]};
}

Evaluation Decoder::evaluate(const TokenBatch& tokens) {
  PackedBatch batch = packBatch(tokens, spec_.vocabSize);
  const LoraSet* lora = lora_ ? &*lora_ : nullptr;
  StepBuffers buffers = prepareStep(batch, lora, {batch.rows, batch.paddedLabelRows, Keep::nothing, false});
  const Pass pass{batch, buffers, lora, Keep::nothing, rotary_.get(*device_, spec_, batch.maxLength)};
  forward(pass);
  headForward(pass, false);
  std::vector<float> losses(static_cast<size_t>(batch.labelRows));
  if (!losses.empty()) device_->download(losses.data(), buffers.losses, losses.size() * sizeof(float));
  device_->synchronize();
  files_.checkIntact();

  Evaluation result;
  result.losses.assign(static_cast<size_t>(batch.sequenceCount()), 0.0);
  result.labelTokens = batch.labelsPerSequence;
  for (size_t i = 0; i < losses.size(); ++i) result.losses[static_cast<size_t>(batch.labelSequence[i])] += losses[i];
  for (size_t i = 0; i < result.losses.size(); ++i) {
    result.losses[i] =
        result.labelTokens[i] ? result.losses[i] / result.labelTokens[i] : std::numeric_limits<double>::quiet_NaN();
  }
  return result;
}

std::vector<float> Decoder::logits(const TokenBatch& tokens) {
  PackedBatch batch = packBatch(tokens, spec_.vocabSize);
  const LoraSet* lora = lora_ ? &*lora_ : nullptr;
  StepBuffers buffers = prepareStep(batch, lora, {batch.rows, 0, Keep::nothing, false});
  forward({batch, buffers, lora, Keep::nothing, rotary_.get(*device_, spec_, batch.maxLength)});
  const Buffer memory = device_->allocate(static_cast<size_t>(batch.tokens * spec_.vocabSize) * sizeof(float), "logits");
  const Matrix logits{memory.get(), DType::f32, batch.tokens, spec_.vocabSize, spec_.vocabSize};
  device_->linear(buffers.normed.rowRange(0, batch.tokens), weights_.head(), nullptr, nullptr, nullptr, nullptr, logits);
  std::vector<float> host(static_cast<size_t>(batch.tokens * spec_.vocabSize));
  device_->download(host.data(), logits.data, host.size() * sizeof(float));
  device_->synchronize();
  files_.checkIntact();
  return host;
}

void Decoder::collectPass(PackedBatch& batch, ProjectionObserver& observer) {
  batch.scaleRowsBySequence();
  lossesAndGradients(batch, nullptr, Keep::all, &observer);
  files_.checkIntact();
}

std::vector<float> Decoder::mergedWeight(const std::string& module) {
  if (!lora_) throw Error(code::invalidArgument, "module " + module + " has no adapter");
  const AdapterFactors factors = lora_->readModule(*device_, module);
  std::vector<float> merged = readFloats(files_.tensor(module + ".weight", {factors.out, factors.in}));
  const auto r = static_cast<size_t>(factors.rank), in = static_cast<size_t>(factors.in), out = static_cast<size_t>(factors.out);
  for (size_t o = 0; o < out; ++o) {
    for (size_t k = 0; k < r; ++k) {
      const float factor = lora_->scaling() * factors.b[o * r + k];
      for (size_t i = 0; i < in; ++i) merged[o * in + i] += factor * factors.a[k * in + i];
    }
  }
  files_.checkIntact();
  return merged;
}

StepShape Decoder::stepShape(int64_t rows, int64_t labelRows, int64_t longest) const {
  const auto& windows = spec_.windows;
  const bool full = std::find(windows.begin(), windows.end(), 0) != windows.end();
  const int32_t window = full || windows.empty() ? 0 : *std::max_element(windows.begin(), windows.end());
  return {labelRows, spec_.vocabSize, {spec_.heads, spec_.kvHeads, spec_.headDim, spec_.attentionScale, window}, rows, longest};
}

MemoryPlan Decoder::planMemory(int64_t tokens, int64_t labelTokens, int64_t maxLength, Recompute recompute) {
  tokens = std::min(tokens, std::max(device_->passTokens(), maxLength));
  labelTokens = std::min(labelTokens, tokens);
  MemoryPlan plan;
  plan.weights = weights_.bytes;
  Arena arena;
  layoutStep(arena, spec_, *device_, lora_ ? &*lora_ : nullptr,
             {roundRows(tokens), roundRows(labelTokens), recompute == Recompute::layer ? Keep::layerInputs : Keep::all, true});
  plan.activations = arena.used();
  plan.adapters = lora_ ? lora_->bytes() : 0;
  plan.workspace = device_->workspaceBytes(stepShape(roundRows(tokens), roundRows(labelTokens), maxLength));
  return plan;
}

}  // namespace lora_da
