// Frozen weights: from a checkpoint's tensors to what products read.
#include <algorithm>
#include <cstring>

#include "core/cpu_info.h"
#include "core/file_tensor.h"
#include "core/integers.h"
#include "cpu/cpu_device.h"
#include "cpu/cpu_weight.h"
#include "cpu/panels.h"
#include "cpu/products.h"

namespace lora_da::cpu {

namespace {

// What a weight's panels in that type will be, as y = x W^T and as dx = dy W read them.
Panels forwardPanels(const CpuWeight& weight, DType type) {
  return {nullptr, type, weight.in, weight.out};
}
Panels inputGradPanels(const CpuWeight& weight, DType type) {
  return {nullptr, type, weight.out, weight.in};
}

}  // namespace

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
    if (part.populate) part.populate();
  }
  const bool prepacked = fitsPrepacked(*weight, uses);
  const bool readable = fileType == computeType_ || (hasPanels() && fileType == DType::bf16 && !prepacked);
  const bool asTheyLie = alike && readable && (hasPanels() || parts.size() == 1);
  weight->dtype = asTheyLie ? fileType : computeType_;
  const Panels panels = forwardPanels(*weight, weight->dtype);
  weight->bytes = hasPanels() ? panels.bytes() : static_cast<size_t>(weight->out) * weight->rowBytes();
  if (asTheyLie && !(hasPanels() && weight->bytes <= copyBudget_)) {
    weight->bytes = static_cast<size_t>(weight->out) * weight->rowBytes();
    for (const HostTensor& part : parts) weight->parts.push_back({static_cast<const char*>(part.data), part.rows});
  } else {
    if (asTheyLie || prepacked) copyBudget_ -= weight->bytes;
    weight->copy = weightPages_.take(*this, weight->bytes, "weight " + parts.front().name);
    if (hasPanels()) {
      weight->panels = panels;
      copyToPanels(parts, asTheyLie, *weight);
      if (prepacked && uses.inputGrad) addGradPanels(*weight, "weight for backward " + parts.front().name);
    } else {
      copyRows(parts, *weight);
    }
    for (const HostTensor& part : parts) {
      if (part.release) part.release();
    }
  }
  if (!hasPanels()) packForLibrary(parts, uses, *weight);
  return weight;
}

bool CpuDevice::fitsPrepacked(const CpuWeight& weight, WeightUses uses) const {
  const size_t backward = uses.inputGrad ? inputGradPanels(weight, computeType_).bytes() : 0;
  return prepack_ && hasPanels() && forwardPanels(weight, computeType_).bytes() + backward <= copyBudget_;
}

void CpuDevice::readWeightRow(const CpuWeight& weight, int64_t output, float* x) const {
  const Panels& panels = weight.panels;
  if (!panels.data) return typed(weight.dtype).toFloat(weight.row(output), x, weight.in);
  const int64_t inPanel = output % panelCols, width = roundUp(panels.width(output - inPanel), 16), steps = panels.steps();
  const float* column = panels.panel(output - inPanel) + inPanel;
  if (panels.dtype == DType::f32) {
    for (int64_t step = 0; step < steps; ++step) x[step] = column[step * width];
    return;
  }
  for (int64_t i = 0; i < weight.in; ++i) {
    uint16_t pair[2];
    std::memcpy(pair, column + i / 2 * width, sizeof pair);
    x[i] = bf16ToFloat(pair[i % 2]);
  }
}

void CpuDevice::copyRows(const std::vector<HostTensor>& parts, CpuWeight& weight) {
  char* target = weight.copy.get();
  for (const HostTensor& part : parts) {
    convertFromFile(part, weight.dtype, target);
    weight.parts.push_back({target, part.rows});
    target += static_cast<size_t>(part.rows) * weight.rowBytes();
  }
}

// A panel's rows are read where they lie in the file, or converted to the weight's type first.
void CpuDevice::copyToPanels(const std::vector<HostTensor>& parts, bool asTheyLie, CpuWeight& weight) {
  std::vector<const HostTensor*> tensors;  // of each row, and
  std::vector<int64_t> rows;               // the row's number in it
  for (const HostTensor& part : parts) {
    if (!asTheyLie) convertFileElements(part, 0, 0, weight.dtype, weight.copy.get());  // an unknown type throws here
    for (int64_t row = 0; row < part.rows; ++row) {
      tensors.push_back(&part);
      rows.push_back(row);
    }
  }
  auto* panels = reinterpret_cast<float*>(weight.copy.get());
  weight.panels.data = panels;
  const auto packColumns = typed(weight.dtype).packColumns;
  const size_t rowBytes = weight.rowBytes();
#pragma omp parallel num_threads(threads_)
  {
    std::vector<char> converted(asTheyLie ? 0 : static_cast<size_t>(panelCols) * rowBytes);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < weight.out; first += panelCols) {
      const void* columns[panelCols] = {};
      const int64_t count = weight.panels.width(first);
      for (int64_t i = 0; i < count; ++i) {
        const HostTensor& tensor = *tensors[static_cast<size_t>(first + i)];
        const int64_t row = rows[static_cast<size_t>(first + i)];
        if (asTheyLie) {
          columns[i] = static_cast<const char*>(tensor.data) + static_cast<size_t>(row) * rowBytes;
        } else {
          char* target = converted.data() + static_cast<size_t>(i) * rowBytes;
          convertFileElements(tensor, row * tensor.cols, tensor.cols, weight.dtype, target);
          columns[i] = target;
        }
      }
      packColumns(columns, weight.dtype, weight.in, count, panels + first * weight.panels.steps());
    }
  }
}

void CpuDevice::addGradPanels(CpuWeight& weight, const std::string& purpose) {
  Panels turned = inputGradPanels(weight, computeType_);
  weight.gradCopy = weightPages_.take(*this, turned.bytes(), purpose);
  weight.bytes += turned.bytes();
  copyBudget_ -= turned.bytes();
  auto* panels = reinterpret_cast<float*>(weight.gradCopy.get());
  turned.data = panels;
  weight.gradPanels = turned;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t col = 0; col < turned.cols; col += panelCols) {
    turnPanels(typed(), weight.panels, 0, turned.depth, col, turned.width(col), panels + col * turned.steps());
  }
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

}  // namespace lora_da::cpu
