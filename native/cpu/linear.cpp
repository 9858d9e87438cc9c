// Products with frozen weights. Where the processor has kernels for it (kernels/panels.h) weights are copied to huge pages, laid
// out as panels of 48 outputs, while the budget lasts; else each thread lays out a panel at a time, from rows as they lie in the
// file, in its own cache. A panel is multiplied with all rows, LoRA term and residual included. Elsewhere oneDNN multiplies, with
// weights packed once while the budget lasts.
#include <omp.h>

#include <algorithm>

#include "core/integers.h"
#include "cpu/cpu_device.h"
#include "cpu/cpu_weight.h"
#include "cpu/panels.h"
#include "cpu/products.h"

namespace lora_da::cpu {

namespace {

// Threads share the columns of an outer sum, and the outputs of a single row, in multiples of these.
constexpr int64_t columnGrain = 64;
constexpr int64_t outputGrain = 16;

PanelProduct productOf(const Matrix& x, const Matrix* lowRank, const Matrix& y) {
  PanelProduct p;
  p.x = x.data;
  p.xStride = x.stride;
  p.depth = x.cols;
  if (lowRank) {
    p.lowRank = lowRank->data;
    p.lowRankStride = lowRank->stride;
    p.lowRankDepth = lowRank->cols;
  }
  p.rows = x.rows;
  p.y = y.data;
  p.yStride = y.stride;
  p.floatOutput = y.dtype == DType::f32;
  return p;
}

}  // namespace

float* CpuDevice::panelScratch(size_t threadFloats) {
  return static_cast<float*>(
      panelScratch_.reserve(*this, threadFloats * sizeof(float) * static_cast<size_t>(threads_), "panels of weights"));
}

void CpuDevice::linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
                       const Matrix* residual, const Matrix& y) {
  const auto& w = static_cast<const CpuWeight&>(weight);
  if (!hasPanels()) return libraryLinear(x, w, bias, down, up, residual, y);
  if (x.rows == 1) return linearRow(x, w, bias, down, up, residual, y);
  PanelProduct product = productOf(x, down, y);
  product.bias = bias;
  if (residual) {
    product.residual = residual->as<float>();
    product.residualStride = residual->stride;
  }
  runPanelJob({w, PanelJob::Side::forward, product, w.out, sizeOf(x.dtype), sizeOf(y.dtype), down ? up : nullptr, nullptr});
}

void CpuDevice::linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                                const Matrix& dx) {
  const auto& w = static_cast<const CpuWeight&>(weight);
  if (!hasPanels()) return libraryInputGrad(dy, w, downGrad, a, dx);
  runPanelJob({w, PanelJob::Side::inputGrad, productOf(dy, downGrad, dx), w.in, sizeOf(dy.dtype), sizeOf(dx.dtype), nullptr,
               downGrad ? a : nullptr});
}

void CpuDevice::linearPart(const Matrix& x, const CpuWeight& w, int64_t firstOutput, const Matrix& y) {
  if (!hasPanels()) return libraryLinear(x, w, nullptr, nullptr, nullptr, nullptr, y);
  PanelJob job{w, PanelJob::Side::forward, productOf(x, nullptr, y), y.cols, sizeOf(x.dtype), sizeOf(y.dtype)};
  job.firstOutput = firstOutput;
  runPanelJob(job);
}

void CpuDevice::linearInputGradPart(const Matrix& dy, const CpuWeight& w, int64_t firstOutput, bool accumulate,
                                    const Matrix& dx) {
  if (!hasPanels()) return libraryInputGrad(dy, w, nullptr, nullptr, dx);
  PanelJob job{w, PanelJob::Side::inputGrad, productOf(dy, nullptr, dx), w.in, sizeOf(dy.dtype), sizeOf(dx.dtype)};
  job.product.accumulate = accumulate;
  job.firstOutput = firstOutput;
  runPanelJob(job);
}

void CpuDevice::runPanelJob(const PanelJob& job) {
  runPanels(typed(), job, threads_, panelScratch(panelFloats(typed(), job)));
}

// One row (decoding): each thread has outputs that lie together, so that the weight is read once and in order.
void CpuDevice::linearRow(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const UpProjection* up,
                          const Matrix* residual, const Matrix& y) {
  const TypedKernels& kernels = typed();
  const size_t blocks = down ? up->blocks.size() : 0;
  const int64_t rank = down ? up->rank() : 0, steps = ceilDiv(rank, kernels.stepDepth);
  const int64_t width = roundUp(w.out, panelCols);
  float* sums = panelScratch(static_cast<size_t>(width) + blocks * static_cast<size_t>(steps));
  // Each block's down-projection as steps of an outer sum; an odd last pair ends with zero.
  float* left = sums + width;
  std::fill(left, left + blocks * static_cast<size_t>(steps), 0.0f);
  for (size_t i = 0; i < blocks; ++i) {
    const Matrix part = down->columns(static_cast<int64_t>(i) * rank, rank);
    std::copy_n(part.as<char>(), static_cast<size_t>(rank) * sizeOf(part.dtype),
                reinterpret_cast<char*>(left + static_cast<int64_t>(i) * steps));
  }
  const auto fromFloat = typed(y.dtype).fromFloat;
  // What is added to the outputs [col, col + count), and how they are kept.
  const auto finish = [&](int64_t col, int64_t count) {
    float* sum = sums + col;
    for (size_t i = 0; i < blocks; ++i) {
      const UpProjection::Block& block = up->blocks[i];
      const int64_t first = std::max(col, block.first), end = std::min(col + count, block.first + block.count);
      if (first >= end) continue;
      OuterSum term;
      term.left = left + static_cast<int64_t>(i) * steps;
      term.leftStride = 1;
      term.leftCols = 1;
      term.b = up->factors.columns(first, end - first).data;
      term.bStride = up->factors.stride;
      term.rows = rank;
      term.cols = end - first;
      term.c = sums + first;
      term.cStride = end - first;
      kernels.addOuter(term);
    }
    if (bias) kernels_.addRow(bias + col, sum, count);
    if (residual) kernels_.addRow(residual->as<float>() + col, sum, count);
    fromFloat(sum, y.columns(col, count).data, count);
  };
#pragma omp parallel num_threads(threads_)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (w.panels.data) {
      const int64_t share = ceilDiv(width / panelCols, threads) * panelCols;
      const int64_t first = thread * share, end = std::min(first + share, w.out);
      for (int64_t col = first; col < end; col += panelCols) {
        kernels.multiplyRow(x.data, w.panels.panel(col), w.dtype, w.in, w.panels.width(col), sums + col);
      }
      if (first < end) finish(first, end - first);
    }
    int64_t partStart = 0;
    for (const CpuWeight::Rows& part : w.parts) {
      const int64_t share = ceilDiv(ceilDiv(part.rows, threads), outputGrain) * outputGrain;
      const int64_t row = thread * share, count = std::min(share, part.rows - row);
      const int64_t col = partStart + row;
      partStart += part.rows;
      if (count <= 0) continue;
      kernels.dotRows(x.data, part.data + static_cast<size_t>(row) * w.rowBytes(), w.dtype, w.in, count, w.in, sums + col);
      finish(col, count);
    }
  }
}

// c = alpha a b^T where b has few rows, as LoRA's down-projections: threads share the rows of a.
void CpuDevice::thinProduct(const Matrix& a, const Matrix& b, float alpha, const Matrix& c) {
  const TypedKernels& kernels = typed();
  const int64_t depth = a.cols;
  if (a.rows == 1) {
    float* sums = panelScratch(static_cast<size_t>(c.cols));
    kernels.dotRows(a.data, b.data, b.dtype, b.stride, c.cols, depth, sums);
    kernels_.scaleRow(alpha, sums, c.cols);
    typed(c.dtype).fromFloat(sums, c.data, c.cols);
    return;
  }
  const bool thin = c.cols <= thinCols;
  const auto floats = thin ? 0 : static_cast<size_t>(panelCols * ceilDiv(depth, kernels.stepDepth));
  float* memory = panelScratch(floats);
  const int64_t share = ceilDiv(ceilDiv(a.rows, threads_), panelRowGrain) * panelRowGrain;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int thread = 0; thread < threads_; ++thread) {
    const int64_t first = thread * share, rows = std::min(share, a.rows - first);
    if (rows <= 0) continue;
    if (thin) {
      kernels.multiplyThin(a.rowRange(first, rows), b, alpha, c.rowRange(first, rows));
      continue;
    }
    float* panel = memory + static_cast<size_t>(thread) * floats;
    for (int64_t col = 0; col < c.cols; col += panelCols) {
      const int64_t cols = std::min(panelCols, c.cols - col);
      const void* columns[panelCols] = {};
      for (int64_t i = 0; i < cols; ++i) columns[i] = b.rowRange(col + i, 1).data;
      kernels.packColumns(columns, b.dtype, depth, cols, panel);
      PanelProduct p = productOf(a.rowRange(first, rows), nullptr, c.rowRange(first, rows).columns(col, cols));
      p.scale = alpha;
      p.panel = panel;
      p.cols = cols;
      kernels.multiplyPanel(p);
    }
  }
}

// c += a^T b where a has few columns, as the gradients of LoRA's factors: threads share the columns of b.
void CpuDevice::outerSum(const Matrix& a, const Matrix& b, const Matrix& c) {
  const TypedKernels& kernels = typed();
  const int64_t steps = ceilDiv(a.rows, kernels.stepDepth), stepFloats = roundUp(a.cols, 16);
  float* left = panelScratch(static_cast<size_t>(steps * stepFloats));
  const int64_t grains = ceilDiv(b.cols, columnGrain);
#pragma omp parallel num_threads(threads_)
  {
    const int64_t share = ceilDiv(steps, omp_get_num_threads()) * kernels.stepDepth;
    const int64_t first = omp_get_thread_num() * share, rows = std::min(share, a.rows - first);
    if (rows > 0) packMatrixRows(kernels, a, first, rows, 0, a.cols, left + first / kernels.stepDepth * stepFloats);
#pragma omp barrier
    const int64_t columns = ceilDiv(grains, omp_get_num_threads()) * columnGrain;
    const int64_t col = omp_get_thread_num() * columns, cols = std::min(columns, b.cols - col);
    if (cols > 0) {
      OuterSum sum;
      sum.left = left;
      sum.leftStride = stepFloats;
      sum.leftCols = a.cols;
      sum.b = b.columns(col, cols).data;
      sum.bStride = b.stride;
      sum.rows = b.rows;
      sum.cols = cols;
      sum.c = c.columns(col, cols).as<float>();
      sum.cStride = c.stride;
      kernels.addOuter(sum);
    }
  }
}

// --- oneDNN --------------------------------------------------------------------------------------------------------

// What is added goes to y first: oneDNN then adds the large product before it rounds. The factors are spread, so that one product
// serves all blocks.
void CpuDevice::libraryLinear(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const UpProjection* up,
                              const Matrix* residual, const Matrix& y) {
  if (residual) convert(*residual, y);
  if (down) {
    const size_t bytes = static_cast<size_t>(down->cols * w.out) * sizeOf(computeType_);
    const Matrix spread{factorScratch_.reserve(*this, bytes, "spread LoRA factors"), computeType_, down->cols, w.out, w.out};
    spreadBlocks(*up, 0, 0, spread);
    matmul(Transpose::no, *down, Transpose::no, spread, 1.0f, residual != nullptr, y);
  }
  const bool packed = w.packedForward != nullptr;
  const ProductKey key{x.rows,
                       w.out,
                       w.in,
                       computeType_,
                       y.dtype,
                       false,
                       packed ? Layout::packed : Layout::transposed,
                       down || residual,
                       bias != nullptr,
                       1.0f,
                       x.stride,
                       packed ? 0 : w.in,
                       y.stride};
  products_->run(key, x.data, packed ? w.packedForward.get() : w.parts.front().data, bias, y.data);
}

void CpuDevice::libraryInputGrad(const Matrix& dy, const CpuWeight& w, const Matrix* downGrad, const Matrix* a,
                                 const Matrix& dx) {
  if (downGrad) matmul(Transpose::no, *downGrad, Transpose::no, *a, 1.0f, false, dx);
  const bool packed = w.packedInputGrad != nullptr;
  const ProductKey key{dy.rows,
                       w.in,
                       w.out,
                       computeType_,
                       dx.dtype,
                       false,
                       packed ? Layout::packed : Layout::rowMajor,
                       downGrad != nullptr,
                       false,
                       1.0f,
                       dy.stride,
                       packed ? 0 : w.in,
                       dx.stride};
  products_->run(key, dy.data, packed ? w.packedInputGrad.get() : w.parts.front().data, nullptr, dx.data);
}

}  // namespace lora_da::cpu
