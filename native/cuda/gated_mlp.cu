// Gated MLP: gateUp [T, 2I] holds gate and up side by side.
// forward:   h = a(gate) up
// backward:  in place, gate = dh up a'(gate), up = dh a(gate); and h again
// Each activation is a(x) = x w(x) with a weight w in [0, 1]: of silu the sigmoid s(x), of gelu the normal distribution function,
// of its tanh form 0.5 (1 + tanh u) = s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), so that nothing cancels for large negative x.
#include "cuda/cuda_device.h"
#include "cuda/row_grid.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

// What bfloat16 rounds away is not computed: the fast exponential and quotient are good to about 1e-5.
template <class T>
__device__ inline float sigmoid(float x) {
  if constexpr (std::is_same_v<T, Bf16>)
    return __fdividef(1.0f, 1.0f + __expf(-x));
  else
    return 1.0f / (1.0f + expf(-x));
}

// slope(x, w) is a'(x) = w + x w'(x).
struct Silu {
  template <class T>
  __device__ static float weight(float x) {
    return sigmoid<T>(x);
  }
  __device__ static float slope(float x, float w) { return w * (1.0f + x * (1.0f - w)); }
};

struct GeluTanh {
  static constexpr float twiceRoot = 1.5957691216f;  // 2 sqrt(2/pi)
  static constexpr float cubic = 0.044715f;
  template <class T>
  __device__ static float weight(float x) {
    return sigmoid<T>(twiceRoot * x * fmaf(cubic * x, x, 1.0f));
  }
  __device__ static float slope(float x, float w) { return w + x * w * (1.0f - w) * (twiceRoot * (1.0f + 3.0f * cubic * x * x)); }
};

struct Gelu {
  template <class T>
  __device__ static float weight(float x) {
    return 0.5f * erfcf(-0.70710678f * x);
  }
  __device__ static float slope(float x, float w) { return w + x * (0.39894228f * expf(-0.5f * x * x)); }
};

template <class T, class A, int width>
__global__ void __launch_bounds__(rowBlockThreads) gatedMlpKernel(Rows<const T> gateUp, Rows<T> h, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t column) {
    const T* gate = gateUp[row] + column;
    const Floats<width> x = load<width>(gate), up = load<width>(gate + cols);
    Floats<width> product;
#pragma unroll
    for (int e = 0; e < width; ++e) product.at[e] = x.at[e] * A::template weight<T>(x.at[e]) * up.at[e];
    store<width>(h[row] + column, product);
  });
}

template <class T, class A, int width>
__global__ void __launch_bounds__(rowBlockThreads)
    gatedMlpGradKernel(Rows<T> gateUp, Rows<const T> dh, Rows<T> h, int64_t rows, int64_t cols) {
  overMatrix<width>(rows, cols, [&](int64_t row, int64_t column) {
    T* gate = gateUp[row] + column;
    const Floats<width> x = load<width>(gate), up = load<width>(gate + cols), d = load<width>(dh[row] + column);
    Floats<width> gateGrad, upGrad, product;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float weight = A::template weight<T>(x.at[e]), value = x.at[e] * weight;
      gateGrad.at[e] = d.at[e] * up.at[e] * A::slope(x.at[e], weight);
      upGrad.at[e] = d.at[e] * value;
      product.at[e] = value * up.at[e];
    }
    store<width>(gate, gateGrad);
    store<width>(gate + cols, upGrad);
    store<width>(h[row] + column, product);
  });
}

// call(function) with the activation as a type.
template <class Call>
void withActivation(Activation activation, const Call& call) {
  switch (activation) {
    case Activation::silu: return call(Silu{});
    case Activation::geluTanh: return call(GeluTanh{});
    case Activation::gelu: return call(Gelu{});
  }
}

// Whether gate and up, which begins after h.cols columns, both split into vectors.
bool halvesReadInVectors(const Matrix& gateUp, const Matrix& h, int width) {
  return readsInVectors(gateUp.columns(0, h.cols), width) && readsInVectors(h, width);
}

}  // namespace

void CudaDevice::gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) {
  withElementType(h.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int wide = fullWidth<T>;
    const bool inVectors = halvesReadInVectors(gateUp, h, wide);
    const RowGrid shared = rowGrid(h.rows, inVectors ? h.cols / wide : h.cols);
    withActivation(activation, [&](auto function) {
      using A = decltype(function);
      queue_.launch("gatedMlp", inVectors ? gatedMlpKernel<T, A, wide> : gatedMlpKernel<T, A, 1>, shared.grid, shared.block, 0,
                    rowsOf<const T>(gateUp), rowsOf<T>(h), h.rows, h.cols);
    });
  });
}

void CudaDevice::gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) {
  withElementType(h.dtype, [&](auto element) {
    using T = decltype(element);
    withActivation(activation, [&](auto function) {
      using A = decltype(function);
      constexpr int wide = std::is_same_v<A, Gelu> ? 4 : fullWidth<T>;  // erfcf's own values leave no registers for eight
      const bool inVectors = halvesReadInVectors(gateUp, h, wide) && readsInVectors(dh, wide);
      const RowGrid shared = rowGrid(h.rows, inVectors ? h.cols / wide : h.cols);
      queue_.launch("gatedMlpGrad", inVectors ? gatedMlpGradKernel<T, A, wide> : gatedMlpGradKernel<T, A, 1>, shared.grid,
                    shared.block, 0, rowsOf<T>(gateUp), rowsOf<const T>(dh), rowsOf<T>(h), h.rows, h.cols);
    });
  });
}

}  // namespace lora_da::cuda
