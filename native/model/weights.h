// The frozen weights of a decoder, from mapped safetensors files into the device's layouts.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/mapped_file.h"
#include "model/decoder_spec.h"
#include "model/projection.h"

namespace lora_da {

// One tensor of the checkpoint, as the (already checked) header describes it.
struct TensorSource {
  std::string name;
  std::string file;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  size_t offset = 0;  // from the start of the file
  size_t bytes = 0;
};

struct LayerWeights {
  Buffer attentionNorm, mlpNorm;  // [hidden] float32, norm offset included
  Buffer queryNorm, keyNorm;      // [headDim]; null where the spec has no head norm
  Projection attentionInputs, attentionOutput, mlpInputs, mlpOutput;
};

class CheckpointFiles {
 public:
  // Maps the files. Throws Error(fileTruncated) where a tensor would lie beyond the end of its file.
  explicit CheckpointFiles(std::vector<TensorSource> tensors);

  // A matrix, or a vector as one row. Throws Error(invalidTensor) where it is missing or of another shape.
  HostTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // Throws Error(fileTruncated) when a file was cut after it was mapped.
  void checkIntact() const;

 private:
  std::map<std::string, TensorSource> tensors_;
  std::map<std::string, std::shared_ptr<MappedFile>> files_;
};

struct DecoderWeights {
  std::unique_ptr<Weight> embedding;  // also the head where it is tied
  std::unique_ptr<Weight> separateHead;
  Buffer finalNorm;
  std::vector<LayerWeights> layers;
  int64_t parameters = 0;
  size_t bytes = 0;  // of the matrices as the device holds them

  const Weight& head() const { return separateHead ? *separateHead : *embedding; }
};

// `step` is called after each part with (done, total) and may throw to stop.
DecoderWeights loadWeights(Device& device, const DecoderSpec& spec, const CheckpointFiles& files,
                           const std::function<void(int64_t, int64_t)>& step);

// Values of a tensor in float32.
std::vector<float> readFloats(const HostTensor& tensor);

}  // namespace lora_da
