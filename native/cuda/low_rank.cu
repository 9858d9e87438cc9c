#include "cuda/low_rank.h"
#include "cuda/row_grid.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int transposeThreads = 128;

template <class T, int width>
__global__ void __launch_bounds__(rowBlockThreads)
    layKernel(Rows<const T> x, int64_t filledRows, int64_t filledCols, Rows<T> y, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t col) {
    const bool filled = row < filledRows && col < filledCols;
    store<width>(y[row] + col, filled ? load<width>(x[row] + col) : Floats<width>{});
  });
}

// A thread makes `width` neighbours of a row of y from as many rows of x, in which neighbouring threads read neighbours: x^T from
// column firstCol on, zeros before and after it.
template <class T, int width>
__global__ void __launch_bounds__(transposeThreads)
    layTransposedKernel(Rows<const T> x, int64_t firstCol, int64_t filledCols, Rows<T> y, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * transposeThreads + threadIdx.x, col = int64_t{blockIdx.y} * width;
  if (row >= rows) return;
  Floats<width> values{};
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int64_t filled = col + i - firstCol;
    if (filled >= 0 && filled < filledCols) values.at[i] = load<1>(x[filled] + row).at[0];
  }
  store<width>(y[row] + col, values);
}

}  // namespace

void lay(Queue& queue, const Matrix& x, const Matrix& y) {
  withElementType(y.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int most = fullWidth<T>;
    const int width = readsInVectors(x, most) && readsInVectors(y, most) ? most : 1;
    const RowGrid shared = rowGrid(y.rows, y.cols / width);
    queue.launch("lay", width == most ? layKernel<T, most> : layKernel<T, 1>, shared.grid, shared.block, 0, rowsOf<const T>(x),
                 x.rows, x.cols, rowsOf<T>(y), y.rows, y.cols);
  });
}

namespace {

void layTransposed(Queue& queue, const Matrix& x, int64_t firstCol, const Matrix& y) {
  withElementType(y.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int most = fullWidth<T>;
    const int width = readsInVectors(y, most) ? most : 1;
    const dim3 grid(static_cast<unsigned>((y.rows + transposeThreads - 1) / transposeThreads),
                    static_cast<unsigned>(y.cols / width));
    queue.launch("layTransposed", width == most ? layTransposedKernel<T, most> : layTransposedKernel<T, 1>, grid,
                 dim3(transposeThreads), 0, rowsOf<const T>(x), firstCol, x.rows, rowsOf<T>(y), y.rows);
  });
}

}  // namespace

void layBlocks(Queue& queue, const UpProjection& up, const Matrix& y) {
  int64_t done = 0;
  const auto layTo = [&](int64_t end, int64_t firstCol, const Matrix& factors) {
    if (end > done) layTransposed(queue, factors, firstCol, y.rowRange(done, end - done));
    done = end;
  };
  for (size_t i = 0; i < up.blocks.size(); ++i) {
    const auto [first, count] = up.blocks[i];
    layTo(first, 0, up.factors.rowRange(0, 0));  // outputs without a term
    layTo(first + count, static_cast<int64_t>(i) * up.rank(), up.factors.columns(first, count));
  }
  layTo(y.rows, 0, up.factors.rowRange(0, 0));
}

}  // namespace lora_da::cuda
