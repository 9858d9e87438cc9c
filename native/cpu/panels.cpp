#include "cpu/panels.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "core/integers.h"
#include "cpu/cache_lines.h"

namespace lora_da::cpu {

namespace {

// A panel of this depth and its rows of the left operand stay in the second-level cache; deeper products are added up in y. Whole
// panels of a weight.
constexpr int64_t depthBlock = 85 * panelCols;
// Rows of the left operand that do: where panels need not be laid out, all of them are multiplied with these rows before the
// next.
constexpr int64_t rowBlockBytes = 384 << 10;

// Whether panels are what the kernels multiply with.
bool isAsMultiplied(const TypedKernels& kernels, const Panels& panels) {
  return panels.data && panels.stepDepth() == kernels.stepDepth;
}

// The panel of y = x W^T, of which the weight's rows are the columns: as it is kept, or in `panel`.
const float* forwardPanel(const TypedKernels& kernels, const CpuWeight& w, int64_t depth, int64_t depths, int64_t col,
                          int64_t cols, float* panel) {
  if (w.panels.data) {
    const float* kept = w.panels.panel(col, depth);
    if (isAsMultiplied(kernels, w.panels)) return kept;
    kernels.widenPanel(kept, depths, cols, panel);
    return panel;
  }
  const void* rows[panelCols] = {};
  for (int64_t i = 0; i < cols; ++i) rows[i] = w.row(col + i) + static_cast<size_t>(depth) * sizeOf(w.dtype);
  kernels.packColumns(rows, w.dtype, depths, cols, panel);
  return panel;
}

// Asks for what turnPanels reads of the panel that starts at `from`.
void askForColumns(const Panels& panels, int64_t from, int64_t col, int64_t cols) {
  const int64_t floats = ceilDiv(cols, panels.stepDepth()) * roundUp(panels.width(from), 16);
  askFor(panels.panel(from, col), floats * static_cast<int64_t>(sizeof(float)));
}

// The panel of dx = dy W, of which the weight's rows are the depth, from those rows, parts one after the other.
void packInputGrad(const TypedKernels& kernels, const CpuWeight& w, int64_t depth, int64_t depths, int64_t col, int64_t cols,
                   float* panel) {
  const size_t colBytes = static_cast<size_t>(col) * sizeOf(w.dtype);
  const int64_t stepFloats = roundUp(cols, 16);
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

// Depth of one panel: sums that are not kept in float32 are made in one go.
int64_t blockOf(const PanelJob& job) {
  return job.product.floatOutput ? std::min(depthBlock, job.product.depth) : job.product.depth;
}

// The panel of dx = dy W: as it is kept, or in `panel`.
const float* inputGradPanel(const TypedKernels& kernels, const CpuWeight& w, int64_t depth, int64_t depths, int64_t col,
                            int64_t cols, float* panel) {
  if (w.gradPanels.data) return w.gradPanels.panel(col, depth);
  if (w.panels.data) {
    turnPanels(kernels, w.panels, depth, depths, col, cols, panel);
  } else {
    packInputGrad(kernels, w, depth, depths, col, cols, panel);
  }
  return panel;
}

// How work is cut. Cuts change no sum: each element of y is made by one thread, its depth in order.
struct Cuts {
  struct Unit {
    int64_t panel = 0, firstRow = 0, rows = 0;
  };

  int64_t panels = 0, rows = 0;
  int64_t whole = 0;   // panels that come first, with all rows
  int64_t pieces = 1;  // of the rows, for the other panels
  int64_t pieceRows = 0;
  bool rowsFirst = false;  // a piece goes through all panels before the next; else a panel through all pieces

  int64_t units() const { return whole + (panels - whole) * pieces; }
  Unit unit(int64_t index) const {
    if (index < whole) return {index, 0, rows};
    const int64_t rest = index - whole;
    const int64_t firstRow = (rowsFirst ? rest / panels : rest % pieces) * pieceRows;
    return {rowsFirst ? rest % panels : whole + rest / pieces, firstRow, std::min(pieceRows, rows - firstRow)};
  }
};

// Panels that are laid out first stay as long as there are rows; the last ones are also cut by rows, so that threads end
// together.
Cuts cutByPanels(int64_t panels, int64_t rows, int threads) {
  Cuts cuts{panels, rows};
  cuts.pieces = std::clamp<int64_t>(rows / (4 * panelRowGrain), 1, threads);
  cuts.pieceRows = roundUp(ceilDiv(rows, cuts.pieces), panelRowGrain);
  cuts.whole = cuts.pieces == 1 ? panels : std::max<int64_t>(0, panels - panels % threads - threads);
  return cuts;
}

// Panels that are there already come and go instead of the rows.
Cuts cutByRows(int64_t panels, int64_t rows, int64_t rowBytes) {
  Cuts cuts{panels, rows};
  const int64_t most = std::max(panelRowGrain, rowBlockBytes / rowBytes / panelRowGrain * panelRowGrain);
  cuts.pieces = ceilDiv(rows, most);
  cuts.pieceRows = roundUp(ceilDiv(rows, cuts.pieces), panelRowGrain);
  cuts.rowsFirst = true;
  return cuts;
}

// What one thread makes of a part of the job: one panel, over some of the depth, with some of the rows.
class PanelWorker {
 public:
  PanelWorker(const TypedKernels& kernels, const PanelJob& job, float* memory)
      : kernels_(kernels), job_(job), lowRankMemory_(memory), memory_(memory + lowRankFloats(kernels, job)) {}

  // A panel of the LoRA term, and the same before it is laid out.
  static size_t lowRankFloats(const TypedKernels& kernels, const PanelJob& job) {
    return static_cast<size_t>(panelCols * (ceilDiv(job.product.lowRankDepth, kernels.stepDepth) + job.product.lowRankDepth));
  }

  void run(int64_t depth, int64_t depths, const Cuts::Unit& unit) {
    if (unit.rows <= 0) return;
    const int64_t col = unit.panel * panelCols, cols = std::min(panelCols, job_.cols - col);
    const bool first = depth == 0, last = depth + depths == job_.product.depth;
    const auto inputBytes = static_cast<int64_t>(job_.inputBytes), outputBytes = static_cast<int64_t>(job_.outputBytes);
    PanelProduct p = job_.product;
    if (unit.panel != panel_ || depth != depth_) layOut(depth, depths, col, cols, last);
    p.lowRankDepth = last ? lowRankDepth_ : 0;
    panel_ = unit.panel;
    depth_ = depth;
    p.panel = laid_;
    p.lowRankPanel = lowRankMemory_;
    p.x = static_cast<const char*>(p.x) + (unit.firstRow * p.xStride + depth) * inputBytes;
    if (p.lowRankDepth > 0)
      p.lowRank = static_cast<const char*>(p.lowRank) + (unit.firstRow * p.lowRankStride + lowRankFirst_) * inputBytes;
    p.y = static_cast<char*>(p.y) + (unit.firstRow * p.yStride + col) * outputBytes;
    p.bias = p.bias && last ? p.bias + col : nullptr;
    p.residual = p.residual && last ? p.residual + unit.firstRow * p.residualStride + col : nullptr;
    p.accumulate = p.accumulate || !first;
    p.depth = depths;
    p.rows = unit.rows;
    p.cols = cols;
    kernels_.multiplyPanel(p);
  }

 private:
  void layOut(int64_t depth, int64_t depths, int64_t col, int64_t cols, bool last) {
    const CpuWeight& weight = job_.weight;
    const int64_t output = job_.firstOutput;
    laid_ = job_.side == PanelJob::Side::forward ? forwardPanel(kernels_, weight, depth, depths, output + col, cols, memory_)
                                                 : inputGradPanel(kernels_, weight, output + depth, depths, col, cols, memory_);
    lowRankFirst_ = lowRankDepth_ = 0;
    if (last && job_.up) layOutUp(*job_.up, col, cols);
    if (last && job_.a) {
      lowRankDepth_ = job_.a->rows;
      packMatrixRows(kernels_, *job_.a, 0, lowRankDepth_, col, cols, lowRankMemory_);
    }
  }

  // Of the blocks that have some of these columns.
  void layOutUp(const UpProjection& up, int64_t col, int64_t cols) {
    const auto before = [&](const UpProjection::Block& block) { return block.first + block.count <= col; };
    const auto inside = [&](const UpProjection::Block& block) { return block.first < col + cols; };
    const auto begin = std::find_if_not(up.blocks.begin(), up.blocks.end(), before);
    const auto end = std::find_if_not(begin, up.blocks.end(), inside);
    lowRankFirst_ = (begin - up.blocks.begin()) * up.rank();
    lowRankDepth_ = (end - begin) * up.rank();
    if (begin == end) return;
    if (begin + 1 == end && begin->first <= col && begin->first + begin->count >= col + cols) {
      return packMatrixRows(kernels_, up.factors, 0, up.rank(), col, cols, lowRankMemory_);
    }
    float* apart = lowRankMemory_ + panelCols * ceilDiv(job_.product.lowRankDepth, kernels_.stepDepth);
    const Matrix blocks{apart, up.factors.dtype, lowRankDepth_, cols, cols};
    spreadBlocks(up, begin - up.blocks.begin(), col, blocks);
    packMatrixRows(kernels_, blocks, 0, lowRankDepth_, 0, cols, lowRankMemory_);
  }

  const TypedKernels& kernels_;
  const PanelJob& job_;
  float* lowRankMemory_;
  float* memory_;
  const float* laid_ = nullptr;
  int64_t panel_ = -1, depth_ = -1;              // what laid_ is
  int64_t lowRankFirst_ = 0, lowRankDepth_ = 0;  // columns of the left factor that the LoRA term's panel is for
};

bool isThere(const TypedKernels& kernels, const PanelJob& job) {
  return isAsMultiplied(kernels, job.side == PanelJob::Side::forward ? job.weight.panels : job.weight.gradPanels);
}

}  // namespace

void packMatrixRows(const TypedKernels& kernels, const Matrix& m, int64_t first, int64_t count, int64_t col, int64_t cols,
                    float* panel) {
  const int64_t whole = count / kernels.stepDepth;
  kernels.packRows(m.at(first, col), m.at(first + 1, col), m.dtype, kernels.stepDepth * m.stride, whole, cols, panel);
  if (count % kernels.stepDepth != 0) {
    kernels.packRows(m.at(first + count - 1, col), nullptr, m.dtype, 0, 1, cols, panel + whole * roundUp(cols, 16));
  }
}

void turnPanels(const TypedKernels& kernels, const Panels& panels, int64_t depth, int64_t depths, int64_t col, int64_t cols,
                float* panel) {
  const int64_t width = roundUp(cols, 16);
  for (int64_t done = 0; done < depths; done += panelCols) {
    const int64_t from = depth + done, count = std::min(panelCols, depths - done);
    if (done + 2 * panelCols < depths) askForColumns(panels, from + 2 * panelCols, col, cols);
    kernels.turnPanel(panels.panel(from), panels.dtype, panels.steps(), panels.width(from), col, cols, count,
                      panel + done / kernels.stepDepth * width);
  }
}

void spreadBlocks(const UpProjection& up, int64_t firstBlock, int64_t col, const Matrix& spread) {
  const size_t bytes = sizeOf(up.factors.dtype);
  std::fill_n(spread.as<char>(), static_cast<size_t>(spread.rows * spread.cols) * bytes, 0);
  for (int64_t row = 0; row < spread.rows; ++row) {
    const UpProjection::Block& block = up.blocks[static_cast<size_t>(firstBlock + row / up.rank())];
    const int64_t first = std::max(block.first, col), count = std::min(block.first + block.count, col + spread.cols) - first;
    std::copy_n(up.factors.at(row % up.rank(), first), static_cast<size_t>(count) * bytes, spread.at(row, first - col));
  }
}

size_t panelFloats(const TypedKernels& kernels, const PanelJob& job) {
  const int64_t steps = isThere(kernels, job) ? 0 : ceilDiv(blockOf(job), kernels.stepDepth);
  return PanelWorker::lowRankFloats(kernels, job) + static_cast<size_t>(panelCols * steps);
}

void runPanels(const TypedKernels& kernels, const PanelJob& job, int threads, float* memory) {
  const PanelProduct& product = job.product;
  const int64_t block = blockOf(job);
  const int64_t panels = ceilDiv(job.cols, panelCols), rowBytes = block * static_cast<int64_t>(job.inputBytes);
  const Cuts cuts =
      isThere(kernels, job) ? cutByRows(panels, product.rows, rowBytes) : cutByPanels(panels, product.rows, threads);
  const int64_t units = cuts.units();
  const size_t floats = panelFloats(kernels, job);
#pragma omp parallel num_threads(threads)
  {
    PanelWorker worker(kernels, job, memory + floats * static_cast<size_t>(omp_get_thread_num()));
    for (int64_t depth = 0; depth < product.depth; depth += block) {
      const int64_t depths = std::min(block, product.depth - depth);
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; ++unit) worker.run(depth, depths, cuts.unit(unit));
    }
  }
}

}  // namespace lora_da::cpu
