// Decoders of well-known shapes with random weights, for speed only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/decoder.h"

namespace lora_da::bench {

// smollm2-135m, llama-3.2-1b, llama-2-7b, and tiny for a trial. Throws std::invalid_argument that lists them.
DecoderSpec specOf(const std::string& model);

// One block of bfloat16 numbers in memory, as a file, that all matrices are cut from at places of their own: 7B parameters take
// no more room than the largest matrix, and none of them holds zeros or the same rows as another, which a GPU multiplies faster.
class RandomWeights {
 public:
  explicit RandomWeights(const DecoderSpec& spec);
  ~RandomWeights();
  RandomWeights(const RandomWeights&) = delete;

  std::vector<TensorSource> tensors() const { return tensors_; }

 private:
  void write(const std::vector<uint16_t>& values);
  void add(const std::string& name, std::vector<int64_t> shape, bool norm);

  int file_ = -1;
  size_t matrixElements_ = 0, made_ = 0;
  std::vector<TensorSource> tensors_;
};

// Adapters on all linear modules, rank-stabilised with alpha 16, both factors random.
void addRandomAdapters(Decoder& model, int64_t rank);

// Sequences of random tokens, every one labelled.
TokenBatch randomBatch(const DecoderSpec& spec, int64_t sequences, int64_t length);

// Flops that a training step needs: the products of forward and of the input gradients (none below the first layer's inputs),
// LoRA's, the head's both ways over the rows that predict a label, and attention's six of a query and a key. Nothing that is
// computed twice counts twice.
double stepFlops(const DecoderSpec& spec, int64_t rank, int64_t sequences, int64_t length);

}  // namespace lora_da::bench
