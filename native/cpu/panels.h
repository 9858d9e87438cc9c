// Products by panels (kernels/panels.h): what lays a panel out, and how the work is shared.
#pragma once

#include "cpu/cpu_weight.h"
#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

// Rows [first, first + count) of m, columns [col, col + cols), as the steps of a panel.
void packMatrixRows(const TypedKernels& kernels, const Matrix& m, int64_t first, int64_t count, int64_t col, int64_t cols,
                    float* panel);

// `panel` = columns [col, col + cols), at most a panel's, of the transposed matrix, of which [depth, depth + depths) are its
// depth: the panels of dx = dy W from those of y = x W^T. `depth` starts a panel.
void turnPanels(const TypedKernels& kernels, const Panels& panels, int64_t depth, int64_t depths, int64_t col, int64_t cols,
                float* panel);

// spread [blocks * rank, cols], contiguous = the factors' columns from `col` on, from firstBlock on block below block, zeros
// elsewhere.
void spreadBlocks(const UpProjection& up, int64_t firstBlock, int64_t col, const Matrix& spread);

// A product with a frozen weight, forward (y = x W^T) or of its input gradient (dx = dy W).
struct PanelJob {
  enum class Side { forward, inputGrad };

  const CpuWeight& weight;
  Side side;
  PanelProduct product;  // for the first panel and all rows; y and what is added to it move with the panel
  int64_t cols = 0;      // of all panels
  size_t inputBytes = 0, outputBytes = 0;
  const UpProjection* up = nullptr;  // of a LoRA term, forward
  const Matrix* a = nullptr;         // of one of the input gradient
  int64_t firstOutput = 0;           // of the weight, a multiple of panelCols; `cols`, or the depth, says how many take part
};

// Floats of memory that each thread needs.
size_t panelFloats(const TypedKernels& kernels, const PanelJob& job);
void runPanels(const TypedKernels& kernels, const PanelJob& job, int threads, float* memory);

}  // namespace lora_da::cpu
