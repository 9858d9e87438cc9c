// The adapters of a model: factors, gradients and optimizer state of all groups in four contiguous arrays, so that clipping and
// AdamW are one pass each.
//
// Modules that read the same input form a group. With k = (adapted modules of the group) * rank:
//   a  [k, in]      the A factors, one below the other: one thin product projects the shared input down for all of them
//   up [rank, out]  the transposed B factors, side by side at their modules' columns (Device's UpProjection); columns of modules
//                   without an adapter stay zero
#pragma once

#include <string>
#include <vector>

#include "core/device.h"

namespace lora_da {

struct AdapterFactors {
  std::string module;
  int64_t out = 0, in = 0, rank = 0;
  std::vector<float> a;  // [rank, in]
  std::vector<float> b;  // [out, rank]
};

// One adapted module: rows [block * rank, (block + 1) * rank) of its group's `a`, columns [offset, offset + out) of `up`.
struct LoraBlock {
  std::string module;
  int64_t offset = 0;
  int64_t out = 0;
};

struct LoraGroup {
  std::vector<LoraBlock> blocks;
  int64_t in = 0, out = 0, k = 0;
  float scaling = 1;
  int64_t aOffset = 0, upOffset = 0;  // first element in the set's arrays
  Matrix a;                           // compute type, for products
  UpProjection up;                    // the same
  Matrix aGrad, upGrad;               // float32
};

// What the set is built from: per group, the modules to adapt.
struct LoraGroupShape {
  int64_t in = 0, out = 0;
  std::vector<LoraBlock> blocks;
};

class LoraSet {
 public:
  // Factors, gradients and moments start at zero. Groups without blocks stay without adapters.
  LoraSet(Device& device, const std::vector<LoraGroupShape>& shapes, int64_t rank, float scaling);

  int64_t rank() const { return rank_; }
  float scaling() const { return scaling_; }
  // The group at an index of `shapes`, or null where it has no adapted module.
  const LoraGroup* group(size_t index) const { return groups_[index].k ? &groups_[index] : nullptr; }
  const std::vector<LoraGroup>& groups() const { return groups_; }
  std::vector<Parameter> parameters() const;

  void zeroGradients(Device& device) const;

  enum class Array { value, firstMoment, secondMoment };
  std::vector<AdapterFactors> read(Device& device, Array array) const;
  // The factors of one module. Throws Error(invalidArgument) where it has no adapter.
  AdapterFactors readModule(Device& device, const std::string& module) const;
  // Throws Error(invalidTensor) where modules or shapes do not match the set's.
  void write(Device& device, Array array, const std::vector<AdapterFactors>& factors);

  size_t bytes() const { return bytes_; }

 private:
  float* pointer(Array array) const;
  // One group's a and then its up, as they lie on the device.
  std::vector<float> download(Device& device, Array array, const LoraGroup& group) const;
  // One block's factors from its group's a [k, in] and up [k, out], on the host.
  AdapterFactors unpack(const LoraGroup& group, size_t block, const float* a, const float* up) const;

  int64_t rank_;
  float scaling_;
  std::vector<LoraGroup> groups_;
  int64_t count_ = 0;
  size_t bytes_ = 0;
  Buffer values_, gradients_, firstMoments_, secondMoments_, shadows_;
};

}  // namespace lora_da
