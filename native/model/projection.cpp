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
    device.matmul(Transpose::no, dy, Transpose::yes, lora->up, lora->scaling, false, ddown);
    device.matmul(Transpose::yes, down, Transpose::no, dy, 1.0f, true, lora->upGrad);  // `down` holds the scaling already
  }
  if (dx) device.linearInputGrad(dy, *weight, lora ? &ddown : nullptr, lora ? &lora->a : nullptr, *dx);
}

void Projection::backwardInput(Device& device, const LoraGroup* lora, const Matrix& x, const Matrix& ddown) const {
  if (lora) device.matmul(Transpose::yes, ddown, Transpose::no, x, 1.0f, true, lora->aGrad);
}

}  // namespace lora_da
