// Cross-entropy through the head, a chunk of rows at a time: logits [rows, vocabulary] of one chunk are made, reduced to losses,
// turned into their own gradient and multiplied back before the next chunk begins.
#include <algorithm>

#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// Own products lay the head out again for every chunk, so theirs are as large as this much memory allows; oneDNN's panels are
// laid out once, and its chunks stay near the cache.
constexpr size_t chunkBytes = size_t{52} << 20;
constexpr int64_t fewestRows = 96;
constexpr int64_t libraryChunkRows = 128;

// Floats from one row of logits to the next where products read rows that lie apart. Rows a multiple of the page size apart, as
// those of many vocabularies would be, fall on the same few lines of a cache.
int64_t logitStride(int64_t vocabulary) {
  constexpr int64_t pageFloats = 1024, shift = 80;
  return (vocabulary + pageFloats - 1) / pageFloats * pageFloats + shift;
}

}  // namespace

int64_t CpuDevice::headChunkRows(int64_t rows, int64_t vocabulary) const {
  if (!hasPanels()) return std::min(rows, libraryChunkRows);
  const int64_t most = std::max(fewestRows, static_cast<int64_t>(chunkBytes / (static_cast<size_t>(vocabulary) * sizeof(float))));
  const int64_t chunks = std::max<int64_t>((rows + most - 1) / most, 1);
  const int64_t even = (rows + chunks - 1) / chunks;
  return std::min(rows, (even + panelRowGrain - 1) / panelRowGrain * panelRowGrain);
}

// The gradient takes the place of its logits, row by row, where products read rows that lie apart.
void CpuDevice::headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                         const Matrix* dx) {
  const int64_t vocabulary = head.out;
  const int64_t rows = headChunkRows(x.rows, vocabulary);
  const bool inPlace = hasPanels();
  const int64_t stride = inPlace ? logitStride(vocabulary) : vocabulary;
  const size_t logitBytes = static_cast<size_t>(rows * stride) * sizeof(float);
  const size_t gradBytes = dx && !inPlace ? static_cast<size_t>(rows * vocabulary) * sizeOf(computeType_) : 0;
  char* memory = static_cast<char*>(scratch(logitBytes + gradBytes));
  const int64_t gradStride = inPlace ? stride * static_cast<int64_t>(sizeof(float) / sizeOf(computeType_)) : vocabulary;
  const TypedKernels& typedKernels = typed();

  for (int64_t first = 0; first < x.rows; first += rows) {
    const int64_t count = std::min(rows, x.rows - first);
    const Matrix logits{memory, DType::f32, count, vocabulary, stride};
    const Matrix dlogits{inPlace ? memory : memory + logitBytes, computeType_, count, vocabulary, gradStride};
    linear(x.rowRange(first, count), head, nullptr, nullptr, nullptr, nullptr, logits);
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 4)
    for (int64_t i = 0; i < count; ++i) {
      void* gradient = dx ? dlogits.rowRange(i, 1).data : nullptr;
      losses[first + i] = typedKernels.crossEntropy(logits.as<float>() + i * stride, targets[first + i],
                                                    rowScale ? rowScale[first + i] : 0.0f, gradient, vocabulary);
    }
    if (dx) linearInputGrad(dlogits, head, nullptr, nullptr, dx->rowRange(first, count));
  }
}

size_t CpuDevice::workspaceBytes(int64_t labelRows, int64_t vocabulary) const {
  const auto rows = static_cast<size_t>(headChunkRows(labelRows, vocabulary));
  if (hasPanels()) return rows * static_cast<size_t>(logitStride(vocabulary)) * sizeof(float);
  return rows * static_cast<size_t>(vocabulary) * (sizeof(float) + sizeOf(computeType_));
}

void CpuDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(losses[i]) * static_cast<double>(scale[i]);
  *total += sum;
}

}  // namespace lora_da::cpu
