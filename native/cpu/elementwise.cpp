// Elementwise operations of the CPU device: rows are shared among the threads, each row is one call of a kernel.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "cpu/cache_lines.h"
#include "cpu/cpu_device.h"
#include "cpu/cpu_weight.h"

namespace lora_da::cpu {

namespace {

float* floatRow(const Matrix& m, int64_t i) {
  return m.as<float>() + i * m.stride;
}

// Asks the second-level cache for a row that is worked on soon: prefetchers begin anew with every short row.
constexpr int64_t rowsAhead = 4;
void askForRow(const Matrix& m, int64_t i) {
  askFor(m.at(i), m.cols * static_cast<int64_t>(sizeOf(m.dtype)));
}

// body(i) for each row, split evenly and in order among the threads.
template <class Body>
void overRows(int64_t rows, int threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
  for (int64_t i = 0; i < rows; ++i) body(i);
}

// An operation's type is that of its matrices: a bfloat16 device also has float32 ones.
const TypedKernels& of(const Kernels& kernels, DType type) {
  if (type == DType::f32) return kernels.f32;
  if (type == DType::bf16) return kernels.bf16;
  throw Error(code::internal, std::string("elementwise operations take float32 and bfloat16, not ") + nameOf(type));
}

void requireHeadDim(int32_t headDim, int64_t pairs) {
  if (headDim < 1 || headDim > maxHeadDim || 2 * pairs > headDim) {
    throw Error(code::invalidArgument, "Expected a head dimension from 1 to " + std::to_string(maxHeadDim) + " that holds 2 * " +
                                           std::to_string(pairs) + " rotary elements but received " + std::to_string(headDim));
  }
}

}  // namespace

void CpuDevice::squareSum(const Matrix& x, double* sums) {
  const auto squareSum = of(kernels_, x.dtype).squareSum;
  // Columns are shared, not rows: a column's sum has one order for any number of threads. Shares are whole cache lines.
  const int64_t lines = (x.cols + 31) / 32;
  overRows(threads_, threads_, [&](int64_t share) {
    const int64_t first = lines * share / threads_ * 32;
    const int64_t next = lines * (share + 1) / threads_ * 32;
    const int64_t count = (next < x.cols ? next : x.cols) - first;
    if (count > 0) squareSum(x.columns(first, count).data, x.rows, count, x.stride, sums + first);
  });
}

void CpuDevice::embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) {
  const auto& weight = static_cast<const CpuWeight&>(table);
  if (!weight.panels.data && weight.parts.size() != 1) {
    throw Error(code::internal, "embed needs a weight that was prepared for lookup");
  }
  const auto scaleRow = kernels_.scaleRow;
  overRows(x.rows, threads_, [&](int64_t i) {
    readWeightRow(weight, ids[i], floatRow(x, i));
    if (scale != 1.0f) scaleRow(scale, floatRow(x, i), x.cols);
  });
}

void CpuDevice::rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd, const Matrix* kept) {
  const auto rmsNorm = of(kernels_, y.dtype).rmsNorm;
  overRows(x.rows, threads_,
           [&](int64_t i) { rstd[i] = rmsNorm(floatRow(x, i), weight, epsilon, y.at(i), kept ? kept->at(i) : nullptr, x.cols); });
}

void CpuDevice::rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) {
  const auto rmsNormApply = of(kernels_, y.dtype).rmsNormApply;
  overRows(x.rows, threads_, [&](int64_t i) { rmsNormApply(x.at(i), rstd[i], weight, y.at(i), x.cols); });
}

void CpuDevice::rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                            const Matrix* rounded) {
  const auto rmsNormGrad = of(kernels_, x.dtype).rmsNormGrad;
  overRows(x.rows, threads_, [&](int64_t i) {
    rmsNormGrad(x.at(i), rstd[i], weight, floatRow(dy, i), floatRow(dx, i), rounded ? rounded->at(i) : nullptr, x.cols);
  });
}

void CpuDevice::rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                     const int32_t* positions, const Matrix& out, float* rstd) {
  requireHeadDim(headDim, rotary.pairs);
  const auto rope = of(kernels_, in.dtype).rope;
  overRows(in.rows, threads_, [&](int64_t i) {
    const int64_t at = positions[i] * rotary.pairs;
    askForRow(in, i + rowsAhead);
    rope(in.at(i), heads, headDim, norm.weight, norm.epsilon, rotary.cos + at, rotary.sin + at, rotary.pairs, out.at(i),
         norm.weight ? rstd + i * heads : nullptr);
  });
}

void CpuDevice::ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm,
                         const Rotary& rotary, const int32_t* positions, const float* rstd) {
  requireHeadDim(headDim, rotary.pairs);
  const auto ropeGrad = of(kernels_, d.dtype).ropeGrad;
  overRows(d.rows, threads_, [&](int64_t i) {
    const int64_t at = positions[i] * rotary.pairs;
    askForRow(d, i + rowsAhead);
    ropeGrad(d.at(i), norm.weight ? in.at(i) : nullptr, heads, headDim, norm.weight, rotary.cos + at, rotary.sin + at,
             rotary.pairs, norm.weight ? rstd + i * heads : nullptr);
  });
}

void CpuDevice::gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) {
  const auto gatedMlp = of(kernels_, h.dtype).gatedMlp;
  const Matrix up = gateUp.columns(h.cols, h.cols);
  overRows(h.rows, threads_, [&](int64_t i) { gatedMlp(gateUp.at(i), up.at(i), activation, h.at(i), h.cols); });
}

void CpuDevice::gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) {
  const auto gatedMlpGrad = of(kernels_, dh.dtype).gatedMlpGrad;
  const Matrix up = gateUp.columns(dh.cols, dh.cols);
  overRows(dh.rows, threads_, [&](int64_t i) { gatedMlpGrad(gateUp.at(i), up.at(i), activation, dh.at(i), h.at(i), dh.cols); });
}

void CpuDevice::gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  const size_t bytes = static_cast<size_t>(y.cols) * sizeOf(y.dtype);
  overRows(y.rows, threads_, [&](int64_t i) {
    if (index[i] < 0)
      std::memset(y.at(i), 0, bytes);
    else
      std::memcpy(y.at(i), x.at(index[i]), bytes);
  });
}

void CpuDevice::scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  const auto addRow = kernels_.addRow;
  overRows(x.rows, threads_, [&](int64_t i) {
    if (index[i] >= 0) addRow(floatRow(x, i), floatRow(y, index[i]), x.cols);
  });
}

void CpuDevice::convert(const Matrix& x, const Matrix& y) {
  if (x.dtype == y.dtype) {
    overRows(x.rows, threads_, [&](int64_t i) { std::memcpy(y.at(i), x.at(i), static_cast<size_t>(x.cols) * sizeOf(x.dtype)); });
  } else if (x.dtype == DType::f32) {
    const auto fromFloat = of(kernels_, y.dtype).fromFloat;
    overRows(x.rows, threads_, [&](int64_t i) { fromFloat(floatRow(x, i), y.at(i), x.cols); });
  } else if (y.dtype == DType::f32) {
    const auto toFloat = of(kernels_, x.dtype).toFloat;
    overRows(x.rows, threads_, [&](int64_t i) { toFloat(x.at(i), floatRow(y, i), x.cols); });
  } else {
    throw Error(code::internal, std::string("cannot convert ") + nameOf(x.dtype) + " to " + nameOf(y.dtype));
  }
}

}  // namespace lora_da::cpu
