// Rows of the loss: the softmax over the vocabulary. See kernels.h.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

template <class T>
double addToSoftmax(float* logits, int64_t count, int64_t target, RunningSoftmax& row, void* exponentials) {
  if (target >= 0 && target < count) {
    row.targetLogit = logits[target];
    logits[target] = -__builtin_inff();
  }
  Vec peaks = broadcast(row.largest);
  overVectors(count, [&](int64_t i, auto part) { peaks = larger(keep(load(logits + i, part), part, row.largest), peaks); });
  const float peak = maxOfLanes(peaks);
  const double factor = peak > row.largest ? __builtin_exp(static_cast<double>(row.largest) - static_cast<double>(peak)) : 1.0;
  row.largest = peak;
  T* out = static_cast<T*>(exponentials);
  Vec sum{};
  overVectors(count, [&](int64_t i, auto part) {
    const Vec value = keep(softmaxExp<false>(load(logits + i, part) - peak), part, 0.0f);
    sum += value;
    if (out) store(out + i, value, part);
  });
  row.sum = row.sum * factor + sumOfLanesDouble(sum);
  return factor;
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.addToSoftmax = addToSoftmax<T>;
}

}  // namespace

void fillSoftmax(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
}

}  // namespace lora_da::cpu::KERNEL_ISA
