// Rows of the loss: softmax over the vocabulary and cross-entropy. See kernels.h.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

// The sum of exponentials is kept relative to the largest logit so far; a block is small enough to be still in the nearest cache
// when it is read again, so that memory is passed over once.
template <class T>
float crossEntropy(const float* logits, int32_t target, float scale, void* dlogits, int64_t vocabulary) {
  constexpr int64_t blockCols = 2048;
  const float targetLogit = logits[target];  // dlogits may take the place of the logits
  float largest = -__builtin_inff();
  double sum = 0;
  for (int64_t first = 0; first < vocabulary; first += blockCols) {
    const float* block = logits + first;
    const int64_t count = vocabulary - first < blockCols ? vocabulary - first : blockCols;
    Vec peaks = broadcast(largest);
    overVectors(count, [&](int64_t i, auto part) { peaks = larger(keep(load(block + i, part), part, largest), peaks); });
    const float peak = maxOfLanes(peaks);
    if (peak > largest) {
      sum *= __builtin_exp(static_cast<double>(largest) - static_cast<double>(peak));
      largest = peak;
    }
    Vec exponentials{};
    overVectors(count, [&](int64_t i, auto part) {
      exponentials += keep(softmaxExp<false>(load(block + i, part) - largest), part, 0.0f);
    });
    sum += sumOfLanesDouble(exponentials);
  }
  if (T* d = static_cast<T*>(dlogits)) {
    const float share = static_cast<float>(static_cast<double>(scale) / sum);
    overVectors(vocabulary, [&](int64_t i, auto part) {
      store(d + i, share * softmaxExp<isBf16<T>>(load(logits + i, part) - largest), part);
    });
    // In double: where the target is nearly certain, what is left is smaller than float32's rounding of the probability.
    const double weight = static_cast<double>(softmaxExp<false>(broadcast(targetLogit - largest))[0]);
    store(d + target, broadcast(static_cast<float>(static_cast<double>(scale) * ((weight - sum) / sum))), Part{1});
  }
  return static_cast<float>(__builtin_log(sum) + static_cast<double>(largest) - static_cast<double>(targetLogit));
}

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
  table.crossEntropy = crossEntropy<T>;
  table.addToSoftmax = addToSoftmax<T>;
}

}  // namespace

void fillSoftmax(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
}

}  // namespace lora_da::cpu::KERNEL_ISA
