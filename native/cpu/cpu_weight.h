// A frozen weight of the CPU device, in the layouts that its products need.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "core/device.h"
#include "core/integers.h"
#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

// A matrix [depth, cols] laid out in panels (kernels/panels.h) of 48 columns each, one after the other.
struct Panels {
  const float* data = nullptr;  // null: there are none
  DType dtype = DType::f32;
  int64_t depth = 0, cols = 0;

  int64_t stepDepth() const { return dtype == DType::bf16 ? 2 : 1; }
  int64_t steps() const { return ceilDiv(depth, stepDepth()); }
  // Columns of the panel that starts at `col`, and that panel from an element of the depth on that begins a step.
  int64_t width(int64_t col) const { return std::min(panelCols, cols - col); }
  const float* panel(int64_t col, int64_t firstDepth = 0) const {
    return data + col * steps() + firstDepth / stepDepth() * roundUp(width(col), 16);
  }
  size_t bytes() const { return static_cast<size_t>(roundUp(cols, 16) * steps()) * sizeof(float); }
};

class CpuWeight : public Weight {
 public:
  // Consecutive rows [rows, in] of the stacked weight, row-major.
  struct Rows {
    const char* data = nullptr;
    int64_t rows = 0;
  };

  DType dtype = DType::f32;        // of `panels` or `parts`
  Panels panels;                   // [in, out], as y = x W^T reads it; none: `parts` has the rows
  Panels gradPanels;               // [out, in], as dx = dy W does, in the compute type; none: turned from `panels` as it runs
  std::vector<Rows> parts;         // in `copy`, or mapped pages of the file; empty once other layouts replace them
  std::shared_ptr<char> copy;      // what holds the panels or rows; null: the rows are mapped
  std::shared_ptr<char> gradCopy;  // what holds gradPanels
  Buffer packedForward;            // oneDNN's layout for y = x W^T; null: products read `parts`
  Buffer packedInputGrad;          // and for dx = dy W

  size_t rowBytes() const { return static_cast<size_t>(in) * sizeOf(dtype); }
  // Row `row` of the stacked weight.
  const char* row(int64_t row) const {
    for (const Rows& part : parts) {
      if (row < part.rows) return part.data + static_cast<size_t>(row) * rowBytes();
      row -= part.rows;
    }
    return nullptr;
  }
};

}  // namespace lora_da::cpu
