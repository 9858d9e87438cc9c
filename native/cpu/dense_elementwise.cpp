// Elementwise passes of the CPU device over the initializations' matrices: n^2 beside n^3, bound by memory. Within concurrently()
// a pass runs on the calling thread alone, as nested teams have one thread.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// A transposed tile takes 8 KB of the first-level cache. It is made there and not in y, whose rows may lie a power of two apart
// and then share a few of the cache's sets.
constexpr int64_t kTransposeTile = 32;

// Below this many elements (256 KB of float64) a team costs more than it gains.
constexpr int64_t kThreadedCount = 1 << 15;

template <class T>
void scaleAll(T* x, int64_t count, double factor, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (count >= kThreadedCount)
  for (int64_t i = 0; i < count; ++i) x[i] = static_cast<T>(static_cast<double>(x[i]) * factor);
}

template <class T>
int64_t countBad(const T* x, int64_t count, int threads) {
  int64_t bad = 0;
#pragma omp parallel for simd schedule(static) num_threads(threads) reduction(+ : bad) if (count >= kThreadedCount)
  for (int64_t i = 0; i < count; ++i) bad += std::abs(x[i]) <= std::numeric_limits<T>::max() ? 0 : 1;
  return bad;
}

[[noreturn]] void throwType(const char* operation, DType type) {
  throw Error(code::internal, std::string(operation) + " takes float32 and float64, not " + nameOf(type));
}

}  // namespace

void CpuDevice::scale(const Matrix& x, double factor) {
  const int64_t count = x.rows * x.cols;
  if (x.dtype == DType::f64) return scaleAll(x.as<double>(), count, factor, threads_);
  if (x.dtype == DType::f32) return scaleAll(x.as<float>(), count, factor, threads_);
  throwType("scale", x.dtype);
}

void CpuDevice::blend(double* a, double alpha, const double* b, double beta, int64_t count) {
#pragma omp parallel for simd schedule(static) num_threads(threads_) if (count >= kThreadedCount)
  for (int64_t i = 0; i < count; ++i) a[i] = alpha * a[i] + beta * b[i];
}

void CpuDevice::addToDiagonal(double* a, int64_t n, double value) {
  for (int64_t i = 0; i < n; ++i) a[i * n + i] += value;
}

void CpuDevice::scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) {
  const int64_t strips = (cols + kTransposeTile - 1) / kTransposeTile;
#pragma omp parallel for schedule(static) num_threads(threads_) if (rows * cols >= kThreadedCount)
  for (int64_t strip = 0; strip < strips; ++strip) {
    double tile[kTransposeTile][kTransposeTile];
    const int64_t column = strip * kTransposeTile, width = std::min(kTransposeTile, cols - column);
    for (int64_t row = 0; row < rows; row += kTransposeTile) {
      const int64_t height = std::min(kTransposeTile, rows - row);
      for (int64_t i = 0; i < height; ++i) {
        const float* from = x + (row + i) * cols + column;
        for (int64_t j = 0; j < width; ++j) tile[j][i] = scale[row + i] * static_cast<double>(from[j]);
      }
      for (int64_t j = 0; j < width; ++j) std::copy_n(tile[j], height, y + (column + j) * rows + row);
    }
  }
}

int64_t CpuDevice::countNonFinite(const Matrix& x) {
  const int64_t count = x.rows * x.cols;
  if (x.dtype == DType::f64) return countBad(x.as<double>(), count, threads_);
  if (x.dtype == DType::f32) return countBad(x.as<float>(), count, threads_);
  throwType("countNonFinite", x.dtype);
}

}  // namespace lora_da::cpu
