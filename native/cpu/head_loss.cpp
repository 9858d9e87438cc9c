// Cross-entropy through the head.
//
// A tile's logits become exponentials relative to each row's largest so far, which are multiplied back at once; where a row's
// maximum grows, what it has summed is scaled (as attention does, Milakov and Gimelshein 2018). With q = exponentials of all but
// the target, and w = the head's rows,
//   dx = scale * share * (sum over them of q w - (sum of q) w_target),   share = 1 / (sum of all exponentials).
//
// Own products go through the vocabulary tile by tile, so that each part of the head is read, and laid out for its input
// gradient, once for all rows, and logits never leave the cache. oneDNN's weights are packed as a whole: there a tile is a few
// rows of the whole vocabulary, and the target's place in it takes -(sum of q), rounded as the others are.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/integers.h"
#include "cpu/cache_lines.h"
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

class Tiling {
 public:
  int64_t rows = 0;    // of a block that goes through the whole vocabulary before the next
  int64_t cols = 0;    // of the vocabulary, whole panels or all
  int64_t stride = 0;  // floats from a row of logits to the next: off the page size, whose multiples share few lines of a cache
  size_t exponentialBytes = 0;  // 0: they take the logits' place

  static Tiling of(bool panels, int64_t allRows, int64_t width, int64_t vocabulary, DType type) {
    return panels ? ofPanels(allRows, width, vocabulary, type) : ofRows(allRows, vocabulary, type);
  }
  size_t logitBytes() const { return cacheLines(static_cast<size_t>(rows * stride) * sizeof(float)); }
  size_t softmaxBytes() const { return cacheLines(static_cast<size_t>(rows) * sizeof(RunningSoftmax)); }
  size_t bytes() const { return logitBytes() + exponentialBytes + softmaxBytes(); }

 private:
  static Tiling ofPanels(int64_t allRows, int64_t width, int64_t vocabulary, DType type) {
    Tiling tiling;
    const int64_t most = std::max(rowsBytes / (width * static_cast<int64_t>(sizeof(float) + sizeOf(type))), panelRowGrain);
    const int64_t blocks = std::max<int64_t>(ceilDiv(allRows, most), 1);
    tiling.rows = std::min(allRows, roundUp(ceilDiv(allRows, blocks), panelRowGrain));
    const int64_t fitting = tileBytes / (std::max<int64_t>(tiling.rows, 1) * panelCols * static_cast<int64_t>(sizeof(float)));
    tiling.cols = std::min(std::clamp(fitting, fewestPanels, mostPanels), ceilDiv(vocabulary, panelCols)) * panelCols;
    tiling.stride = tiling.cols + 16;
    return tiling;
  }
  // oneDNN is given operands whose rows lie together.
  static Tiling ofRows(int64_t allRows, int64_t vocabulary, DType type) {
    Tiling tiling;
    tiling.rows = std::min(allRows, libraryChunkRows);
    tiling.cols = tiling.stride = vocabulary;
    if (type != DType::f32) tiling.exponentialBytes = cacheLines(static_cast<size_t>(tiling.rows * vocabulary) * sizeOf(type));
    return tiling;
  }
};

// What the row's sums come to.
struct RowLoss {
  double loss;
  double share;  // of an exponential relative to the row's largest in all of them
};

RowLoss lossOf(const RunningSoftmax& row) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  if (row.targetLogit == std::numeric_limits<float>::infinity()) return {nan, nan};  // infinity less infinity
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
  const int64_t rows = Tiling::of(hasPanels(), x.rows, x.cols, head.out, computeType_).rows;
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
  Tiling tiling = Tiling::of(hasPanels(), rows, width, head.out, computeType_);
  if (!dx) tiling.exponentialBytes = 0;
  const bool whole = !hasPanels();
  const TypedKernels& kernels = typed();

  // Scratch: the tile, the rows' running sums, and for each thread a row of the head.
  const int64_t rowFloats = roundUp(width, 16);
  char* memory = static_cast<char*>(scratch(tiling.bytes() + static_cast<size_t>(rowFloats * threads_) * sizeof(float)));
  char* apart = memory + tiling.logitBytes();
  auto* softmax = reinterpret_cast<RunningSoftmax*>(apart + tiling.exponentialBytes);
  auto* headRows = reinterpret_cast<float*>(memory + tiling.bytes());
  std::fill_n(softmax, rows, RunningSoftmax{});

  for (int64_t first = 0; first < head.out; first += tiling.cols) {
    const int64_t count = std::min(tiling.cols, head.out - first);
    const Matrix logits{memory, DType::f32, rows, count, tiling.stride};
    const Matrix exponentials = tiling.exponentialBytes > 0
                                    ? Matrix{apart, computeType_, rows, count, count}
                                    : Matrix{memory, computeType_, rows, count,
                                             tiling.stride * static_cast<int64_t>(sizeof(float) / sizeOf(computeType_))};
    linearPart(x, head, first, logits);
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 4)
    for (int64_t i = 0; i < rows; ++i) {
      RunningSoftmax& row = softmax[i];
      const Matrix to = exponentials.rowRange(i, 1);
      const double factor =
          kernels.addToSoftmax(logits.rowRange(i, 1).as<float>(), count, targets[i] - first, row, dx ? to.data : nullptr);
      if (!dx) continue;
      if (first > 0 && factor < 1) kernels_.scaleRow(static_cast<float>(factor), dx->rowRange(i, 1).as<float>(), width);
      const auto others = static_cast<float>(-row.sum);
      if (whole) kernels.fromFloat(&others, to.columns(targets[i], 1).data, 1);
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
    kernels_.scaleRow(static_cast<float>(scale), gradient, width);
    if (whole) continue;
    float* target = headRows + omp_get_thread_num() * rowFloats;
    readWeightRow(head, targets[i], target);
    kernels_.scaleRow(static_cast<float>(-scale * softmax[i].sum), target, width);
    kernels_.addRow(target, gradient, width);
  }
}

// Of one block that has all rows: blocks of fewer take no more.
size_t CpuDevice::headLossBytes(int64_t rows, int64_t vocabulary) const {
  return Tiling::of(hasPanels(), rows, 1, vocabulary, computeType_).bytes();
}

void CpuDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(losses[i]) * static_cast<double>(scale[i]);
  *total += sum;
}

}  // namespace lora_da::cpu
