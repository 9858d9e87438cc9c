// Rows moved by index, cut and converted: embed, gatherRows, scatterAddRows, convert.
#include "cuda/cuda_device.h"
#include "cuda/cuda_weight.h"
#include "cuda/row_grid.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int floatWidth = fullWidth<float>;

template <class T, int width>
__global__ void __launch_bounds__(rowBlockThreads)
    embedKernel(Rows<const T> table, const int32_t* ids, float scale, Rows<float> x, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t column) {
    Floats<width> v = load<width>(table[ids[row]] + column);
#pragma unroll
    for (int e = 0; e < width; ++e) v.at[e] *= scale;
    store<width>(x[row] + column, v);
  });
}

// Bits are copied whatever they mean; `index` null: row i is x's row i.
template <class Word>
__global__ void __launch_bounds__(rowBlockThreads)
    copyRowsKernel(Rows<const Word> x, const int32_t* index, Rows<Word> y, int64_t rows, int64_t words) {
  overMatrix<1>(rows, words, [&](int64_t row, int64_t word) {
    const int64_t source = index ? index[row] : row;
    y[row][word] = source < 0 ? Word{} : __ldg(x[source] + word);
  });
}

template <int width>
__global__ void __launch_bounds__(rowBlockThreads)
    scatterAddRowsKernel(Rows<const float> x, const int32_t* index, Rows<float> y, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t column) {
    const int64_t target = index[row];
    if (target < 0) return;
    const Floats<width> v = load<width>(x[row] + column);
    Floats<width> sum = load<width>(y[target] + column);
#pragma unroll
    for (int e = 0; e < width; ++e) sum.at[e] += v.at[e];
    store<width>(y[target] + column, sum);
  });
}

template <class From, class To, int width>
__global__ void __launch_bounds__(rowBlockThreads) convertKernel(Rows<const From> x, Rows<To> y, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols,
                    [&](int64_t row, int64_t column) { store<width>(y[row] + column, load<width>(x[row] + column)); });
}

template <class Word>
bool splitsIntoWords(const Matrix& matrix) {
  const int64_t size = static_cast<int64_t>(sizeOf(matrix.dtype)), word = sizeof(Word);
  return matrix.cols * size % word == 0 && matrix.stride * size % word == 0 && isAligned(matrix.data, word);
}

// y = rows of x, in the widest words that both split into. True where Word is not too wide.
template <class Word>
bool copyRowsAs(Queue& queue, const char* name, const Matrix& x, const int32_t* index, const Matrix& y) {
  if (!splitsIntoWords<Word>(x) || !splitsIntoWords<Word>(y)) return false;
  const int64_t size = static_cast<int64_t>(sizeOf(y.dtype)), word = sizeof(Word);
  const int64_t words = y.cols * size / word;
  const RowGrid shared = rowGrid(y.rows, words);
  queue.launch(name, copyRowsKernel<Word>, shared.grid, shared.block, 0,
               Rows<const Word>{x.as<const Word>(), x.stride * size / word}, index,
               Rows<Word>{y.as<Word>(), y.stride * size / word}, y.rows, words);
  return true;
}

void copyRows(Queue& queue, const char* name, const Matrix& x, const int32_t* index, const Matrix& y) {
  copyRowsAs<uint4>(queue, name, x, index, y) || copyRowsAs<uint2>(queue, name, x, index, y) ||
      copyRowsAs<uint32_t>(queue, name, x, index, y) || copyRowsAs<uint16_t>(queue, name, x, index, y);
}

// A matrix without gaps as one row, so that its vectors need not end with its rows.
Matrix flattened(const Matrix& matrix) {
  return {matrix.data, matrix.dtype, 1, matrix.rows * matrix.cols, matrix.rows * matrix.cols};
}

template <class From, class To>
void convertBetween(Queue& queue, const Matrix& x, const Matrix& y) {
  const bool inVectors = readsInVectors(x, floatWidth) && readsInVectors(y, floatWidth);
  const RowGrid shared = rowGrid(x.rows, inVectors ? x.cols / floatWidth : x.cols);
  queue.launch("convert", inVectors ? convertKernel<From, To, floatWidth> : convertKernel<From, To, 1>, shared.grid, shared.block,
               0, rowsOf<const From>(x), rowsOf<To>(y), x.rows, x.cols);
}

}  // namespace

void CudaDevice::embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) {
  const Matrix weight = static_cast<const CudaWeight&>(table).view();
  withElementType(weight.dtype, [&](auto element) {
    using T = decltype(element);
    const bool inVectors = readsInVectors(weight, floatWidth) && readsInVectors(x, floatWidth);
    const RowGrid shared = rowGrid(x.rows, inVectors ? x.cols / floatWidth : x.cols);
    queue_.launch("embed", inVectors ? embedKernel<T, floatWidth> : embedKernel<T, 1>, shared.grid, shared.block, 0,
                  rowsOf<const T>(weight), ids, scale, rowsOf<float>(x), x.rows, x.cols);
  });
}

void CudaDevice::gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  copyRows(queue_, "gatherRows", x, index, y);
}

void CudaDevice::scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  const bool inVectors = readsInVectors(x, floatWidth) && readsInVectors(y, floatWidth);
  const RowGrid shared = rowGrid(x.rows, inVectors ? x.cols / floatWidth : x.cols);
  queue_.launch("scatterAddRows", inVectors ? scatterAddRowsKernel<floatWidth> : scatterAddRowsKernel<1>, shared.grid,
                shared.block, 0, rowsOf<const float>(x), index, rowsOf<float>(y), x.rows, x.cols);
}

void CudaDevice::convert(const Matrix& x, const Matrix& y) {
  if (x.rows > 1 && x.stride == x.cols && y.stride == y.cols) return convert(flattened(x), flattened(y));
  if (x.dtype == y.dtype) return copyRows(queue_, "convert", x, nullptr, y);
  if (x.dtype == DType::f32 && y.dtype == DType::bf16) return convertBetween<float, Bf16>(queue_, x, y);
  if (x.dtype == DType::bf16 && y.dtype == DType::f32) return convertBetween<Bf16, float>(queue_, x, y);
  throw Error(code::internal, std::string("cannot convert ") + nameOf(x.dtype) + " to " + nameOf(y.dtype));
}

}  // namespace lora_da::cuda
