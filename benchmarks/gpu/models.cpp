#include "models.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

#include "core/random.h"

namespace lora_da::bench {

namespace {

struct Shape {
  int64_t vocabulary, hidden, intermediate, layers;
  int32_t heads, kvHeads, headDim;
  double theta;
  bool tied;
};

const std::map<std::string, Shape>& shapes() {
  static const std::map<std::string, Shape> table = {{"smollm2-135m", {49152, 576, 1536, 30, 9, 3, 64, 1e5, true}},
                                                     {"llama-3.2-1b", {128256, 2048, 8192, 16, 32, 8, 64, 5e5, true}},
                                                     {"llama-2-7b", {32000, 4096, 11008, 32, 32, 32, 128, 1e4, false}},
                                                     {"tiny", {256, 64, 96, 2, 4, 2, 16, 1e4, false}}};
  return table;
}

// Element i of a matrix comes from this many elements behind that of the matrix made before it.
constexpr size_t matrixShift = 4099 * 16;

size_t elementsOf(const std::vector<int64_t>& shape) {
  size_t elements = 1;
  for (const int64_t size : shape) elements *= static_cast<size_t>(size);
  return elements;
}

}  // namespace

DecoderSpec specOf(const std::string& model) {
  const auto found = shapes().find(model);
  if (found == shapes().end()) {
    std::string names;
    for (const auto& [name, shape] : shapes()) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("unknown model " + model + "; known are " + names);
  }
  const Shape& shape = found->second;
  DecoderSpec spec;
  spec.vocabSize = shape.vocabulary;
  spec.hiddenSize = shape.hidden;
  spec.intermediateSize = shape.intermediate;
  spec.layers = shape.layers;
  spec.heads = shape.heads;
  spec.kvHeads = shape.kvHeads;
  spec.headDim = shape.headDim;
  spec.normEpsilon = 1e-5f;
  spec.attentionScale = 1 / std::sqrt(static_cast<float>(shape.headDim));
  spec.windows.assign(static_cast<size_t>(shape.layers), 0);
  for (int32_t i = 0; i < shape.headDim; i += 2)
    spec.inverseFrequencies.push_back(static_cast<float>(std::pow(shape.theta, -static_cast<double>(i) / shape.headDim)));
  spec.tiedHead = shape.tied;
  spec.attentionInputs = {{"self_attn.q_proj", spec.queryWidth(), shape.hidden, false},
                          {"self_attn.k_proj", spec.kvWidth(), shape.hidden, false},
                          {"self_attn.v_proj", spec.kvWidth(), shape.hidden, false}};
  spec.attentionOutput = {"self_attn.o_proj", shape.hidden, spec.queryWidth(), false};
  spec.mlpInputs = {{"mlp.gate_proj", shape.intermediate, shape.hidden, false},
                    {"mlp.up_proj", shape.intermediate, shape.hidden, false}};
  spec.mlpOutput = {"mlp.down_proj", shape.hidden, shape.intermediate, false};
  spec.names = {
      "model.embed_tokens.weight", "model.layers.{i}",        "input_layernorm.weight", "post_attention_layernorm.weight",
      "self_attn.q_norm.weight",   "self_attn.k_norm.weight", "model.norm.weight",      "lm_head.weight"};
  return spec;
}

RandomWeights::RandomWeights(const DecoderSpec& spec) : file_(memfd_create("lora-da-random-weights", 0)) {
  if (file_ < 0) throw std::runtime_error("cannot make a file in memory");
  const int64_t deepest = std::max(spec.hiddenSize, spec.queryWidth());
  const int64_t largest = std::max(spec.vocabSize * spec.hiddenSize, spec.intermediateSize * deepest);
  const size_t matrices = spec.linearModules().size() + 2;
  matrixElements_ = static_cast<size_t>(largest) + matrices * matrixShift;

  const double bound = std::sqrt(3.0) * 0.02;
  Random random(1, "weights");
  std::vector<uint16_t> values(matrixElements_);
  for (uint16_t& value : values) value = floatToBf16(static_cast<float>(random.uniform(-bound, bound)));
  write(values);
  write(std::vector<uint16_t>(static_cast<size_t>(spec.hiddenSize), floatToBf16(1)));

  add(spec.names.embedding, {spec.vocabSize, spec.hiddenSize}, false);
  if (!spec.tiedHead) add(spec.names.head, {spec.vocabSize, spec.hiddenSize}, false);
  add(spec.names.finalNorm, {spec.hiddenSize}, true);
  for (int64_t layer = 0; layer < spec.layers; ++layer) {
    const std::string prefix = spec.layerPrefix(layer);
    for (const std::string& norm : {spec.names.attentionNorm, spec.names.mlpNorm}) add(prefix + norm, {spec.hiddenSize}, true);
    for (const LinearSpec& linear : spec.linears()) add(prefix + linear.name + ".weight", {linear.out, linear.in}, false);
  }
}

RandomWeights::~RandomWeights() {
  close(file_);
}

void RandomWeights::write(const std::vector<uint16_t>& values) {
  const char* bytes = reinterpret_cast<const char*>(values.data());
  for (size_t done = 0, total = values.size() * sizeof(uint16_t); done < total;) {
    const ssize_t written = ::write(file_, bytes + done, total - done);
    if (written <= 0) throw std::runtime_error("cannot write the random weights into memory");
    done += static_cast<size_t>(written);
  }
}

void RandomWeights::add(const std::string& name, std::vector<int64_t> shape, bool norm) {
  const size_t elements = elementsOf(shape);
  const size_t first = norm ? matrixElements_ : made_ * matrixShift;
  if (!norm) ++made_;
  tensors_.push_back({name, "/proc/self/fd/" + std::to_string(file_), DType::bf16, std::move(shape), first * sizeof(uint16_t),
                      elements * sizeof(uint16_t)});
}

void addRandomAdapters(Decoder& model, int64_t rank) {
  model.addLora(model.spec().linearModules(), rank, static_cast<float>(16 / std::sqrt(static_cast<double>(rank))));
  std::vector<AdapterFactors> factors = model.lora()->read(model.device(), LoraSet::Array::value);
  for (AdapterFactors& entry : factors) {
    Random random(1, entry.module);
    const double bound = 1 / std::sqrt(static_cast<double>(entry.in));
    for (float& value : entry.a) value = static_cast<float>(random.uniform(-bound, bound));
    for (float& value : entry.b) value = static_cast<float>(random.uniform(-1e-3, 1e-3));
  }
  model.lora()->write(model.device(), LoraSet::Array::value, factors);
}

TokenBatch randomBatch(const DecoderSpec& spec, int64_t sequences, int64_t length) {
  Random random(1, "tokens");
  TokenBatch batch;
  batch.sequenceStarts.push_back(0);
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (int64_t t = 0; t < length; ++t)
      batch.inputIds.push_back(static_cast<int32_t>(random.next() % static_cast<uint64_t>(spec.vocabSize)));
    batch.sequenceStarts.push_back(static_cast<int32_t>(batch.inputIds.size()));
  }
  batch.labels = batch.inputIds;
  return batch;
}

double stepFlops(const DecoderSpec& spec, int64_t rank, int64_t sequences, int64_t length) {
  const double tokens = static_cast<double>(sequences * length), layers = static_cast<double>(spec.layers);
  double weights = 0, factors = 0;
  for (const LinearSpec& linear : spec.linears()) {
    weights += static_cast<double>(linear.out * linear.in);
    factors += static_cast<double>(rank * (linear.out + linear.in));
  }
  const double inputs = static_cast<double>(spec.qkvWidth() * spec.hiddenSize);
  const double products = 2 * tokens * (2 * layers * weights - inputs + 3 * layers * factors);
  const double labels = static_cast<double>(sequences * (length - 1));
  const double head = 4 * labels * static_cast<double>(spec.vocabSize * spec.hiddenSize);
  const double pairs = static_cast<double>(sequences) * static_cast<double>(length) * static_cast<double>(length + 1) / 2;
  const double attention = 6 * 2 * layers * pairs * static_cast<double>(spec.queryWidth());
  return products + head + attention;
}

}  // namespace lora_da::bench
