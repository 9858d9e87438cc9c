// A frozen weight of the CPU device, in the layouts that its products need.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"

namespace lora_da::cpu {

class CpuWeight : public Weight {
 public:
  // Consecutive rows [rows, in] of the stacked weight, row-major.
  struct Rows {
    const char* data = nullptr;
    int64_t rows = 0;
  };

  DType dtype = DType::f32;    // of `parts`
  std::vector<Rows> parts;     // in `copy`, or mapped pages of the file; empty once packed copies replace them
  std::shared_ptr<char> copy;  // the rows one after the other; null: they are mapped
  Buffer packedForward;        // oneDNN's layout for y = x W^T; null: products read `parts`
  Buffer packedInputGrad;      // and for dx = dy W

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
