// Cross-entropy through the head, a chunk of rows at a time: logits [rows, vocabulary] of one chunk are made, reduced to losses,
// turned into their own gradient and multiplied back before the next chunk begins.
#include <algorithm>

#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

constexpr int64_t chunkRows = 128;

size_t roundUp(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

void CpuDevice::headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                         const Matrix* dx) {
  const int64_t vocabulary = head.out;
  const int64_t rows = std::min(chunkRows, x.rows);
  const size_t logitBytes = roundUp(static_cast<size_t>(rows * vocabulary) * sizeof(float));
  const size_t gradBytes = dx ? static_cast<size_t>(rows * vocabulary) * sizeOf(computeType_) : 0;
  char* memory = static_cast<char*>(scratch(logitBytes + gradBytes));
  const TypedKernels& typedKernels = typed();

  for (int64_t first = 0; first < x.rows; first += chunkRows) {
    const int64_t count = std::min(chunkRows, x.rows - first);
    const Matrix logits{memory, DType::f32, count, vocabulary, vocabulary};
    const Matrix dlogits{memory + logitBytes, computeType_, count, vocabulary, vocabulary};
    linear(x.rowRange(first, count), head, nullptr, nullptr, nullptr, logits);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      void* gradient = dx ? dlogits.rowRange(i, 1).data : nullptr;
      losses[first + i] = typedKernels.crossEntropy(logits.as<float>() + i * vocabulary, targets[first + i],
                                                    rowScale ? rowScale[first + i] : 0.0f, gradient, vocabulary);
    }
    if (dx) linearInputGrad(dlogits, head, false, dx->rowRange(first, count));
  }
}

size_t CpuDevice::workspaceBytes(int64_t vocabulary) const {
  return static_cast<size_t>(chunkRows * vocabulary) * (sizeof(float) + sizeOf(computeType_));
}

void CpuDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(losses[i]) * static_cast<double>(scale[i]);
  *total += sum;
}

}  // namespace lora_da::cpu
