// Sums over the rows of x [rows, width], in float64:
//   secondMoment  Z [width, width] += x^T x, its lower triangle: rows are widened to float64 a chunk at a time and added by
//                 cuBLAS' rank-k update, which does half the work of a product
//   squareSum     sums [width] += column sums of x^2, in two stages: blocks of rows, then their sums in order
#include <algorithm>

#include "cuda/cuda_device.h"
#include "cuda/dense.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

// Deep enough for the rank-k update, small beside Z of the widths where it matters.
constexpr int64_t chunkBytes = int64_t{128} << 20;
constexpr int64_t mostChunkRows = 32768;  // a grid's second dimension ends at 65535
constexpr int64_t fewestChunkRows = 256;

constexpr int widenThreads = 256;
constexpr int squareColumns = 32;  // threads along the columns
constexpr int squareRows = 8;      // threads along the rows
constexpr int64_t blockRows = 128;
constexpr int totalThreads = 128;

// y [rows, cols] contiguous = x; a thread takes `width` columns of a row.
template <class T, int width>
__global__ void __launch_bounds__(widenThreads) widenKernel(Rows<const T> x, int64_t cols, double* y) {
  const int64_t col = (int64_t{blockIdx.x} * widenThreads + threadIdx.x) * width, row = blockIdx.y;
  if (col >= cols) return;
  const Floats<width> values = load<width>(x[row] + col);
  double* target = y + row * cols + col;
  if constexpr (width == 1) {
    *target = values.at[0];
  } else {
#pragma unroll
    for (int i = 0; i < width; i += 2) *reinterpret_cast<double2*>(target + i) = {values.at[i], values.at[i + 1]};
  }
}

// partial [blocks of rows, cols]: a block sums blockRows rows of its columns, each thread every squareRows-th of them.
template <class T, int width>
__global__ void __launch_bounds__(squareColumns* squareRows, 4)
    squareSumKernel(Rows<const T> x, int64_t rows, int64_t cols, double* partial) {
  auto* shared = sharedMemory<double>();  // [squareRows, width, squareColumns], so that neighbours use different banks
  const int64_t col = (int64_t{blockIdx.x} * squareColumns + threadIdx.x) * width;
  const int64_t firstRow = blockIdx.y * blockRows;
  const int64_t lastRow = firstRow + blockRows < rows ? firstRow + blockRows : rows;
  double sums[width] = {};
  if (col < cols) {
    for (int64_t row = firstRow + threadIdx.y; row < lastRow; row += squareRows) {
      const Floats<width> values = load<width>(x[row] + col);
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] += static_cast<double>(values.at[i]) * static_cast<double>(values.at[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < width; ++i) shared[(threadIdx.y * width + i) * squareColumns + threadIdx.x] = sums[i];
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    double sum = 0;
    for (int y = 0; y < squareRows; ++y) sum += shared[(y * width + i) * squareColumns + threadIdx.x];
    partial[blockIdx.y * cols + col + i] = sum;
  }
}

__global__ void __launch_bounds__(totalThreads)
    squareSumTotalKernel(const double* partial, int64_t blocks, int64_t cols, double* sums) {
  const int64_t col = int64_t{blockIdx.x} * totalThreads + threadIdx.x;
  if (col >= cols) return;
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * cols + col];
  sums[col] += sum;
}

unsigned ceilDiv(int64_t a, int64_t b) {
  return static_cast<unsigned>((a + b - 1) / b);
}

int64_t chunkRows(int64_t rows, int64_t width) {
  const int64_t most = chunkBytes / (width * static_cast<int64_t>(sizeof(double)));
  return std::min(rows, std::clamp(most, fewestChunkRows, mostChunkRows));
}

template <class T, int width>
void widenRows(Queue& queue, const Matrix& x, double* y) {
  queue.launch("secondMoment", widenKernel<T, width>, dim3(ceilDiv(x.cols, widenThreads * width), static_cast<unsigned>(x.rows)),
               dim3(widenThreads), 0, rowsOf<const T>(x), x.cols, y);
}

template <class T, int width>
void sumSquares(Queue& queue, const Matrix& x, double* partial) {
  queue.launch("squareSum", squareSumKernel<T, width>, dim3(ceilDiv(x.cols, squareColumns * width), ceilDiv(x.rows, blockRows)),
               dim3(squareColumns, squareRows), squareColumns * squareRows * width * sizeof(double), rowsOf<const T>(x), x.rows,
               x.cols, partial);
}

}  // namespace

size_t CudaDevice::momentWorkspaceBytes(int64_t rows, int64_t width) const {
  return static_cast<size_t>(chunkRows(rows, width) * width) * sizeof(double);
}

void CudaDevice::secondMoment(const Matrix& x, MomentSum, const Matrix& z) {
  auto* wide = static_cast<double*>(scratch(momentWorkspaceBytes(x.rows, x.cols)));
  const int64_t step = chunkRows(x.rows, x.cols);
  for (int64_t first = 0; first < x.rows; first += step) {
    const Matrix rows = x.rowRange(first, std::min(step, x.rows - first));
    withElementType(x.dtype, [&](auto element) {
      using T = decltype(element);
      const auto widen = readsInVectors(x, fullWidth<T>) ? widenRows<T, fullWidth<T>> : widenRows<T, 1>;
      widen(queue_, rows, wide);
    });
    dense_->addSquare(wide, rows.rows, rows.cols, z);
  }
}

void CudaDevice::squareSum(const Matrix& x, double* sums) {
  if (x.rows == 0) return;
  const int64_t blocks = ceilDiv(x.rows, blockRows);
  auto* partial = static_cast<double*>(scratch(static_cast<size_t>(blocks * x.cols) * sizeof(double)));
  withElementType(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto sum = readsInVectors(x, fullWidth<T>) ? sumSquares<T, fullWidth<T>> : sumSquares<T, 1>;
    sum(queue_, x, partial);
  });
  queue_.launch("squareSum", squareSumTotalKernel, dim3(ceilDiv(x.cols, totalThreads)), dim3(totalThreads), 0, partial, blocks,
                x.cols, sums);
}

}  // namespace lora_da::cuda
