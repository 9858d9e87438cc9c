// MLP block: x + down_proj(activation(gate_proj n) * up_proj n), n = RMSNorm(x).
#include "model/layers.h"

namespace lora_da {

void mlpForward(const LayerContext& c, bool withOutput) {
  LayerActivations& kept = c.buffers.layer(c.layer);
  c.device.rmsNorm(kept.middle, static_cast<const float*>(c.weights.mlpNorm.get()), c.spec.normEpsilon, c.buffers.normed,
                   kept.mlpRstd, kept.mlpInput.data ? &kept.mlpInput : nullptr);
  c.weights.mlpInputs.forward(c.device, c.group(2), c.buffers.normed, c.down(2), nullptr, kept.gateUp);
  if (withOutput) {
    c.device.gatedMlp(kept.gateUp, c.spec.activation, c.buffers.hidden);
    c.weights.mlpOutput.forward(c.device, c.group(3), c.buffers.hidden, c.down(3), &kept.middle, c.buffers.output(c.layer));
  } else if (const LoraGroup* lora = c.group(3)) {  // backward needs the down-projection, not the output
    c.device.gatedMlp(kept.gateUp, c.spec.activation, c.buffers.hidden);
    c.device.matmul(Transpose::no, c.buffers.hidden, Transpose::yes, lora->a, lora->scaling, false, c.down(3));
  }
}

void mlpBackward(const LayerContext& c) {
  StepBuffers& buffers = c.buffers;
  LayerActivations& kept = buffers.layer(c.layer);
  const auto* normWeight = static_cast<const float*>(c.weights.mlpNorm.get());

  // The gated product and the normed input are cheap to make again and are not kept.
  c.weights.mlpOutput.backward(c.device, c.group(3), c.down(3), buffers.branchGrad, c.downGrad(3), &buffers.hiddenGrad);
  c.device.gatedMlpGrad(kept.gateUp, c.spec.activation, buffers.hiddenGrad, buffers.hidden);
  if (c.observer) c.observer->observe(c.weights.mlpOutput.index, buffers.hidden, buffers.branchGrad);
  c.weights.mlpOutput.backwardInput(c.device, c.group(3), buffers.hidden, c.downGrad(3));

  const Matrix& input = buffers.mlpInput(c.layer);
  c.device.rmsNormApply(input, kept.mlpRstd, normWeight, buffers.normed);
  if (c.observer) c.observer->observe(c.weights.mlpInputs.index, buffers.normed, kept.gateUp);
  c.weights.mlpInputs.backward(c.device, c.group(2), c.down(2), kept.gateUp, c.downGrad(2), &buffers.normedGrad);
  c.weights.mlpInputs.backwardInput(c.device, c.group(2), buffers.normed, c.downGrad(2));
  c.device.rmsNormGrad(input, kept.mlpRstd, normWeight, buffers.normedGrad, buffers.streamGrad, buffers.roundedGrad());
}

}  // namespace lora_da
