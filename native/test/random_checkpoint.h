// What the tests of whole models share: a small random checkpoint, and its factors as one list of numbers.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/profiled_device.h"
#include "model/decoder.h"
#include "test_device.h"

namespace lora_da::test {

// A decoder with random weights in a file of its own.
class RandomCheckpoint {
 public:
  RandomCheckpoint(uint64_t seed, DecoderSpec decoder, DType fileType)
      : spec(std::move(decoder)), fileType_(fileType), random_(seed) {
    char name[] = "/tmp/lora-da-model-XXXXXX";
    const int file = mkstemp(name);
    REQUIRE(file >= 0);
    close(file);
    path = name;

    modules = spec.linearModules();
    std::ofstream out(path, std::ios::binary);
    const double headSpread = 2 / std::sqrt(static_cast<double>(spec.hiddenSize));  // logits of size 2
    add(out, spec.names.embedding, {spec.vocabSize, spec.hiddenSize}, 0, spec.tiedHead ? headSpread : 1);
    if (!spec.tiedHead) add(out, spec.names.head, {spec.vocabSize, spec.hiddenSize}, 0, headSpread);
    add(out, spec.names.finalNorm, {spec.hiddenSize}, 1, 0.2);
    for (int64_t layer = 0; layer < spec.layers; ++layer) {
      const std::string prefix = spec.layerPrefix(layer);
      for (const auto& norm : {spec.names.attentionNorm, spec.names.mlpNorm}) add(out, prefix + norm, {spec.hiddenSize}, 1, 0.2);
      if (spec.headNorm) {
        for (const auto& norm : {spec.names.queryNorm, spec.names.keyNorm}) add(out, prefix + norm, {spec.headDim}, 1, 0.2);
      }
      for (const LinearSpec& linear : spec.linears()) {
        add(out, prefix + linear.name + ".weight", {linear.out, linear.in}, 0, 1.5 / std::sqrt(static_cast<double>(linear.in)));
        if (linear.bias) add(out, prefix + linear.name + ".bias", {linear.out}, 0, 0.1);
      }
    }
  }
  // A small one with everything that a Llama-like decoder may have.
  explicit RandomCheckpoint(uint64_t seed, int64_t layers = 2) : RandomCheckpoint(seed, smallSpec(layers), DType::f32) {}
  ~RandomCheckpoint() { std::remove(path.c_str()); }

  std::unique_ptr<Decoder> load(const TestDevice& tested, DType type = DType::f32, bool profile = false) const {
    auto device = tested.make(type);
    if (profile) device = std::make_unique<ProfiledDevice>(std::move(device));
    return load(std::move(device));
  }
  std::unique_ptr<Decoder> load(std::unique_ptr<Device> device) const {
    return std::make_unique<Decoder>(spec, tensors, std::move(device), [](int64_t, int64_t) {});
  }

  std::vector<AdapterFactors> randomFactors(Decoder& model) {
    std::vector<AdapterFactors> factors = model.lora()->read(model.device(), LoraSet::Array::value);
    std::normal_distribution<float> normal(0.0f, 0.1f);
    for (AdapterFactors& entry : factors) {
      for (float& value : entry.a) value = normal(random_);
      for (float& value : entry.b) value = normal(random_);
    }
    return factors;
  }

  TokenBatch batch(const std::vector<int32_t>& lengths) {
    TokenBatch batch;
    batch.sequenceStarts.push_back(0);
    for (const int32_t length : lengths) {
      for (int32_t t = 0; t < length; ++t) {
        const auto id = static_cast<int32_t>(random_() % static_cast<uint64_t>(spec.vocabSize));
        batch.inputIds.push_back(id);
        batch.labels.push_back(t > 1 ? id : -100);
      }
      batch.sequenceStarts.push_back(static_cast<int32_t>(batch.inputIds.size()));
    }
    return batch;
  }

  DecoderSpec spec;
  std::vector<TensorSource> tensors;
  std::vector<std::string> modules;
  std::string path;

 private:
  static DecoderSpec smallSpec(int64_t layers) {
    DecoderSpec spec;
    spec.vocabSize = 61;
    spec.hiddenSize = 24;
    spec.intermediateSize = 40;
    spec.layers = layers;
    spec.heads = 4;
    spec.kvHeads = 2;
    spec.headDim = 6;
    spec.normEpsilon = 1e-5f;
    spec.attentionScale = 1 / std::sqrt(6.0f);
    for (int64_t layer = 0; layer < layers; ++layer) spec.windows.push_back(layer % 2 ? 5 : 0);
    spec.headNorm = true;
    spec.inverseFrequencies = {1.0f, 0.05f, 0.002f};
    spec.tiedHead = false;
    spec.attentionInputs = {{"q_proj", 24, 24, true}, {"k_proj", 12, 24, true}, {"v_proj", 12, 24, true}};
    spec.attentionOutput = {"o_proj", 24, 24, false};
    spec.mlpInputs = {{"gate_proj", 40, 24, false}, {"up_proj", 40, 24, false}};
    spec.mlpOutput = {"down_proj", 24, 40, false};
    spec.names = {"embed.weight",  "layers.{i}",    "norm1.weight", "norm2.weight",
                  "q_norm.weight", "k_norm.weight", "norm.weight",  "head.weight"};
    return spec;
  }
  void add(std::ofstream& out, const std::string& name, const std::vector<int64_t>& shape, double center, double spread) {
    size_t count = 1;
    for (const int64_t size : shape) count *= static_cast<size_t>(size);
    std::normal_distribution<float> normal(static_cast<float>(center), static_cast<float>(spread));
    const auto write = [&](auto element, const auto& rounded) {
      std::vector<decltype(element)> values(count);
      for (auto& value : values) value = rounded(normal(random_));
      const size_t bytes = count * sizeof element;
      tensors.push_back({name, path, fileType_, shape, static_cast<size_t>(out.tellp()), bytes});
      out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(bytes));
    };
    if (fileType_ == DType::bf16)
      write(uint16_t{}, floatToBf16);
    else
      write(float{}, [](float value) { return value; });
  }

  DType fileType_;
  std::mt19937_64 random_;
};

inline std::vector<float> flatten(const std::vector<AdapterFactors>& factors) {
  std::vector<float> values;
  for (const AdapterFactors& entry : factors) {
    values.insert(values.end(), entry.a.begin(), entry.a.end());
    values.insert(values.end(), entry.b.begin(), entry.b.end());
  }
  return values;
}

}  // namespace lora_da::test
