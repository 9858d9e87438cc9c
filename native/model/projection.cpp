#include "model/projection.h"

namespace lora_da {

void Projection::forward(Device& device, const LoraGroup* lora, const Matrix& x, const Matrix& down, const Matrix* residual,
                         const Matrix& y) const {
  const auto* biasValues = static_cast<const float*>(bias.get());
  if (lora) device.matmul(Transpose::no, x, Transpose::yes, lora->a, lora->scaling, false, down);
  device.linear(x, *weight, biasValues, lora ? &down : nullptr, lora ? &lora->up : nullptr, residual, y);
}

void Projection::backward(Device& device, const LoraGroup* lora, const Matrix& down, const Matrix& dy, const Matrix& ddown,
                          const Matrix* dx) const {
  if (lora) {
    const UpProjection& up = lora->up;
    for (size_t i = 0; i < up.blocks.size(); ++i) {
      const auto [first, count] = up.blocks[i];
      const int64_t row = static_cast<int64_t>(i) * up.rank();
      const Matrix part = dy.columns(first, count);
      device.matmul(Transpose::no, part, Transpose::yes, up.factors.columns(first, count), lora->scaling, false,
                    ddown.columns(row, up.rank()));
      // `down` holds the scaling already.
      device.matmul(Transpose::yes, down.columns(row, up.rank()), Transpose::no, part, 1.0f, true,
                    lora->upGrad.columns(first, count));
    }
  }
  if (dx) device.linearInputGrad(dy, *weight, lora ? &ddown : nullptr, lora ? &lora->a : nullptr, *dx);
}

void Projection::backwardInput(Device& device, const LoraGroup* lora, const Matrix& x, const Matrix& ddown) const {
  if (lora) device.matmul(Transpose::yes, ddown, Transpose::no, x, 1.0f, true, lora->aGrad);
}

}  // namespace lora_da
