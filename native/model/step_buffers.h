// The buffers of one pass over a batch, laid out in the arena.
#pragma once

#include <vector>

#include "core/device.h"
#include "model/arena.h"
#include "model/batch.h"
#include "model/decoder_spec.h"
#include "model/lora.h"

namespace lora_da {

enum class Recompute { none, layer };

// What a pass keeps: everything that backward needs, only the layers' inputs, or nothing (evaluation).
enum class Keep { all, layerInputs, nothing };

constexpr size_t groupsPerLayer = 4;  // attention inputs, attention output, mlp inputs, mlp output

// Kept from a layer's forward for its backward. T rows each.
struct LayerActivations {
  float* attentionRstd = nullptr;   // [T]
  Matrix qkv;                       // [T, q + k + v], q and k rotated
  Matrix qkvRaw;                    // before norm and rotation; only where heads are normed
  float* queryRstd = nullptr;       // [T, heads], only where heads are normed
  float* keyRstd = nullptr;         // [T, kvHeads]
  Matrix context;                   // attention's output [T, q]
  float* lse = nullptr;             // [T, heads]
  Matrix attentionInput, mlpInput;  // what enters the two norms, in the compute type [T, H], where that is not float32
  Matrix middle;                    // residual stream between attention and MLP, float32 [T, H]
  float* mlpRstd = nullptr;         // [T]
  Matrix gateUp;                    // [T, 2I]; backward turns it into its own gradient
  Matrix down[groupsPerLayer];      // LoRA down-projections [T, largest k of the layers]
};

struct StepBuffers {
  // Residual stream entering each layer, float32 [T, H]: a buffer each where backward reads it, or one for all.
  std::vector<Matrix> inputs;
  std::vector<LayerActivations> layers;  // one per layer, or a single one used by all
  // Scratch of forward
  Matrix normed;               // [T, H]
  Matrix hidden;               // gated product [T, I]
  Matrix finalStream;          // residual stream after the last layer, float32 [T, H]
  Matrix finalInput;           // the same in the compute type, where that is not float32
  float* finalRstd = nullptr;  // [T]
  // Head, over the rows that predict a label
  Matrix labelNormed;       // [L, H]
  float* losses = nullptr;  // [L]
  // Backward
  Matrix labelGrad;    // [L, H] float32
  Matrix streamGrad;   // gradient of the residual stream, float32 [T, H]
  Matrix branchGrad;   // the same in the compute type; the same buffer where that is float32
  Matrix normedGrad;   // float32 [T, H]
  Matrix hiddenGrad;   // [T, I]
  Matrix contextGrad;  // [T, q]
  Matrix qkvGrad;      // [T, q + k + v]
  Matrix downGrad;     // [T, largest k]

  // The residual stream after a layer.
  const Matrix& output(int64_t layer) const {
    const auto next = static_cast<size_t>(layer + 1);
    return next < inputs.size() ? inputs[next] : finalStream;
  }
  // Takes another buffer for streamGrad.
  void setStreamGrad(const Matrix& gradient) {
    if (!roundedGrad()) branchGrad = gradient;
    streamGrad = gradient;
  }
  // What rmsNormGrad has to write beside streamGrad: branchGrad, or nothing where they are one.
  const Matrix* roundedGrad() const { return branchGrad.data == streamGrad.data ? nullptr : &branchGrad; }
  // What backward reads of the stream that enters the norms, in the compute type.
  const Matrix& attentionInput(int64_t index) {
    const Matrix& kept = layer(index).attentionInput;
    return kept.data ? kept : inputs[static_cast<size_t>(index)];
  }
  const Matrix& mlpInput(int64_t index) {
    const LayerActivations& kept = layer(index);
    return kept.mlpInput.data ? kept.mlpInput : kept.middle;
  }
  LayerActivations& layer(int64_t index) { return layers.size() == 1 ? layers.front() : layers[static_cast<size_t>(index)]; }
};

// Residual streams that outlive the pass over their batch, float32 [T, H] each: those entering the layers (data null: not kept),
// and the gradient of the one after the layer that backward has come to.
struct ResidualStreams {
  std::vector<Matrix> inputs;
  Matrix gradient;
};

struct PassShape {
  int64_t rows = 0;
  int64_t labelRows = 0;
  Keep keep = Keep::all;
  bool backward = false;
};

// `lora` null: no adapters.
StepBuffers layoutStep(Arena& arena, const DecoderSpec& spec, const Device& device, const LoraSet* lora, const PassShape& shape);

}  // namespace lora_da
