// Elementwise passes over the initializations' matrices, contiguous arrays of float64 where not said otherwise.
// scale             x = x factor, x float32 or float64, the product in float64
// blend             a = alpha a + beta b
// addToDiagonal     a[i, i] += value
// scaledTranspose   y[j, i] = scale[i] x[i, j], x float32
// countNonFinite    how many elements of x, float32 or float64, are infinite or not a number
//
// Memory bounds them all. A thread moves 16 bytes at once where arrays are aligned to that, as all but a module's rows within the
// gradient of its group are; the last elements of an array, fewer than that, go one by one.
#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/cuda_device.h"
#include "cuda/dense_elementwise.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int threads = 256;
// Several waves of blocks on the largest GPUs; beyond them a thread takes more than one vector.
constexpr int64_t mostBlocks = 8192;
constexpr int64_t vectorBytes = 16;

template <class T, int width>
struct alignas(sizeof(T) * width) Vector {
  T at[width];
};

// Elements i .. i + width - 1, where i is a multiple of width. An index of vectors shows the compiler that they are aligned.
template <int width, class T>
__device__ inline Vector<T, width> load(const T* from, int64_t i) {
  return reinterpret_cast<const Vector<T, width>*>(from)[static_cast<uint64_t>(i) / width];
}

template <int width, class T>
__device__ inline void store(T* to, int64_t i, const Vector<T, width>& vector) {
  reinterpret_cast<Vector<T, width>*>(to)[static_cast<uint64_t>(i) / width] = vector;
}

// body(i, n) for elements i .. i + n - 1 of `count`, where n is a constant: `width`, but 1 for those after the last whole vector.
template <int width, class Body>
__device__ inline void overVectors(int64_t count, const Body& body) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads, vectors = count / width;
  for (int64_t i = thread; i < vectors; i += step) body(i * width, std::integral_constant<int, width>{});
  const int64_t rest = vectors * width + thread;
  if (rest < count) body(rest, std::integral_constant<int, 1>{});
}

template <class T, int width>
__global__ void __launch_bounds__(threads) scaleKernel(T* x, int64_t count, double factor) {
  overVectors<width>(count, [&](int64_t i, auto n) {
    auto vector = load<n>(x, i);
#pragma unroll
    for (T& value : vector.at) value = static_cast<T>(static_cast<double>(value) * factor);
    store(x, i, vector);
  });
}

template <int width>
__global__ void __launch_bounds__(threads) blendKernel(double* a, double alpha, const double* b, double beta, int64_t count) {
  overVectors<width>(count, [&](int64_t i, auto n) {
    auto vector = load<n>(a, i);
    const auto other = load<n>(b, i);
#pragma unroll
    for (int e = 0; e < decltype(n)::value; ++e) vector.at[e] = alpha * vector.at[e] + beta * other.at[e];
    store(a, i, vector);
  });
}

__global__ void __launch_bounds__(threads) addToDiagonalKernel(double* a, int64_t n, double value) {
  overVectors<1>(n, [&](int64_t i, auto) { a[i * n + i] += value; });
}

// A good matrix adds nothing to `total`. Sums of integers do not depend on their order.
template <class T, int width>
__global__ void __launch_bounds__(threads) countNonFiniteKernel(const T* x, int64_t count, unsigned long long* total) {
  unsigned long long bad = 0;
  overVectors<width>(count, [&](int64_t i, auto n) {
    const auto vector = load<n>(x, i);
#pragma unroll
    for (const T value : vector.at) bad += isfinite(value) ? 0 : 1;
  });
  if (bad > 0) atomicAdd(total, bad);
}

// A block transposes a tile of x. Its rows are an odd number of floats apart in shared memory, so that the elements of a column
// lie in different banks.
constexpr int tileSide = 64;
constexpr int tilePitch = tileSide + 1;

// Calls body(line, element) for the first of each `width` elements of the tile's lines that falls to this thread.
template <int width, class Body>
__device__ inline void overTile(const Body& body) {
  constexpr int threadsPerLine = tileSide / width, linesAtOnce = threads / threadsPerLine;
  const int thread = static_cast<int>(threadIdx.x), element = thread % threadsPerLine * width;
#pragma unroll
  for (int first = 0; first < tileSide; first += linesAtOnce) body(first + thread / threadsPerLine, element);
}

template <int readWidth, int writeWidth>
__global__ void __launch_bounds__(threads) scaledTransposeKernel(const float* __restrict__ x, int64_t rows, int64_t cols,
                                                                 const double* __restrict__ scale, double* __restrict__ y) {
  auto* tile = sharedMemory<float>();  // [tileSide, tilePitch]
  const int64_t firstRow = static_cast<int64_t>(blockIdx.y) * tileSide, firstColumn = static_cast<int64_t>(blockIdx.x) * tileSide;
  overTile<readWidth>([&](int row, int column) {
    if (firstRow + row >= rows || firstColumn + column >= cols) return;
    const auto vector = load<readWidth>(x, (firstRow + row) * cols + firstColumn + column);
#pragma unroll
    for (int e = 0; e < readWidth; ++e) tile[row * tilePitch + column + e] = vector.at[e];
  });
  __syncthreads();
  overTile<writeWidth>([&](int column, int row) {
    if (firstRow + row >= rows || firstColumn + column >= cols) return;
    Vector<double, writeWidth> vector;
#pragma unroll
    for (int e = 0; e < writeWidth; ++e)
      vector.at[e] = scale[firstRow + row + e] * static_cast<double>(tile[(row + e) * tilePitch + column]);
    store(y, (firstColumn + column) * rows + firstRow + row, vector);
  });
}

unsigned blocksFor(int64_t count, int width) {
  const int64_t elements = static_cast<int64_t>(threads) * width;
  return static_cast<unsigned>(std::min(mostBlocks, (count + elements - 1) / elements));
}

// call(elements, width) with x's first element and, as a compile-time constant, how many are moved at once.
template <class Call>
void withElements(const char* operation, const Matrix& x, const Call& call) {
  const auto byAlignment = [&](auto* elements) {
    constexpr int wide = fullWidth<std::remove_pointer_t<decltype(elements)>>;
    if (isAligned(elements, vectorBytes)) return call(elements, std::integral_constant<int, wide>{});
    return call(elements, std::integral_constant<int, 1>{});
  };
  if (x.dtype == DType::f64) return byAlignment(x.as<double>());
  if (x.dtype == DType::f32) return byAlignment(x.as<float>());
  throw Error(code::internal, std::string(operation) + " takes float32 and float64, not " + nameOf(x.dtype));
}

}  // namespace

void CudaDevice::scale(const Matrix& x, double factor) {
  const int64_t count = x.rows * x.cols;
  withElements("scale", x, [&](auto* elements, auto width) {
    using T = std::remove_pointer_t<decltype(elements)>;
    queue_.launch("scale", scaleKernel<T, width>, blocksFor(count, width), threads, 0, elements, count, factor);
  });
}

void CudaDevice::blend(double* a, double alpha, const double* b, double beta, int64_t count) {
  const bool wide = isAligned(a, vectorBytes) && isAligned(b, vectorBytes);
  constexpr int width = fullWidth<double>;
  queue_.launch("blend", wide ? blendKernel<width> : blendKernel<1>, blocksFor(count, wide ? width : 1), threads, 0, a, alpha, b,
                beta, count);
}

void addToDiagonal(Queue& queue, double* a, int64_t n, double value) {
  queue.launch("addToDiagonal", addToDiagonalKernel, blocksFor(n, 1), threads, 0, a, n, value);
}

void CudaDevice::addToDiagonal(double* a, int64_t n, double value) {
  cuda::addToDiagonal(queue_, a, n, value);
}

void CudaDevice::scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) {
  constexpr int readWidth = fullWidth<float>, writeWidth = fullWidth<double>;
  const bool wideReads = isAligned(x, vectorBytes) && cols % readWidth == 0;
  const bool wideWrites = isAligned(y, vectorBytes) && rows % writeWidth == 0;
  const auto kernel = wideReads
                          ? (wideWrites ? scaledTransposeKernel<readWidth, writeWidth> : scaledTransposeKernel<readWidth, 1>)
                          : (wideWrites ? scaledTransposeKernel<1, writeWidth> : scaledTransposeKernel<1, 1>);
  const auto tiles = [](int64_t count) { return static_cast<unsigned>((count + tileSide - 1) / tileSide); };
  queue_.launch("scaledTranspose", kernel, dim3(tiles(cols), tiles(rows)), threads, tileSide * tilePitch * sizeof(float), x, rows,
                cols, scale, y);
}

int64_t CudaDevice::countNonFinite(const Matrix& x) {
  const int64_t count = x.rows * x.cols;
  auto* total = static_cast<unsigned long long*>(scratch(sizeof(unsigned long long)));
  queue_.fill(total, 0, sizeof *total);
  withElements("countNonFinite", x, [&](auto* elements, auto width) {
    using T = std::remove_pointer_t<decltype(elements)>;
    queue_.launch("countNonFinite", countNonFiniteKernel<T, width>, blocksFor(count, width), threads, 0, elements, count, total);
  });
  unsigned long long bad = 0;
  download(&bad, total, sizeof bad);
  synchronize();
  return static_cast<int64_t>(bad);
}

}  // namespace lora_da::cuda
