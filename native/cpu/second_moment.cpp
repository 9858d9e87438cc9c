// Z += x^T x in float64, half of the products: tiles of the lower triangle on own kernels, or BLAS' rank-k update.
#include <cblas.h>

#include <algorithm>

#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// Two panels of so many rows stay in the second-level cache, all panels of usual widths in the third.
constexpr int64_t blockRows = 512;

int64_t panelsOf(int64_t cols) {
  return (cols + momentPanelCols - 1) / momentPanelCols;
}

}  // namespace

size_t CpuDevice::momentWorkspaceBytes(int64_t rows, int64_t width) const {
  const int64_t doubles = kernels_.addMoment ? panelsOf(width) * blockRows * momentPanelCols : rows * width;
  return static_cast<size_t>(doubles) * sizeof(double);
}

void CpuDevice::secondMoment(const Matrix& x, const Matrix& z) {
  if (!kernels_.addMoment) return blasSecondMoment(x, z);
  const auto momentPanel = typed(x.dtype).momentPanel;
  const int64_t panels = panelsOf(x.cols), panelDoubles = blockRows * momentPanelCols;
  auto* memory = static_cast<double*>(scratch(static_cast<size_t>(panels * panelDoubles) * sizeof(double)));
  const auto colsOf = [&](int64_t panel) { return std::min<int64_t>(momentPanelCols, x.cols - panel * momentPanelCols); };
#pragma omp parallel num_threads(threads_)
  for (int64_t first = 0; first < x.rows; first += blockRows) {
    const int64_t rows = std::min(blockRows, x.rows - first);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Matrix columns = x.rowRange(first, rows).columns(panel * momentPanelCols, colsOf(panel));
      momentPanel(columns.data, rows, columns.stride, columns.cols, memory + panel * panelDoubles);
    }
    // The longest rows of tiles first, so that threads end together. Each tile is one thread's: the order of a sum is fixed.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = panels - 1; i >= 0; --i) {
      for (int64_t j = 0; j <= i; ++j) {
        double* tile = z.as<double>() + i * momentPanelCols * z.stride + j * momentPanelCols;
        kernels_.addMoment(memory + i * panelDoubles, memory + j * panelDoubles, rows, colsOf(i), colsOf(j), tile, z.stride);
      }
    }
  }
}

void CpuDevice::blasSecondMoment(const Matrix& x, const Matrix& z) {
  auto* wide = static_cast<double*>(scratch(static_cast<size_t>(x.rows * x.cols) * sizeof(double)));
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t i = 0; i < x.rows; ++i) {
    double* target = wide + i * x.cols;
    if (x.dtype == DType::bf16) {
      const uint16_t* row = x.as<uint16_t>() + i * x.stride;
      for (int64_t j = 0; j < x.cols; ++j) target[j] = bf16ToFloat(row[j]);
    } else {
      const float* row = x.as<float>() + i * x.stride;
      for (int64_t j = 0; j < x.cols; ++j) target[j] = row[j];
    }
  }
  cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, static_cast<int>(x.cols), static_cast<int>(x.rows), 1.0, wide,
              static_cast<int>(x.cols), 1.0, z.as<double>(), static_cast<int>(z.stride));
}

}  // namespace lora_da::cpu
