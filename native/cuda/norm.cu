// RMSNorm of rows x [T, H] (Zhang & Sennrich 2019), its weight [H] float32 and frozen.
// forward:   y = x rstd weight,  rstd = 1/sqrt(mean(x^2) + epsilon), kept for backward
// backward:  with n = x rstd and g = dy weight: dx += rstd (g - n mean(g n))
//
// A row is a warp's or a block's, by its width. Four elements at a time are 16 bytes of the float32 matrices. Rows of up to 8192
// are read whole before the sum, so that memory is waited for once, and stay in registers.
#include "cuda/cuda_device.h"
#include "cuda/reduction.h"
#include "cuda/row_grid.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int normWidth = fullWidth<float>;

// A row's members are `team` threads; each has at most `vectors` vectors of `width` elements, or any number where it is 0.
template <int width_, int team_, int vectors_>
struct RowShape {
  static constexpr int width = width_;
  static constexpr int team = team_;
  static constexpr int vectors = vectors_;
  static constexpr int threads = team == warpThreads ? 256 : team;
  static constexpr int rowsPerBlock = threads / team;
  static constexpr size_t sharedBytes = team == warpThreads ? 0 : team / warpThreads * sizeof(float);
  // What a thread keeps of one matrix's row.
  template <class T>
  using Kept = TwiceRead<T, width, (vectors > 0)>[vectors > 0 ? vectors : 1];

  static unsigned blocks(int64_t rows) { return static_cast<unsigned>((rows + rowsPerBlock - 1) / rowsPerBlock); }

  __device__ static int64_t row() { return int64_t{blockIdx.x} * rowsPerBlock + threadIdx.x / team; }
  __device__ static bool leads() { return threadIdx.x % team == 0; }
  // body(first column, place in Kept) for each of the member's vectors.
  template <class Body>
  __device__ static void overRow(int64_t cols, const Body& body) {
    const int64_t member = threadIdx.x % team;
    if constexpr (vectors == 0) {
#pragma unroll 1
      for (int64_t column = member * width; column < cols; column += team * width) body(column, 0);
    } else {
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        const int64_t column = (i * team + member) * width;
        if (column < cols) body(column, i);
      }
    }
  }
  __device__ static float sum(float value) {
    if constexpr (team == warpThreads)
      return sumOfLanes(value);
    else
      return sumOfBlock<team>(value, sharedMemory<float>());
  }
};

// call(shape) with the narrowest shape that holds a row.
template <class Call>
void withRowShape(int64_t cols, bool inVectors, const Call& call) {
  if (!inVectors) return call(RowShape<1, 256, 0>{});
  if (cols <= 256) return call(RowShape<normWidth, warpThreads, 2>{});
  if (cols <= 512) return call(RowShape<normWidth, warpThreads, 4>{});
  if (cols <= 1024) return call(RowShape<normWidth, 128, 2>{});
  if (cols <= 2048) return call(RowShape<normWidth, 256, 2>{});
  if (cols <= 4096) return call(RowShape<normWidth, 256, 4>{});
  if (cols <= 8192) return call(RowShape<normWidth, 512, 4>{});
  return call(RowShape<normWidth, 512, 0>{});
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads)
    rmsNormKernel(Rows<const float> x, const float* weight, float epsilon, Rows<T> y, float* rstd, Rows<T> kept, int64_t rows,
                  int64_t cols) {
  constexpr int width = Shape::width;
  const int64_t row = Shape::row();
  if (row >= rows) return;
  typename Shape::template Kept<const float> input;
  float squares = 0;
  Shape::overRow(cols, [&](int64_t column, int i) {
    const Floats<width> v = input[i].first(x[row] + column);
    for (int e = 0; e < width; ++e) squares += v.at[e] * v.at[e];
  });
  const float scale = 1.0f / sqrtf(Shape::sum(squares) / static_cast<float>(cols) + epsilon);
  if (Shape::leads()) rstd[row] = scale;
  Shape::overRow(cols, [&](int64_t column, int i) {
    const Floats<width> v = input[i].again(x[row] + column);
    if (kept.data) store<width>(kept[row] + column, v);
    Floats<width> scaled = load<width>(weight + column);
    for (int e = 0; e < width; ++e) scaled.at[e] *= v.at[e] * scale;
    store<width>(y[row] + column, scaled);
  });
}

// Threads of rmsNormGradKernel that a multiprocessor is to hold: their rows in registers leave room for no more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int residentThreads = 768;
#else
constexpr int residentThreads = 1024;
#endif

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads, residentThreads / Shape::threads)
    rmsNormGradKernel(Rows<const T> x, const float* rstd, const float* weight, Rows<const float> dy, Rows<float> dx,
                      Rows<T> rounded, int64_t rows, int64_t cols) {
  constexpr int width = Shape::width;
  const int64_t row = Shape::row();
  if (row >= rows) return;
  typename Shape::template Kept<const T> input;
  typename Shape::template Kept<const float> gradient;
  typename Shape::template Kept<float> total;
  float products = 0;
  Shape::overRow(cols, [&](int64_t column, int i) {
    const Floats<width> v = input[i].first(x[row] + column), d = gradient[i].first(dy[row] + column);
    const Floats<width> w = load<width>(weight + column);
    for (int e = 0; e < width; ++e) products += v.at[e] * (d.at[e] * w.at[e]);
    total[i].first(dx[row] + column);
  });
  const float scale = rstd[row];
  const float slope = Shape::sum(products) / static_cast<float>(cols) * scale * scale;
  Shape::overRow(cols, [&](int64_t column, int i) {
    const Floats<width> v = input[i].again(x[row] + column), d = gradient[i].again(dy[row] + column);
    const Floats<width> w = load<width>(weight + column);
    Floats<width> sum = total[i].again(dx[row] + column);
    for (int e = 0; e < width; ++e) sum.at[e] += scale * (d.at[e] * w.at[e] - slope * v.at[e]);
    store<width>(dx[row] + column, sum);
    if (rounded.data) store<width>(rounded[row] + column, sum);
  });
}

template <class T, int width>
__global__ void __launch_bounds__(rowBlockThreads)
    rmsNormApplyKernel(Rows<const T> x, const float* rstd, const float* weight, Rows<T> y, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t column) {
    const Floats<width> v = load<width>(x[row] + column);
    const float scale = rstd[row];
    Floats<width> scaled = load<width>(weight + column);
    for (int e = 0; e < width; ++e) scaled.at[e] *= v.at[e] * scale;
    store<width>(y[row] + column, scaled);
  });
}

}  // namespace

void CudaDevice::rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd, const Matrix* kept) {
  const bool inVectors =
      readsInVectors(x, normWidth) && readsInVectors(y, normWidth) && readsInVectors(kept, normWidth) && isAligned(weight, 16);
  withElementType(y.dtype, [&](auto element) {
    using T = decltype(element);
    withRowShape(x.cols, inVectors, [&](auto shape) {
      using Shape = decltype(shape);
      queue_.launch("rmsNorm", rmsNormKernel<T, Shape>, Shape::blocks(x.rows), Shape::threads, Shape::sharedBytes,
                    rowsOf<const float>(x), weight, epsilon, rowsOf<T>(y), rstd, rowsOf<T>(kept), x.rows, x.cols);
    });
  });
}

void CudaDevice::rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) {
  withElementType(y.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int wide = fullWidth<T>;
    const bool inVectors = readsInVectors(x, wide) && readsInVectors(y, wide) && isAligned(weight, 16);
    const RowGrid shared = rowGrid(x.rows, inVectors ? x.cols / wide : x.cols);
    queue_.launch("rmsNormApply", inVectors ? rmsNormApplyKernel<T, wide> : rmsNormApplyKernel<T, 1>, shared.grid, shared.block,
                  0, rowsOf<const T>(x), rstd, weight, rowsOf<T>(y), x.rows, x.cols);
  });
}

void CudaDevice::rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                             const Matrix* rounded) {
  const bool inVectors = readsInVectors(x, normWidth) && readsInVectors(dy, normWidth) && readsInVectors(dx, normWidth) &&
                         readsInVectors(rounded, normWidth) && isAligned(weight, 16);
  withElementType(x.dtype, [&](auto element) {
    using T = decltype(element);
    withRowShape(x.cols, inVectors, [&](auto shape) {
      using Shape = decltype(shape);
      queue_.launch("rmsNormGrad", rmsNormGradKernel<T, Shape>, Shape::blocks(x.rows), Shape::threads, Shape::sharedBytes,
                    rowsOf<const T>(x), rstd, weight, rowsOf<const float>(dy), rowsOf<float>(dx), rowsOf<T>(rounded), x.rows,
                    x.cols);
    });
  });
}

}  // namespace lora_da::cuda
