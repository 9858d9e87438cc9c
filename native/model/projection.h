// Linear modules that read the same input, as one product: q/k/v, o, gate/up, down. Forward and backward, with the LoRA term.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "model/lora.h"

namespace lora_da {

struct ProjectionPart {
  std::string module;  // full name, e.g. "model.layers.0.self_attn.q_proj"
  int64_t offset = 0;  // first column in the group's output row
  int64_t out = 0;
};

// Sees a group's input and output gradient during a collection pass. x [T, in], dy [T, out], compute type.
class ProjectionObserver {
 public:
  virtual ~ProjectionObserver() = default;
  virtual void observe(size_t group, const Matrix& x, const Matrix& dy) = 0;
};

struct Projection {
  size_t index = 0;  // of all groups of the model: layer * 4 + position in the layer
  int64_t in = 0, out = 0;
  std::vector<ProjectionPart> parts;
  std::unique_ptr<Weight> weight;
  Buffer bias;  // [out] float32; null: none

  // y [T, out] = x W^T + bias + down up + residual, where down [T, k] = scaling * x a^T is kept for backward. lora: null without
  // adapters; residual: null, or float32 as y.
  void forward(Device& device, const LoraGroup* lora, const Matrix& x, const Matrix& down, const Matrix* residual,
               const Matrix& y) const;

  // From dy [T, out]: B's gradient is accumulated; ddown [T, k], the gradient of the down-projection, and dx [T, in] (null: not
  // wanted) are overwritten.
  void backward(Device& device, const LoraGroup* lora, const Matrix& down, const Matrix& dy, const Matrix& ddown,
                const Matrix* dx) const;
  // A's gradient is accumulated from the input x, which may be made again after backward(), and its ddown.
  void backwardInput(Device& device, const LoraGroup* lora, const Matrix& x, const Matrix& ddown) const;
};

}  // namespace lora_da
