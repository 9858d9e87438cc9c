// A decoder as data: everything in which the families (Llama, Mistral, Qwen, Gemma, Phi-3) differ. Made by lib/families.ts from
// config.json; forward and backward read it and know no family.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/device.h"

namespace lora_da {

struct LinearSpec {
  std::string name;  // within the layer, e.g. "self_attn.q_proj"
  int64_t out = 0;
  int64_t in = 0;
  bool bias = false;
};

// Tensor names in the checkpoint; "{i}" stands for the layer.
struct TensorNames {
  std::string embedding, layer, attentionNorm, mlpNorm, queryNorm, keyNorm, finalNorm, head;
};

struct DecoderSpec {
  int64_t vocabSize = 0;
  int64_t hiddenSize = 0;
  int64_t intermediateSize = 0;
  int64_t layers = 0;
  int32_t heads = 0;
  int32_t kvHeads = 0;
  int32_t headDim = 0;
  float normEpsilon = 0;
  float normOffset = 0;  // added to every norm weight: 1 for Gemma
  float embeddingScale = 1;
  Activation activation = Activation::silu;
  bool headNorm = false;  // RMSNorm on query and key heads
  float attentionScale = 1;
  std::vector<int32_t> windows;           // per layer; 0: full causal attention
  std::vector<float> inverseFrequencies;  // of the rotary pairs
  float rotaryScale = 1;                  // multiplies cos and sin
  int64_t positionLimit = 0;              // longest sequence that the frequencies hold for; 0: any
  bool tiedHead = false;
  std::vector<LinearSpec> attentionInputs;  // side by side they write [q | k | v]
  LinearSpec attentionOutput;
  std::vector<LinearSpec> mlpInputs;  // side by side they write [gate | up]
  LinearSpec mlpOutput;
  TensorNames names;

  int64_t queryWidth() const { return static_cast<int64_t>(heads) * headDim; }
  int64_t kvWidth() const { return static_cast<int64_t>(kvHeads) * headDim; }
  int64_t qkvWidth() const { return queryWidth() + 2 * kvWidth(); }
  std::string layerPrefix(int64_t layer) const {
    std::string prefix = names.layer;
    return prefix.replace(prefix.find("{i}"), 3, std::to_string(layer)) + ".";
  }
  // The linear modules of a layer in its order, and the full names of those of all layers.
  std::vector<LinearSpec> linears() const {
    std::vector<LinearSpec> linears = attentionInputs;
    linears.push_back(attentionOutput);
    linears.insert(linears.end(), mlpInputs.begin(), mlpInputs.end());
    linears.push_back(mlpOutput);
    return linears;
  }
  std::vector<std::string> linearModules() const {
    std::vector<std::string> modules;
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (const LinearSpec& linear : linears()) modules.push_back(layerPrefix(layer) + linear.name);
    }
    return modules;
  }
};

}  // namespace lora_da
