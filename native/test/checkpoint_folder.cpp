#include "checkpoint_folder.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

namespace lora_da::test {

namespace {

using Json = nlohmann::json;

constexpr double tau = 6.283185307179586476925;

Json readJson(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot open " + path);
  return Json::parse(file);
}

// A field's value; null counts as absent.
template <class T>
T valueOr(const Json& object, const char* field, T fallback) {
  const auto found = object.find(field);
  return found == object.end() || found->is_null() ? fallback : found->get<T>();
}

// Everything in which a family differs from Llama.
struct Family {
  bool inputBias = false;
  bool headNorm = false;
  bool fused = false;
  bool window = false;
  float normOffset = 0;
  bool scaledEmbedding = false;
};

Family familyOf(const std::string& type) {
  static const std::map<std::string, Family> families = [] {
    std::map<std::string, Family> table;
    table["llama"];
    table["mistral"].window = true;
    table["qwen2"].inputBias = true;
    table["qwen3"].headNorm = true;
    table["gemma"].normOffset = 1;
    table["gemma"].scaledEmbedding = true;
    table["phi3"].fused = true;
    table["phi3"].window = true;
    return table;
  }();
  const auto found = families.find(type);
  if (found == families.end()) throw std::runtime_error("model_type " + type + " is not supported");
  return found->second;
}

// The rope types "default" and "llama3" (transformers, modeling_rope_utils.py), in double precision.
std::vector<float> inverseFrequencies(const Json& config, int64_t headDim) {
  const Json& rope = config.at("rope_parameters");
  const auto type = rope.at("rope_type").get<std::string>();
  if (type != "default" && type != "llama3") throw std::runtime_error("rope type " + type + " is not supported");
  const double theta = rope.at("rope_theta").get<double>();
  const auto dimension = static_cast<int64_t>(static_cast<double>(headDim) * valueOr(rope, "partial_rotary_factor", 1.0));
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dimension; i += 2) {
    double frequency = std::pow(theta, -static_cast<double>(i) / static_cast<double>(dimension));
    if (type == "llama3") {
      const auto number = [&](const char* field) { return rope.at(field).get<double>(); };
      const double factor = number("factor"), low = number("low_freq_factor"), high = number("high_freq_factor");
      const double original = number("original_max_position_embeddings"), wavelength = tau / frequency;
      const double smooth = std::min(1.0, std::max(0.0, (original / wavelength - low) / (high - low)));
      frequency = (1 - smooth) * frequency / factor + smooth * frequency;
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

void addLinears(DecoderSpec& spec, const Family& family) {
  const int64_t hidden = spec.hiddenSize, inner = spec.intermediateSize;
  const int64_t query = spec.queryWidth(), key = spec.kvWidth();
  const bool bias = family.inputBias;
  if (family.fused) {
    spec.attentionInputs = {{"self_attn.qkv_proj", query + 2 * key, hidden, bias}};
    spec.mlpInputs = {{"mlp.gate_up_proj", 2 * inner, hidden, false}};
  } else {
    spec.attentionInputs = {{"self_attn.q_proj", query, hidden, bias},
                            {"self_attn.k_proj", key, hidden, bias},
                            {"self_attn.v_proj", key, hidden, bias}};
    spec.mlpInputs = {{"mlp.gate_proj", inner, hidden, false}, {"mlp.up_proj", inner, hidden, false}};
  }
  spec.attentionOutput = {"self_attn.o_proj", hidden, query, false};
  spec.mlpOutput = {"mlp.down_proj", hidden, inner, false};
}

// Fields that would add what addLinears and the loops over windows leave out.
void refuseUnsupported(const Json& config) {
  for (const char* field : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    if (valueOr(config, field, false)) throw std::runtime_error(std::string(field) + " is not supported here");
  }
}

// Names, types, shapes and places of a safetensors file's tensors: 8 bytes of header length, a JSON header, the data.
std::vector<TensorSource> readHeader(const std::string& path) {
  static const std::map<std::string, DType> types = {{"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}};
  std::ifstream file(path, std::ios::binary);
  uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  if (!file || length > (uint64_t{1} << 27)) throw std::runtime_error("cannot read a safetensors header from " + path);
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  const Json header = Json::parse(text);
  std::vector<TensorSource> tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto first = entry.at("data_offsets")[0].get<size_t>(), last = entry.at("data_offsets")[1].get<size_t>();
    tensors.push_back({name, path, types.at(entry.at("dtype").get<std::string>()), entry.at("shape").get<std::vector<int64_t>>(),
                       sizeof length + length + first, last - first});
  }
  return tensors;
}

}  // namespace

DecoderSpec readDecoderSpec(const std::string& folder) {
  const Json config = readJson(folder + "/config.json");
  const Family family = familyOf(config.at("model_type").get<std::string>());
  refuseUnsupported(config);
  DecoderSpec spec;
  spec.vocabSize = config.at("vocab_size").get<int64_t>();
  spec.hiddenSize = config.at("hidden_size").get<int64_t>();
  spec.intermediateSize = config.at("intermediate_size").get<int64_t>();
  spec.layers = config.at("num_hidden_layers").get<int64_t>();
  spec.heads = config.at("num_attention_heads").get<int32_t>();
  spec.kvHeads = valueOr(config, "num_key_value_heads", spec.heads);
  spec.headDim = valueOr(config, "head_dim", static_cast<int32_t>(spec.hiddenSize / spec.heads));
  spec.normEpsilon = config.at("rms_norm_eps").get<float>();
  spec.normOffset = family.normOffset;
  if (family.scaledEmbedding) spec.embeddingScale = static_cast<float>(std::sqrt(static_cast<double>(spec.hiddenSize)));
  const auto activation = config.at("hidden_act").get<std::string>();
  if (activation != "silu" && activation != "gelu_pytorch_tanh") {
    throw std::runtime_error("hidden_act " + activation + " is not supported");
  }
  spec.activation = activation == "silu" ? Activation::silu : Activation::geluTanh;
  spec.headNorm = family.headNorm;
  spec.attentionScale = static_cast<float>(1 / std::sqrt(static_cast<double>(spec.headDim)));
  spec.windows.assign(static_cast<size_t>(spec.layers), family.window ? valueOr(config, "sliding_window", 0) : 0);
  spec.inverseFrequencies = inverseFrequencies(config, spec.headDim);
  spec.tiedHead = config.at("tie_word_embeddings").get<bool>();
  addLinears(spec, family);
  spec.names = {
      "model.embed_tokens.weight", "model.layers.{i}",        "input_layernorm.weight", "post_attention_layernorm.weight",
      "self_attn.q_norm.weight",   "self_attn.k_norm.weight", "model.norm.weight",      "lm_head.weight"};
  return spec;
}

std::vector<TensorSource> readTensorSources(const std::string& folder) {
  std::set<std::string> files;
  if (const std::string index = folder + "/model.safetensors.index.json"; std::ifstream(index)) {
    const Json map = readJson(index).at("weight_map");
    for (const auto& entry : map) files.insert(entry.get<std::string>());
  } else {
    files.insert("model.safetensors");
  }
  std::vector<TensorSource> tensors;
  for (const std::string& file : files) {
    std::vector<TensorSource> more = readHeader(folder + "/" + file);
    tensors.insert(tensors.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  }
  return tensors;
}

TensorFile::TensorFile(const std::string& path) : path_(path) {
  for (TensorSource& tensor : readHeader(path)) {
    const std::string name = tensor.name;
    tensors_.emplace(name, std::move(tensor));
  }
}

std::vector<float> TensorFile::read(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error(path_ + " has no tensor " + name);
  const TensorSource& source = found->second;
  std::string bytes(source.bytes, '\0');
  std::ifstream file(path_, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(source.offset));
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(path_ + " ends before tensor " + name + " does");
  HostTensor tensor;
  tensor.name = name;
  tensor.data = bytes.data();
  tensor.dtype = source.dtype;
  tensor.rows = 1;
  tensor.cols = static_cast<int64_t>(source.bytes / sizeOf(source.dtype));
  return readFloats(tensor);
}

}  // namespace lora_da::test
