// Hugging Face checkpoint folders without Node, for tests: config.json of the families that the reference folders have, as
// lib/families.ts and lib/rope.ts read it, and safetensors files, single or sharded.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "model/decoder_spec.h"
#include "model/weights.h"

namespace lora_da::test {

// Throws std::runtime_error naming the field that is missing or not supported.
DecoderSpec readDecoderSpec(const std::string& folder);

// The tensors of model.safetensors, or of the files that model.safetensors.index.json names.
std::vector<TensorSource> readTensorSources(const std::string& folder);

// One safetensors file whose tensors are read one by one.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path);
  // Values in float32. Throws std::runtime_error where there is no such tensor.
  std::vector<float> read(const std::string& name) const;

 private:
  std::string path_;
  std::map<std::string, TensorSource> tensors_;
};

}  // namespace lora_da::test
