#include "model/weights.h"

#include "core/error.h"
#include "core/file_tensor.h"

namespace lora_da {

namespace {

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Buffer uploadFloats(Device& device, const std::vector<float>& values, const std::string& purpose) {
  Buffer buffer = device.allocate(values.size() * sizeof(float), purpose);
  device.upload(buffer.get(), values.data(), values.size() * sizeof(float));
  return buffer;
}

class Loader {
 public:
  Loader(Device& device, const DecoderSpec& spec, const CheckpointFiles& files, DecoderWeights& weights)
      : device_(device), spec_(spec), files_(files), weights_(weights) {}

  Buffer norm(const std::string& name, int64_t width) {
    std::vector<float> values = readFloats(files_.tensor(name, {width}));
    for (float& value : values) value += spec_.normOffset;
    weights_.parameters += width;
    return uploadFloats(device_, values, name);
  }

  std::unique_ptr<Weight> matrix(const std::string& name, int64_t rows, int64_t cols, WeightUses uses) {
    weights_.parameters += rows * cols;
    auto weight = device_.prepare({files_.tensor(name, {rows, cols})}, uses);
    weights_.bytes += weight->bytes;
    return weight;
  }

  Projection projection(const std::string& prefix, const std::vector<LinearSpec>& linears, size_t index) {
    Projection group;
    group.index = index;
    group.in = linears.front().in;
    std::vector<HostTensor> parts;
    bool biased = false;
    for (const LinearSpec& linear : linears) {
      parts.push_back(files_.tensor(prefix + linear.name + ".weight", {linear.out, linear.in}));
      group.parts.push_back({prefix + linear.name, group.out, linear.out});
      group.out += linear.out;
      biased = biased || linear.bias;
    }
    group.weight = device_.prepare(parts, {true, index != 0, false, true});  // nothing trainable lies below the first group
    weights_.parameters += group.out * group.in;
    weights_.bytes += group.weight->bytes;
    if (biased) group.bias = bias(prefix, linears, group);
    return group;
  }

 private:
  Buffer bias(const std::string& prefix, const std::vector<LinearSpec>& linears, const Projection& group) {
    std::vector<float> values(static_cast<size_t>(group.out), 0.0f);
    for (size_t i = 0; i < linears.size(); ++i) {
      if (!linears[i].bias) continue;
      const auto part = readFloats(files_.tensor(prefix + linears[i].name + ".bias", {linears[i].out}));
      std::copy(part.begin(), part.end(), values.begin() + group.parts[i].offset);
      weights_.parameters += linears[i].out;
    }
    return uploadFloats(device_, values, prefix + linears.front().name + ".bias");
  }

  Device& device_;
  const DecoderSpec& spec_;
  const CheckpointFiles& files_;
  DecoderWeights& weights_;
};

}  // namespace

CheckpointFiles::CheckpointFiles(std::vector<TensorSource> tensors) {
  for (TensorSource& tensor : tensors) {
    auto& file = files_[tensor.file];
    if (!file) file = std::make_shared<MappedFile>(tensor.file);
    if (tensor.offset > file->size() || tensor.bytes > file->size() - tensor.offset) {
      throw Error(code::fileTruncated, tensor.file + ": the file ends before tensor " + tensor.name +
                                           " does: expected at least " + std::to_string(tensor.offset + tensor.bytes) +
                                           " bytes, found " + std::to_string(file->size()));
    }
    const std::string name = tensor.name;
    tensors_.emplace(name, std::move(tensor));
  }
}

HostTensor CheckpointFiles::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Error(code::invalidTensor, "tensor " + name + " is missing");
  const TensorSource& source = found->second;
  size_t elements = 1;
  for (const int64_t size : shape) elements *= static_cast<size_t>(size);
  if (source.shape != shape || source.bytes != elements * sizeOf(source.dtype)) {
    throw Error(code::invalidTensor,
                source.file + ": tensor " + name + " has shape " + describe(source.shape) + ", expected " + describe(shape));
  }
  const auto file = files_.at(source.file);
  HostTensor tensor;
  tensor.name = name;
  tensor.data = file->data() + source.offset;
  tensor.dtype = source.dtype;
  tensor.rows = shape.size() == 2 ? shape[0] : 1;
  tensor.cols = shape.back();
  tensor.populate = [file, offset = source.offset, bytes = source.bytes] { file->populate(offset, bytes); };
  tensor.release = [file, offset = source.offset, bytes = source.bytes] { file->release(offset, bytes); };
  return tensor;
}

void CheckpointFiles::checkIntact() const {
  for (const auto& [path, file] : files_) {
    if (file->truncated()) throw Error(code::fileTruncated, path + ": the file was cut short while it was in use");
  }
}

std::vector<float> readFloats(const HostTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.rows * tensor.cols));
  convertFileElements(tensor, 0, tensor.rows * tensor.cols, DType::f32, values.data());
  return values;
}

DecoderWeights loadWeights(Device& device, const DecoderSpec& spec, const CheckpointFiles& files,
                           const std::function<void(int64_t, int64_t)>& step) {
  DecoderWeights weights;
  Loader loader(device, spec, files, weights);
  const int64_t total = spec.layers + 1;
  for (int64_t layer = 0; layer < spec.layers; ++layer) {
    const std::string prefix = spec.layerPrefix(layer);
    const size_t first = static_cast<size_t>(layer) * 4;
    LayerWeights loaded;
    loaded.attentionNorm = loader.norm(prefix + spec.names.attentionNorm, spec.hiddenSize);
    loaded.mlpNorm = loader.norm(prefix + spec.names.mlpNorm, spec.hiddenSize);
    if (spec.headNorm) {
      loaded.queryNorm = loader.norm(prefix + spec.names.queryNorm, spec.headDim);
      loaded.keyNorm = loader.norm(prefix + spec.names.keyNorm, spec.headDim);
    }
    loaded.attentionInputs = loader.projection(prefix, spec.attentionInputs, first);
    loaded.attentionOutput = loader.projection(prefix, {spec.attentionOutput}, first + 1);
    loaded.mlpInputs = loader.projection(prefix, spec.mlpInputs, first + 2);
    loaded.mlpOutput = loader.projection(prefix, {spec.mlpOutput}, first + 3);
    weights.layers.push_back(std::move(loaded));
    step(layer + 1, total);
  }
  const bool tied = spec.tiedHead;
  weights.embedding = loader.matrix(spec.names.embedding, spec.vocabSize, spec.hiddenSize, {tied, tied, true});
  if (!tied) weights.separateHead = loader.matrix(spec.names.head, spec.vocabSize, spec.hiddenSize, {true, true, false});
  weights.finalNorm = loader.norm(spec.names.finalNorm, spec.hiddenSize);
  files.checkIntact();
  step(total, total);
  return weights;
}

}  // namespace lora_da
