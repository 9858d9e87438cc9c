// Cross-entropy through the head.
//
// Own products go through the vocabulary tile by tile, so that each part of the head is read, and laid out for its input
// gradient, once for all rows, and logits never leave the cache: a tile's logits become exponentials relative to each row's
// largest so far, which are multiplied back at once; where a row's maximum grows, what it has summed is scaled (as attention
// does, Milakov and Gimelshein 2018). With q = exponentials of all but the target, and w = the head's rows,
//   dx = scale * share * (sum over them of q w - (sum of q) w_target),   share = 1 / (sum of all exponentials).
//
// oneDNN's weights are packed as a whole, so that there a chunk of rows makes its logits for the whole vocabulary, reduces them
// to losses, turns them into their own gradient and multiplies back before the next chunk begins.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "core/integers.h"
#include "cpu/cpu_device.h"
#include "cpu/cpu_weight.h"
#include "cpu/panels.h"

namespace lora_da::cpu {

namespace {

// What stays in the last cache beside the head's part: rows with their gradients, and the logits of a tile.
constexpr int64_t rowsBytes = 8 << 20;
constexpr int64_t tileBytes = 6 << 20;
// Fewer columns would load and store the gradients' sums too often; a panel's depth has its own limit.
constexpr int64_t fewestPanels = 5, mostPanels = 85;

// Rows of a chunk of oneDNN's.
constexpr int64_t libraryChunkRows = 128;

struct Tiling {
  int64_t rows = 0;    // of a block that goes through the whole vocabulary before the next
  int64_t cols = 0;    // of the vocabulary, whole panels
  int64_t stride = 0;  // floats from a row of logits to the next: off the page size, whose multiples share few lines of a cache

  Tiling(int64_t allRows, int64_t width, int64_t vocabulary, DType type) {
    const int64_t most = std::max(rowsBytes / (width * static_cast<int64_t>(sizeof(float) + sizeOf(type))), panelRowGrain);
    const int64_t blocks = std::max<int64_t>(ceilDiv(allRows, most), 1);
    rows = std::min(allRows, roundUp(ceilDiv(allRows, blocks), panelRowGrain));
    const int64_t fitting = tileBytes / (std::max<int64_t>(rows, 1) * panelCols * static_cast<int64_t>(sizeof(float)));
    cols = std::min(std::clamp(fitting, fewestPanels, mostPanels), ceilDiv(vocabulary, panelCols)) * panelCols;
    stride = cols + 16;
  }
  size_t logitBytes() const { return static_cast<size_t>(rows * stride) * sizeof(float); }
  size_t softmaxBytes() const { return static_cast<size_t>(roundUp(rows * static_cast<int64_t>(sizeof(RunningSoftmax)), 64)); }
};

// What the row's sums come to.
struct RowLoss {
  double loss;
  double share;  // of an exponential relative to the row's largest in all of them
};

RowLoss lossOf(const RunningSoftmax& row) {
  const double target = static_cast<double>(row.targetLogit), largest = static_cast<double>(row.largest);
  const double peak = std::max(target, largest);
  const double scale = std::exp(largest - peak), others = row.sum * scale;
  if (peak == target) return {std::log1p(others), scale / (1 + others)};
  const double sum = others + std::exp(target - peak);
  return {std::log(sum) + (peak - target), scale / sum};
}

}  // namespace

void CpuDevice::headLoss(const Matrix& x, const Weight& weight, const int32_t* targets, const float* rowScale, float* losses,
                         const Matrix* dx) {
  const auto& head = static_cast<const CpuWeight&>(weight);
  if (!hasPanels()) return headLossByRows(x, head, targets, rowScale, losses, dx);
  const int64_t rows = Tiling(x.rows, x.cols, head.out, computeType_).rows;
  for (int64_t first = 0; first < x.rows; first += rows) {
    const int64_t count = std::min(rows, x.rows - first);
    const Matrix gradient = dx ? dx->rowRange(first, count) : Matrix{};
    headLossByTiles(x.rowRange(first, count), head, targets + first, rowScale ? rowScale + first : nullptr, losses + first,
                    dx ? &gradient : nullptr);
  }
}

void CpuDevice::headLossByTiles(const Matrix& x, const CpuWeight& head, const int32_t* targets, const float* rowScale,
                                float* losses, const Matrix* dx) {
  const int64_t rows = x.rows, width = x.cols;
  const Tiling tiling(rows, width, head.out, computeType_);
  const TypedKernels& kernels = typed();

  // Scratch: the tile, the rows' running sums, and for each thread a row of the head.
  const int64_t rowFloats = roundUp(width, 16);
  const size_t rowBytes = static_cast<size_t>(rowFloats * threads_) * sizeof(float);
  char* memory = static_cast<char*>(scratch(tiling.logitBytes() + tiling.softmaxBytes() + rowBytes));
  auto* softmax = reinterpret_cast<RunningSoftmax*>(memory + tiling.logitBytes());
  auto* headRows = reinterpret_cast<float*>(memory + tiling.logitBytes() + tiling.softmaxBytes());
  std::fill_n(softmax, rows, RunningSoftmax{});

  for (int64_t first = 0; first < head.out; first += tiling.cols) {
    const int64_t count = std::min(tiling.cols, head.out - first);
    const Matrix logits{memory, DType::f32, rows, count, tiling.stride};
    const Matrix exponentials{memory, computeType_, rows, count,
                              tiling.stride * static_cast<int64_t>(sizeof(float) / sizeOf(computeType_))};
    linearPart(x, head, first, logits);
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 16)
    for (int64_t i = 0; i < rows; ++i) {
      float* row = logits.rowRange(i, 1).as<float>();
      const double factor = kernels.addToSoftmax(row, count, targets[i] - first, softmax[i], dx ? row : nullptr);
      if (dx && first > 0 && factor < 1) kernels_.scaleRow(static_cast<float>(factor), dx->rowRange(i, 1).as<float>(), width);
    }
    if (dx) linearInputGradPart(exponentials, head, first, first > 0, *dx);
  }

#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const RowLoss row = lossOf(softmax[i]);
    losses[i] = static_cast<float>(row.loss);
    if (!dx) continue;
    const double scale = row.share * static_cast<double>(rowScale ? rowScale[i] : 0.0f);
    float* gradient = dx->rowRange(i, 1).as<float>();
    float* target = headRows + omp_get_thread_num() * rowFloats;
    readWeightRow(head, targets[i], target);
    kernels_.scaleRow(static_cast<float>(-scale * softmax[i].sum), target, width);
    kernels_.scaleRow(static_cast<float>(scale), gradient, width);
    kernels_.addRow(target, gradient, width);
  }
}

// The gradient takes a place of its own beside its logits.
void CpuDevice::headLossByRows(const Matrix& x, const CpuWeight& head, const int32_t* targets, const float* rowScale,
                               float* losses, const Matrix* dx) {
  const int64_t vocabulary = head.out, rows = std::min(x.rows, libraryChunkRows);
  const size_t logitBytes = static_cast<size_t>(rows * vocabulary) * sizeof(float);
  const size_t gradBytes = dx ? static_cast<size_t>(rows * vocabulary) * sizeOf(computeType_) : 0;
  char* memory = static_cast<char*>(scratch(logitBytes + gradBytes));
  const TypedKernels& kernels = typed();

  for (int64_t first = 0; first < x.rows; first += rows) {
    const int64_t count = std::min(rows, x.rows - first);
    const Matrix logits{memory, DType::f32, count, vocabulary, vocabulary};
    const Matrix dlogits{memory + logitBytes, computeType_, count, vocabulary, vocabulary};
    linear(x.rowRange(first, count), head, nullptr, nullptr, nullptr, nullptr, logits);
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 4)
    for (int64_t i = 0; i < count; ++i) {
      void* gradient = dx ? dlogits.rowRange(i, 1).data : nullptr;
      losses[first + i] = kernels.crossEntropy(logits.rowRange(i, 1).as<float>(), targets[first + i],
                                               rowScale ? rowScale[first + i] : 0.0f, gradient, vocabulary);
    }
    if (dx) linearInputGrad(dlogits, head, nullptr, nullptr, dx->rowRange(first, count));
  }
}

// Of one block that has all rows: blocks of fewer take no more.
size_t CpuDevice::workspaceBytes(int64_t labelRows, int64_t vocabulary) const {
  if (!hasPanels()) {
    const auto rows = static_cast<size_t>(std::min(labelRows, libraryChunkRows));
    return rows * static_cast<size_t>(vocabulary) * (sizeof(float) + sizeOf(computeType_));
  }
  const Tiling tiling(labelRows, 1, vocabulary, computeType_);
  return tiling.logitBytes() + tiling.softmaxBytes();
}

void CpuDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(losses[i]) * static_cast<double>(scale[i]);
  *total += sum;
}

}  // namespace lora_da::cpu
