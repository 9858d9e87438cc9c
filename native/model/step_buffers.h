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
  float* attentionRstd = nullptr;  // [T]
  Matrix qkv;                      // [T, q + k + v], q and k rotated
  Matrix qkvRaw;                   // before norm and rotation; only where heads are normed
  float* queryRstd = nullptr;      // [T, heads], only where heads are normed
  float* keyRstd = nullptr;        // [T, kvHeads]
  Matrix context;                  // attention's output [T, q]
  float* lse = nullptr;            // [T, heads]
  Matrix middle;                   // residual stream between attention and MLP, float32 [T, H]
  float* mlpRstd = nullptr;        // [T]
  Matrix gateUp;                   // [T, 2I]; backward turns it into its own gradient
  Matrix down[groupsPerLayer];     // LoRA down-projections [T, largest k of the layers]
};

struct StepBuffers {
  std::vector<Matrix> inputs;            // residual stream entering each layer, float32 [T, H]
  std::vector<LayerActivations> layers;  // one per layer, or a single one used by all
  // Scratch of forward
  Matrix normed;               // [T, H]
  Matrix branch;               // what a block adds to the residual stream, float32 [T, H]
  Matrix hidden;               // gated product [T, I]
  Matrix finalStream;          // residual stream after the last layer, float32 [T, H]
  float* finalRstd = nullptr;  // [T]
  // Head, over the rows that predict a label
  Matrix labelNormed;       // [L, H]
  float* losses = nullptr;  // [L]
  // Backward
  Matrix labelGrad;    // [L, H] float32
  Matrix streamGrad;   // gradient of the residual stream, float32 [T, H]
  Matrix branchGrad;   // the same in the compute type
  Matrix normedGrad;   // float32 [T, H]
  Matrix hiddenGrad;   // [T, I]
  Matrix contextGrad;  // [T, q]
  Matrix qkvGrad;      // [T, q + k + v]
  Matrix downGrad;     // [T, largest k]

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
StepBuffers layoutStep(Arena& arena, const DecoderSpec& spec, DType computeType, const LoraSet* lora, const PassShape& shape);

}  // namespace lora_da
