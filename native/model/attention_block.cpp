// Attention block: x + o_proj(attention(rope(norm(q_proj n)), rope(norm(k_proj n)), v_proj n)), n = RMSNorm(x).
#include "model/layers.h"

namespace lora_da {

namespace {

struct QkvViews {
  Matrix q, k, v;
};

QkvViews split(const DecoderSpec& spec, const Matrix& qkv) {
  return {qkv.columns(0, spec.queryWidth()), qkv.columns(spec.queryWidth(), spec.kvWidth()),
          qkv.columns(spec.queryWidth() + spec.kvWidth(), spec.kvWidth())};
}

AttentionShape shapeOf(const LayerContext& c) {
  return {c.spec.heads, c.spec.kvHeads, c.spec.headDim, c.spec.attentionScale, c.spec.windows[static_cast<size_t>(c.layer)]};
}

HeadNorm normOf(const DecoderSpec& spec, const Buffer& weight) {
  return {static_cast<const float*>(weight.get()), spec.normEpsilon};
}

// Keys and values of this pass join the cache; a single new token attends over all of it.
void attendWithCache(const LayerContext& c, const QkvViews& views, const LayerActivations& kept) {
  const auto index = static_cast<size_t>(c.layer);
  KvCache& cache = *c.cache;
  const int64_t tokens = c.batch.tokens;
  c.device.convert(views.k.rowRange(0, tokens), cache.keys[index].rowRange(cache.length, tokens));
  c.device.convert(views.v.rowRange(0, tokens), cache.values[index].rowRange(cache.length, tokens));
  if (cache.length == 0) {
    c.device.attention(views.q, views.k, views.v, c.batch.sequences, shapeOf(c), kept.context, kept.lse);
  } else {
    const int64_t length = cache.length + tokens;
    c.device.attentionCached(views.q, cache.keys[index].rowRange(0, length), cache.values[index].rowRange(0, length), shapeOf(c),
                             kept.context);
  }
}

}  // namespace

void attentionForward(const LayerContext& c) {
  const DecoderSpec& spec = c.spec;
  LayerActivations& kept = c.buffers.layer(c.layer);
  c.device.rmsNorm(c.buffers.inputs[static_cast<size_t>(c.layer)], static_cast<const float*>(c.weights.attentionNorm.get()),
                   spec.normEpsilon, c.buffers.normed, kept.attentionRstd,
                   kept.attentionInput.data ? &kept.attentionInput : nullptr);
  const Matrix& projected = spec.headNorm ? kept.qkvRaw : kept.qkv;
  c.weights.attentionInputs.forward(c.device, c.group(0), c.buffers.normed, c.down(0), nullptr, projected);

  const QkvViews raw = split(spec, projected), rotated = split(spec, kept.qkv);
  const int32_t* positions = c.batch.devicePositions;
  c.device.rope(raw.q, spec.heads, spec.headDim, normOf(spec, c.weights.queryNorm), c.rotary, positions, rotated.q,
                kept.queryRstd);
  c.device.rope(raw.k, spec.kvHeads, spec.headDim, normOf(spec, c.weights.keyNorm), c.rotary, positions, rotated.k, kept.keyRstd);
  if (spec.headNorm) c.device.convert(raw.v, rotated.v);

  if (c.cache) {
    attendWithCache(c, rotated, kept);
  } else {
    c.device.attention(rotated.q, rotated.k, rotated.v, c.batch.sequences, shapeOf(c), kept.context, kept.lse);
  }
  c.weights.attentionOutput.forward(c.device, c.group(1), kept.context, c.down(1),
                                    &c.buffers.inputs[static_cast<size_t>(c.layer)], kept.middle);
}

void attentionBackward(const LayerContext& c) {
  const DecoderSpec& spec = c.spec;
  StepBuffers& buffers = c.buffers;
  LayerActivations& kept = buffers.layer(c.layer);
  const Matrix& input = buffers.attentionInput(c.layer);
  const auto* normWeight = static_cast<const float*>(c.weights.attentionNorm.get());

  if (c.observer) c.observer->observe(c.weights.attentionOutput.index, kept.context, buffers.branchGrad);
  c.weights.attentionOutput.backward(c.device, c.group(1), c.down(1), buffers.branchGrad, c.downGrad(1), &buffers.contextGrad);
  c.weights.attentionOutput.backwardInput(c.device, c.group(1), kept.context, c.downGrad(1));

  const QkvViews rotated = split(spec, kept.qkv), grad = split(spec, buffers.qkvGrad);
  c.device.attentionGrad(rotated.q, rotated.k, rotated.v, kept.context, kept.lse, buffers.contextGrad, c.batch.sequences,
                         shapeOf(c), grad.q, grad.k, grad.v);
  const QkvViews raw = split(spec, spec.headNorm ? kept.qkvRaw : kept.qkv);
  const int32_t* positions = c.batch.devicePositions;
  c.device.ropeGrad(grad.q, raw.q, spec.heads, spec.headDim, normOf(spec, c.weights.queryNorm), c.rotary, positions,
                    kept.queryRstd);
  c.device.ropeGrad(grad.k, raw.k, spec.kvHeads, spec.headDim, normOf(spec, c.weights.keyNorm), c.rotary, positions,
                    kept.keyRstd);

  c.device.rmsNormApply(input, kept.attentionRstd, normWeight, buffers.normed);
  if (c.observer) c.observer->observe(c.weights.attentionInputs.index, buffers.normed, buffers.qkvGrad);
  const bool wanted = c.layer > 0;  // nothing trainable lies below the first layer
  c.weights.attentionInputs.backward(c.device, c.group(0), c.down(0), buffers.qkvGrad, c.downGrad(0),
                                     wanted ? &buffers.normedGrad : nullptr);
  c.weights.attentionInputs.backwardInput(c.device, c.group(0), buffers.normed, c.downGrad(0));
  if (wanted) {
    c.device.rmsNormGrad(input, kept.attentionRstd, normWeight, buffers.normedGrad, buffers.streamGrad, buffers.roundedGrad());
  }
}

}  // namespace lora_da
