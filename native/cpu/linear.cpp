// Products with frozen weights. Where the processor has kernels for it (kernels/product_kernels.cpp) the rows of a weight stay
// as they are in the file, copied to huge pages while the budget lasts: each thread lays out a panel of 48 output columns in its
// own cache, multiplies it with all rows, LoRA term and residual included, and takes the next. Elsewhere oneDNN multiplies, with
// weights packed once while the budget lasts.
#include <omp.h>

#include <algorithm>

#include "core/cpu_info.h"
#include "core/error.h"
#include "cpu/cpu_device.h"
#include "cpu/cpu_weight.h"
#include "cpu/products.h"

namespace lora_da::cpu {

namespace {

// A panel of this depth and its rows of the left operand stay in the second-level cache; deeper products are added up in y.
constexpr int64_t depthBlock = 4096;
// Threads share the columns of an outer sum, and the outputs of a single row, in multiples of these.
constexpr int64_t columnGrain = 64;
constexpr int64_t outputGrain = 16;

int64_t ceilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows [first, first + count) of m, columns [col, col + cols), as the steps of a panel.
void packMatrixRows(const TypedKernels& kernels, const Matrix& m, int64_t first, int64_t count, int64_t col, int64_t cols,
                    float* panel) {
  const auto bytes = static_cast<int64_t>(sizeOf(m.dtype));
  const char* data = m.as<char>() + (first * m.stride + col) * bytes;
  const int64_t whole = count / kernels.stepDepth;
  kernels.packRows(data, data + m.stride * bytes, m.dtype, kernels.stepDepth * m.stride, whole, cols, panel);
  if (count % kernels.stepDepth != 0) {
    kernels.packRows(data + (count - 1) * m.stride * bytes, nullptr, m.dtype, 0, 1, cols, panel + whole * ceilDiv(cols, 16) * 16);
  }
}

// The panel of y = x W^T: the weight's rows are its columns.
void packForward(const TypedKernels& kernels, const CpuWeight& w, int64_t depth, int64_t depths, int64_t col, int64_t cols,
                 float* panel) {
  const void* rows[panelCols] = {};
  for (int64_t i = 0; i < cols; ++i) rows[i] = w.row(col + i) + static_cast<size_t>(depth) * sizeOf(w.dtype);
  kernels.packColumns(rows, w.dtype, depths, cols, panel);
}

// The panel of dx = dy W: the weight's rows are its depth, parts one after the other.
void packInputGrad(const TypedKernels& kernels, const CpuWeight& w, int64_t depth, int64_t depths, int64_t col, int64_t cols,
                   float* panel) {
  const size_t colBytes = static_cast<size_t>(col) * sizeOf(w.dtype);
  const int64_t stepFloats = ceilDiv(cols, 16) * 16;
  const int64_t end = depth + depths;
  int64_t partStart = 0;
  for (const CpuWeight::Rows& part : w.parts) {
    const int64_t partEnd = partStart + part.rows;
    while (depth < std::min(partEnd, end)) {
      const char* upper = part.data + static_cast<size_t>(depth - partStart) * w.rowBytes() + colBytes;
      const int64_t steps = (std::min(partEnd, end) - depth) / kernels.stepDepth;
      if (steps > 0) {
        kernels.packRows(upper, upper + w.rowBytes(), w.dtype, kernels.stepDepth * w.in, steps, cols, panel);
        depth += steps * kernels.stepDepth;
        panel += steps * stepFloats;
      } else {  // the last row of a part goes with the first of the next
        const char* lower = depth + 1 < end ? w.row(depth + 1) + colBytes : nullptr;
        kernels.packRows(upper, lower, w.dtype, 0, 1, cols, panel);
        depth += kernels.stepDepth;
        panel += stepFloats;
      }
    }
    partStart = partEnd;
  }
}

template <class Pack>
struct PanelJob {
  PanelProduct product;  // for the first panel and all rows; y and what is added to it move with the panel
  int64_t cols = 0;      // of all panels
  size_t inputBytes = 0, outputBytes = 0;
  const Matrix* lowRankRight = nullptr;
  Pack pack;  // (depth, depths, col, cols, panel)

  // Depth of one panel: sums that are not kept in float32 are made in one go.
  int64_t block() const { return product.floatOutput ? std::min(depthBlock, product.depth) : product.depth; }
};

// Work is cut into whole panels, the last ones also by rows, so that threads end together. Cuts change no sum: each element of y
// is made by one thread, its depth in order.
template <class Pack>
void runPanels(const TypedKernels& kernels, const PanelJob<Pack>& job, int threads, float* memory, size_t threadFloats) {
  const int64_t panels = ceilDiv(job.cols, panelCols);
  const int64_t pieces = std::clamp<int64_t>(job.product.rows / (4 * panelRowGrain), 1, threads);
  const int64_t whole = pieces == 1 ? panels : std::max<int64_t>(0, panels - panels % threads - threads);
  const int64_t units = whole + (panels - whole) * pieces;
  const int64_t pieceRows = ceilDiv(ceilDiv(job.product.rows, pieces), panelRowGrain) * panelRowGrain;
  const int64_t block = job.block();

#pragma omp parallel num_threads(threads)
  {
    float* panel = memory + threadFloats * static_cast<size_t>(omp_get_thread_num());
    for (int64_t depth = 0; depth < job.product.depth; depth += block) {
      const int64_t depths = std::min(block, job.product.depth - depth);
      const bool first = depth == 0, last = depth + depths == job.product.depth;
      int64_t packed = -1;
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t index = unit < whole ? unit : whole + (unit - whole) / pieces;
        const int64_t col = index * panelCols, cols = std::min(panelCols, job.cols - col);
        const int64_t firstRow = unit < whole ? 0 : (unit - whole) % pieces * pieceRows;
        const int64_t rows = unit < whole ? job.product.rows : std::min(pieceRows, job.product.rows - firstRow);
        if (rows <= 0) continue;
        PanelProduct p = job.product;
        p.lowRankDepth = last ? p.lowRankDepth : 0;
        if (packed != index) {
          job.pack(depth, depths, col, cols, panel);
          if (p.lowRankDepth > 0) {
            float* rest = panel + ceilDiv(depths, kernels.stepDepth) * ceilDiv(cols, 16) * 16;
            packMatrixRows(kernels, *job.lowRankRight, 0, p.lowRankDepth, col, cols, rest);
          }
          packed = index;
        }
        const auto inputBytes = static_cast<int64_t>(job.inputBytes);
        p.x = static_cast<const char*>(p.x) + (firstRow * p.xStride + depth) * inputBytes;
        if (p.lowRankDepth > 0) p.lowRank = static_cast<const char*>(p.lowRank) + firstRow * p.lowRankStride * inputBytes;
        p.y = static_cast<char*>(p.y) + (firstRow * p.yStride + col) * static_cast<int64_t>(job.outputBytes);
        p.bias = p.bias && last ? p.bias + col : nullptr;
        p.residual = p.residual && last ? p.residual + firstRow * p.residualStride + col : nullptr;
        p.accumulate = p.accumulate || !first;
        p.depth = depths;
        p.panel = panel;
        p.rows = rows;
        p.cols = cols;
        kernels.multiplyPanel(p);
      }
    }
  }
}

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

// --- weights -------------------------------------------------------------------------------------------------------

bool CpuDevice::hasPanels() const {
  return typed().multiplyPanel != nullptr && !(computeType_ == DType::bf16 && hasMatrixTiles());
}

std::unique_ptr<Weight> CpuDevice::prepare(const std::vector<HostTensor>& parts, WeightUses uses) {
  auto weight = std::make_unique<CpuWeight>();
  weight->in = parts.front().cols;
  const DType fileType = parts.front().dtype;
  bool alike = true;
  for (const HostTensor& part : parts) {
    weight->out += part.rows;
    alike = alike && part.dtype == fileType && reinterpret_cast<uintptr_t>(part.data) % sizeOf(fileType) == 0;
  }
  const bool readable = fileType == computeType_ || (hasPanels() && fileType == DType::bf16);
  const bool asTheyLie = alike && readable && (hasPanels() || parts.size() == 1);
  weight->dtype = asTheyLie ? fileType : computeType_;
  weight->bytes = static_cast<size_t>(weight->out) * weight->rowBytes();
  if (asTheyLie && !(hasPanels() && weight->bytes <= copyBudget_)) {
    for (const HostTensor& part : parts) {
      weight->parts.push_back({static_cast<const char*>(part.data), part.rows});
      if (part.populate) part.populate();
    }
  } else {
    if (asTheyLie) copyBudget_ -= weight->bytes;
    weight->copy = weightPages_.take(*this, weight->bytes, "weight " + parts.front().name);
    char* target = weight->copy.get();
    for (const HostTensor& part : parts) {
      if (part.populate) part.populate();
      convertFromFile(part, weight->dtype, target);
      if (part.release) part.release();
      weight->parts.push_back({target, part.rows});
      target += static_cast<size_t>(part.rows) * weight->rowBytes();
    }
  }
  if (!hasPanels()) packForLibrary(parts, uses, *weight);
  return weight;
}

void CpuDevice::packForLibrary(const std::vector<HostTensor>& parts, WeightUses uses, CpuWeight& weight) {
  const size_t forwardBytes = uses.forward ? products_->packedBytes(weight.in, weight.out, computeType_) : 0;
  const size_t gradBytes = uses.inputGrad ? products_->packedBytes(weight.out, weight.in, computeType_) : 0;
  if (forwardBytes + gradBytes > copyBudget_) return;
  copyBudget_ -= forwardBytes + gradBytes;
  const void* rows = weight.parts.front().data;
  if (uses.forward) {
    weight.packedForward = allocate(forwardBytes, "packed weight " + parts.front().name);
    products_->pack(weight.in, weight.out, computeType_, rows, Layout::transposed, weight.packedForward.get());
  }
  if (uses.inputGrad) {
    weight.packedInputGrad = allocate(gradBytes, "packed weight " + parts.front().name);
    products_->pack(weight.out, weight.in, computeType_, rows, Layout::rowMajor, weight.packedInputGrad.get());
  }
  weight.bytes += forwardBytes + gradBytes;
  if (!uses.lookup) {
    weight.bytes = forwardBytes + gradBytes;
    weight.parts.clear();
    weight.copy.reset();
    for (const HostTensor& part : parts) {
      if (part.release) part.release();
    }
  }
}

// --- products ------------------------------------------------------------------------------------------------------

float* CpuDevice::panelScratch(size_t threadFloats) {
  return static_cast<float*>(
      panelScratch_.reserve(*this, threadFloats * sizeof(float) * static_cast<size_t>(threads_), "panels of weights"));
}

size_t CpuDevice::panelFloats(int64_t depth, int64_t lowRankDepth) const {
  return static_cast<size_t>(panelCols * (ceilDiv(depth, typed().stepDepth) + ceilDiv(lowRankDepth, typed().stepDepth)));
}

void CpuDevice::linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const Matrix* up,
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
  const TypedKernels& kernels = typed();
  const auto pack = [&](int64_t depth, int64_t depths, int64_t col, int64_t cols, float* panel) {
    packForward(kernels, w, depth, depths, col, cols, panel);
  };
  const PanelJob<decltype(pack)> job{product, w.out, sizeOf(x.dtype), sizeOf(y.dtype), up, pack};
  const size_t floats = panelFloats(job.block(), product.lowRankDepth);
  runPanels(kernels, job, threads_, panelScratch(floats), floats);
}

void CpuDevice::linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                                const Matrix& dx) {
  const auto& w = static_cast<const CpuWeight&>(weight);
  if (!hasPanels()) return libraryInputGrad(dy, w, downGrad, a, dx);
  const PanelProduct product = productOf(dy, downGrad, dx);
  const TypedKernels& kernels = typed();
  const auto pack = [&](int64_t depth, int64_t depths, int64_t col, int64_t cols, float* panel) {
    packInputGrad(kernels, w, depth, depths, col, cols, panel);
  };
  const PanelJob<decltype(pack)> job{product, w.in, sizeOf(dy.dtype), sizeOf(dx.dtype), a, pack};
  const size_t floats = panelFloats(job.block(), product.lowRankDepth);
  runPanels(kernels, job, threads_, panelScratch(floats), floats);
}

// One row (decoding): a dot product with each row of the weight, which is read once, as it lies.
void CpuDevice::linearRow(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const Matrix* up,
                          const Matrix* residual, const Matrix& y) {
  const TypedKernels& kernels = typed();
  const int64_t lowRank = down ? down->cols : 0;
  float* sums = panelScratch(static_cast<size_t>(w.out + lowRank + kernels.stepDepth));
  float* left = sums + w.out;  // the down-projection as steps of an outer sum; an odd last pair ends with zero
  if (down) {
    std::fill(left, left + ceilDiv(lowRank, kernels.stepDepth), 0.0f);
    std::copy_n(down->as<char>(), static_cast<size_t>(lowRank) * sizeOf(down->dtype), reinterpret_cast<char*>(left));
  }
  const auto fromFloat = typed(y.dtype).fromFloat;
#pragma omp parallel num_threads(threads_)
  {
    int64_t partStart = 0;
    for (const CpuWeight::Rows& part : w.parts) {
      const int64_t share = ceilDiv(ceilDiv(part.rows, omp_get_num_threads()), outputGrain) * outputGrain;
      const int64_t row = omp_get_thread_num() * share, count = std::min(share, part.rows - row);
      const int64_t col = partStart + row;
      partStart += part.rows;
      if (count <= 0) continue;
      float* sum = sums + col;
      kernels.dotRows(x.data, part.data + static_cast<size_t>(row) * w.rowBytes(), w.dtype, w.in, count, w.in, sum);
      if (down) {
        OuterSum term;
        term.left = left;
        term.leftStride = 1;
        term.leftCols = 1;
        term.b = up->columns(col, count).data;
        term.bStride = up->stride;
        term.rows = lowRank;
        term.cols = count;
        term.c = sum;
        term.cStride = count;
        kernels.addOuter(term);
      }
      if (bias) kernels_.addRow(bias + col, sum, count);
      if (residual) kernels_.addRow(residual->as<float>() + col, sum, count);
      fromFloat(sum, y.columns(col, count).data, count);
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
  const size_t floats = panelFloats(depth, 0);
  float* memory = panelScratch(floats);
  const int64_t share = ceilDiv(ceilDiv(a.rows, threads_), panelRowGrain) * panelRowGrain;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int thread = 0; thread < threads_; ++thread) {
    const int64_t first = thread * share, rows = std::min(share, a.rows - first);
    if (rows <= 0) continue;
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
  const int64_t steps = ceilDiv(a.rows, kernels.stepDepth), stepFloats = ceilDiv(a.cols, 16) * 16;
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

// What is added goes to y first: oneDNN then adds the large product before it rounds.
void CpuDevice::libraryLinear(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const Matrix* up,
                              const Matrix* residual, const Matrix& y) {
  if (residual) convert(*residual, y);
  if (down) matmul(Transpose::no, *down, Transpose::no, *up, 1.0f, residual != nullptr, y);
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
