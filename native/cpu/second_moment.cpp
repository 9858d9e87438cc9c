// Z += x^T x, half of the products: tiles of the lower triangle on own kernels, or BLAS' rank-k update in float64.
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/integers.h"
#include "cpu/cache_lines.h"
#include "cpu/cpu_device.h"
#include "cpu/panels.h"

namespace lora_da::cpu {

namespace {

// Two panels of so many rows stay in the second-level cache, all panels of usual widths in the third.
constexpr int64_t blockRows = 512;

// A row whose square is so many times the median's is massive, as a few tokens of real models are: in directions of a channel
// that it does not have, the rounding of a float32 sum with it would hide what all others have there. Such rows are added
// exactly.
constexpr double massiveRatio = 16;

// Memory for telling them apart: each row's square, twice; the rows in another order; a row in float32 for each thread.
struct MassiveRows {
  size_t rowBytes, squareBytes, copyBytes;
  int64_t rowFloats;

  MassiveRows(int64_t rows, int64_t cols, DType type)
      : rowBytes(static_cast<size_t>(cols) * sizeOf(type)),
        squareBytes(cacheLines(static_cast<size_t>(2 * rows) * sizeof(double))),
        copyBytes(cacheLines(rowBytes * static_cast<size_t>(rows))),
        rowFloats(roundUp(cols, 16)) {}
  size_t bytes(int threads) const { return squareBytes + copyBytes + static_cast<size_t>(rowFloats * threads) * sizeof(float); }
};

// z += x^T x by tiles of its lower triangle, `width` columns wide: pack(columns, panel) lays out some rows of a tile's columns as
// panelSize numbers, add(left, right, rows, zRows, zCols, tile, stride) multiplies two of them.
template <class Number, class Pack, class Add>
void addTiles(const Matrix& x, const Matrix& z, int64_t width, int64_t panelSize, Number* memory, int threads, const Pack& pack,
              const Add& add) {
  const int64_t panels = ceilDiv(x.cols, width);
  const auto colsOf = [&](int64_t panel) { return std::min(width, x.cols - panel * width); };
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < x.rows; first += blockRows) {
    const int64_t rows = std::min(blockRows, x.rows - first);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      pack(x.rowRange(first, rows).columns(panel * width, colsOf(panel)), memory + panel * panelSize);
    }
    // The longest rows of tiles first, so that threads end together. Each tile is one thread's: the order of a sum is fixed.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = panels - 1; i >= 0; --i) {
      for (int64_t j = 0; j <= i; ++j) {
        double* tile = z.as<double>() + i * width * z.stride + j * width;
        add(memory + i * panelSize, memory + j * panelSize, rows, colsOf(i), colsOf(j), tile, z.stride);
      }
    }
  }
}

}  // namespace

size_t CpuDevice::momentWorkspaceBytes(int64_t rows, int64_t width) const {
  const int64_t doubles = kernels_.addMoment ? roundUp(width, momentPanelCols) * blockRows : rows * width;
  return static_cast<size_t>(doubles) * sizeof(double) + MassiveRows(rows, width, DType::bf16).bytes(threads_);
}

void CpuDevice::secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) {
  if (sum == MomentSum::grouped && x.dtype == DType::bf16 && kernels_.addGroupedMoment) return groupedSecondMoment(x, z);
  if (kernels_.addMoment) return exactSecondMoment(x, z);
  blasSecondMoment(x, z);
}

void CpuDevice::groupedSecondMoment(const Matrix& x, const Matrix& z) {
  int64_t ordinary = 0;
  const Matrix rows = massiveRowsLast(x, ordinary);
  addRowGroups(rows.rowRange(0, ordinary), z);
  if (ordinary < x.rows) exactSecondMoment(rows.rowRange(ordinary, x.rows - ordinary), z);
}

Matrix CpuDevice::massiveRowsLast(const Matrix& x, int64_t& ordinary) {
  const TypedKernels& kernels = typed(x.dtype);
  const MassiveRows layout(x.rows, x.cols, x.dtype);
  char* memory = static_cast<char*>(momentScratch_.reserve(*this, layout.bytes(threads_), "rows of a second moment"));
  double* squares = reinterpret_cast<double*>(memory);
  double* sorted = squares + x.rows;
  float* wide = reinterpret_cast<float*>(memory + layout.squareBytes + layout.copyBytes);
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t i = 0; i < x.rows; ++i) {
    float* row = wide + omp_get_thread_num() * layout.rowFloats;
    kernels.toFloat(x.rowRange(i, 1).data, row, x.cols);
    const double square = kernels_.squaredNorm(row, x.cols);
    squares[i] = sorted[i] = std::isnan(square) ? std::numeric_limits<double>::infinity() : square;
  }
  double* median = sorted + x.rows / 2;
  std::nth_element(sorted, median, sorted + x.rows);
  const double most = massiveRatio * *median;
  ordinary = std::count_if(squares, squares + x.rows, [&](double square) { return square <= most; });
  if (ordinary == x.rows) return x;
  const Matrix ordered{memory + layout.squareBytes, x.dtype, x.rows, x.cols, x.cols};
  int64_t nextOrdinary = 0, nextMassive = ordinary;
  for (int64_t i = 0; i < x.rows; ++i) {
    const int64_t place = squares[i] <= most ? nextOrdinary++ : nextMassive++;
    std::copy_n(x.at(i), layout.rowBytes, ordered.at(place));
  }
  return ordered;
}

void CpuDevice::addRowGroups(const Matrix& x, const Matrix& z) {
  const TypedKernels& kernels = typed(x.dtype);
  const int64_t panelFloats = blockRows / kernels.stepDepth * panelCols;
  auto* memory = static_cast<float*>(scratch(static_cast<size_t>(ceilDiv(x.cols, panelCols) * panelFloats) * sizeof(float)));
  const auto pack = [&](const Matrix& columns, float* panel) {
    packMatrixRows(kernels, columns, 0, columns.rows, 0, columns.cols, panel);
  };
  addTiles(x, z, panelCols, panelFloats, memory, threads_, pack, kernels_.addGroupedMoment);
}

void CpuDevice::exactSecondMoment(const Matrix& x, const Matrix& z) {
  const auto momentPanel = typed(x.dtype).momentPanel;
  constexpr int64_t panelDoubles = blockRows * momentPanelCols;
  auto* memory =
      static_cast<double*>(scratch(static_cast<size_t>(ceilDiv(x.cols, momentPanelCols) * panelDoubles) * sizeof(double)));
  const auto pack = [&](const Matrix& columns, double* panel) {
    momentPanel(columns.data, columns.rows, columns.stride, columns.cols, panel);
  };
  addTiles(x, z, momentPanelCols, panelDoubles, memory, threads_, pack, kernels_.addMoment);
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
