// A frozen weight of the CPU device, in the layouts that its products need.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "core/device.h"
#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

class CpuWeight : public Weight {
 public:
  // Consecutive rows [rows, in] of the stacked weight, row-major.
  struct Rows {
    const char* data = nullptr;
    int64_t rows = 0;
  };

  DType dtype = DType::f32;       // of `panels` or `parts`
  const float* panels = nullptr;  // kernels/panels.h: 48 outputs each, one after the other; null: `parts` has the rows
  std::vector<Rows> parts;        // in `copy`, or mapped pages of the file; empty once other layouts replace them
  std::shared_ptr<char> copy;     // what holds the panels or rows; null: the rows are mapped
  Buffer packedForward;           // oneDNN's layout for y = x W^T; null: products read `parts`
  Buffer packedInputGrad;         // and for dx = dy W

  size_t rowBytes() const { return static_cast<size_t>(in) * sizeOf(dtype); }
  // Row `row` of the stacked weight.
  const char* row(int64_t row) const {
    for (const Rows& part : parts) {
      if (row < part.rows) return part.data + static_cast<size_t>(row) * rowBytes();
      row -= part.rows;
    }
    return nullptr;
  }

  // Steps of a panel of its type, the panel of an output, and how many outputs that has.
  int64_t steps() const { return dtype == DType::bf16 ? (in + 1) / 2 : in; }
  const float* panel(int64_t output) const { return panels + output / panelCols * panelCols * steps(); }
  int64_t panelWidth(int64_t output) const { return std::min(panelCols, out - output / panelCols * panelCols); }
  size_t panelBytes() const { return static_cast<size_t>((out + 15) / 16 * 16 * steps()) * sizeof(float); }
};

}  // namespace lora_da::cpu
