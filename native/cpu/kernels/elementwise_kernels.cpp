// Rows of the elementwise operations, forward and backward. See kernels.h for the shapes, device.h for the operations.
// Rows are read in the compute type T, computed in float32 and rounded once on the way out.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

float reciprocalRoot(double sumOfSquares, int64_t width, float epsilon) {
  return static_cast<float>(1.0 / __builtin_sqrt(sumOfSquares / static_cast<double>(width) + static_cast<double>(epsilon)));
}

// --- RMSNorm ---

// y = x * rstd * weight
template <class T>
void rmsNormApply(const void* x, float rstd, const float* weight, void* y, int64_t width) {
  const T* in = static_cast<const T*>(x);
  T* out = static_cast<T*>(y);
  overVectors(width, [&](int64_t i, auto part) { store(out + i, load(in + i, part) * rstd * load(weight + i, part), part); });
}

template <class T>
float rmsNorm(const float* x, const float* weight, float epsilon, void* y, void* kept, int64_t width) {
  Vec squares{};
  overVectors(width, [&](int64_t i, auto part) {
    const Vec v = load(x + i, part);
    squares += v * v;
  });
  const float rstd = reciprocalRoot(sumOfLanesDouble(squares), width, epsilon);
  T* out = static_cast<T*>(y);
  T* copy = static_cast<T*>(kept);
  overVectors(width, [&](int64_t i, auto part) {
    const Vec v = load(x + i, part);
    store(out + i, v * rstd * load(weight + i, part), part);
    if (copy) store(copy + i, v, part);
  });
  return rstd;
}

// With n = x rstd and g = dy weight: dx += rstd (g - n mean(g n)).
template <class T>
void rmsNormGrad(const void* input, float rstd, const float* weight, const float* dy, float* dx, void* rounded, int64_t width) {
  const T* x = static_cast<const T*>(input);
  T* copy = static_cast<T*>(rounded);
  Vec products{};
  overVectors(width,
              [&](int64_t i, auto part) { products += load(x + i, part) * (load(dy + i, part) * load(weight + i, part)); });
  const double mean = sumOfLanesDouble(products) / static_cast<double>(width);
  const float slope = static_cast<float>(mean * rstd * rstd);
  overVectors(width, [&](int64_t i, auto part) {
    const Vec g = load(dy + i, part) * load(weight + i, part);
    const Vec sum = load(dx + i, part) + rstd * (g - slope * load(x + i, part));
    store(dx + i, sum, part);
    if (copy) store(copy + i, sum, part);
  });
}

// --- rotary position embedding: pairs (i, i + pairs), as Hugging Face's rotate_half ---

// normalized(i, part) gives elements [i, ...) of the head before the rotation.
template <class T, class Load>
KERNEL_INLINE void rotateHead(const Load& normalized, const float* cos, const float* sin, int64_t pairs, int32_t headDim,
                              T* out) {
  overVectors(pairs, [&](int64_t i, auto part) {
    const Vec a = normalized(i, part), b = normalized(i + pairs, part);
    const Vec c = load(cos + i, part), s = load(sin + i, part);
    store(out + i, a * c - b * s, part);
    store(out + i + pairs, b * c + a * s, part);
  });
  overVectors(headDim - 2 * pairs,
              [&](int64_t i, auto part) { store(out + 2 * pairs + i, normalized(2 * pairs + i, part), part); });
}

template <class T>
void rope(const void* in, int32_t heads, int32_t headDim, const float* normWeight, float epsilon, const float* cos,
          const float* sin, int64_t pairs, void* out, float* rstd) {
  for (int32_t h = 0; h < heads; ++h) {
    const T* x = static_cast<const T*>(in) + static_cast<int64_t>(h) * headDim;
    T* y = static_cast<T*>(out) + static_cast<int64_t>(h) * headDim;
    if (!normWeight) {
      rotateHead([&](int64_t i, auto part) { return load(x + i, part); }, cos, sin, pairs, headDim, y);
      continue;
    }
    Vec squares{};
    overVectors(headDim, [&](int64_t i, auto part) {
      const Vec v = load(x + i, part);
      squares += v * v;
    });
    const float r = reciprocalRoot(sumOfLanesDouble(squares), headDim, epsilon);
    rstd[h] = r;
    rotateHead([&](int64_t i, auto part) { return load(x + i, part) * r * load(normWeight + i, part); }, cos, sin, pairs, headDim,
               y);
  }
}

template <class T>
void ropeGrad(void* d, const void* in, int32_t heads, int32_t headDim, const float* normWeight, const float* cos,
              const float* sin, int64_t pairs, const float* rstd) {
  for (int32_t h = 0; h < heads; ++h) {
    T* dy = static_cast<T*>(d) + static_cast<int64_t>(h) * headDim;
    // The inverse rotation, in place: each pair is read before it is written.
    const auto rotated = [&](auto&& keepPair, auto&& keepRest) {
      overVectors(pairs, [&](int64_t i, auto part) {
        const Vec a = load(dy + i, part), b = load(dy + i + pairs, part);
        const Vec c = load(cos + i, part), s = load(sin + i, part);
        keepPair(i, a * c + b * s, b * c - a * s, part);
      });
      overVectors(headDim - 2 * pairs,
                  [&](int64_t i, auto part) { keepRest(2 * pairs + i, load(dy + 2 * pairs + i, part), part); });
    };
    if (!normWeight) {
      rotated(
          [&](int64_t i, Vec a, Vec b, auto part) {
            store(dy + i, a, part);
            store(dy + i + pairs, b, part);
          },
          [](int64_t, Vec, auto) {});
      continue;
    }
    // The rotated gradient stays in float32 until it has passed the norm.
    float g[maxHeadDim];
    rotated(
        [&](int64_t i, Vec a, Vec b, auto part) {
          store(g + i, a, part);
          store(g + i + pairs, b, part);
        },
        [&](int64_t i, Vec v, auto part) { store(g + i, v, part); });
    const T* x = static_cast<const T*>(in) + static_cast<int64_t>(h) * headDim;
    const float r = rstd[h];
    Vec products{};
    overVectors(headDim,
                [&](int64_t i, auto part) { products += load(x + i, part) * (load(g + i, part) * load(normWeight + i, part)); });
    const float slope = static_cast<float>(sumOfLanesDouble(products) / headDim * r * r);
    overVectors(headDim, [&](int64_t i, auto part) {
      store(dy + i, r * (load(g + i, part) * load(normWeight + i, part) - slope * load(x + i, part)), part);
    });
  }
}

// --- gated MLP: h = activation(gate) * up ---

struct ValueAndSlope {
  Vec value;
  Vec slope;
};

template <bool toBf16>
struct Silu {
  static KERNEL_INLINE Vec value(Vec x) { return x * sigmoid<toBf16>(x); }
  static KERNEL_INLINE ValueAndSlope both(Vec x) {
    const Vec s = sigmoid<toBf16>(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
};

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for large negative x.
template <bool toBf16>
struct GeluTanh {
  static constexpr float twiceRoot = 1.5957691216f;  // 2 sqrt(2/pi)
  static KERNEL_INLINE Vec value(Vec x) { return x * sigmoid<toBf16>(twiceRoot * x * (1.0f + 0.044715f * x * x)); }
  static KERNEL_INLINE ValueAndSlope both(Vec x) {
    const Vec s = sigmoid<toBf16>(twiceRoot * x * (1.0f + 0.044715f * x * x));
    return {x * s, s + x * s * (1.0f - s) * (twiceRoot * (1.0f + 3.0f * 0.044715f * x * x))};
  }
};

struct Gelu {
  static KERNEL_INLINE Vec value(Vec x) { return x * normalDistribution(x).below; }
  static KERNEL_INLINE ValueAndSlope both(Vec x) {
    const Normal normal = normalDistribution(x);
    return {x * normal.below, normal.below + x * normal.density};
  }
};

// Gate and up are streams of their own, too many for prefetchers that begin anew with every row: the second-level cache is asked
// for what comes soon.
inline constexpr int64_t gateAhead = 4096;  // bytes
template <class... T>
KERNEL_INLINE void askAhead(const T*... streams) {
  (__builtin_prefetch(reinterpret_cast<const char*>(streams) + gateAhead, 0, 2), ...);
}

template <class A, class T>
void gatedRow(const T* gate, const T* up, T* h, int64_t width) {
  overVectors(width, [&](int64_t i, auto part) {
    askAhead(gate + i, up + i);
    store(h + i, A::value(load(gate + i, part)) * load(up + i, part), part);
  });
}

template <class A, class T>
void gatedGradRow(T* gate, T* up, const T* dh, T* h, int64_t width) {
  overVectors(width, [&](int64_t i, auto part) {
    askAhead(gate + i, up + i, dh + i);
    const ValueAndSlope a = A::both(load(gate + i, part));
    const Vec d = load(dh + i, part), u = load(up + i, part);
    store(gate + i, d * u * a.slope, part);
    store(up + i, d * a.value, part);
    store(h + i, a.value * u, part);
  });
}

template <class T>
void gatedMlp(const void* gate, const void* up, Activation activation, void* h, int64_t width) {
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* out = static_cast<T*>(h);
  switch (activation) {
    case Activation::silu: return gatedRow<Silu<isBf16<T>>>(g, u, out, width);
    case Activation::geluTanh: return gatedRow<GeluTanh<isBf16<T>>>(g, u, out, width);
    case Activation::gelu: return gatedRow<Gelu>(g, u, out, width);
  }
}

template <class T>
void gatedMlpGrad(void* gate, void* up, Activation activation, const void* dh, void* h, int64_t width) {
  T* g = static_cast<T*>(gate);
  T* u = static_cast<T*>(up);
  const T* d = static_cast<const T*>(dh);
  T* out = static_cast<T*>(h);
  switch (activation) {
    case Activation::silu: return gatedGradRow<Silu<isBf16<T>>>(g, u, d, out, width);
    case Activation::geluTanh: return gatedGradRow<GeluTanh<isBf16<T>>>(g, u, d, out, width);
    case Activation::gelu: return gatedGradRow<Gelu>(g, u, d, out, width);
  }
}

// --- conversion ---

template <class T>
void fromFloat(const float* x, void* y, int64_t count) {
  T* out = static_cast<T*>(y);
  overVectors(count, [&](int64_t i, auto part) { store(out + i, load(x + i, part), part); });
}

template <class T>
void toFloat(const void* x, float* y, int64_t count) {
  const T* in = static_cast<const T*>(x);
  overVectors(count, [&](int64_t i, auto part) { store(y + i, load(in + i, part), part); });
}

void scaleRow(float scale, float* x, int64_t count) {
  overVectors(count, [&](int64_t i, auto part) { store(x + i, scale * load(x + i, part), part); });
}

void addRow(const float* x, float* y, int64_t count) {
  overVectors(count, [&](int64_t i, auto part) { store(y + i, load(y + i, part) + load(x + i, part), part); });
}

// --- sums ---

// 16 squares are added in float32 (a product of bf16 values is exact there), the blocks in float64.
template <class T>
void squareSum(const void* x, int64_t rows, int64_t cols, int64_t stride, double* sums) {
  constexpr int64_t blockRows = 16;
  const T* in = static_cast<const T*>(x);
  for (int64_t first = 0; first < rows; first += blockRows) {
    const int64_t count = rows - first < blockRows ? rows - first : blockRows;
    const T* block = in + first * stride;
    // Several vectors at a time, so that whole cache lines of a row are used before the next row.
    constexpr int group = 4;
    int64_t grouped = 0;
    for (; grouped + group * lanes <= cols; grouped += group * lanes) {
      Vec squares[group] = {};
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
        for (int g = 0; g < group; ++g) {
          const Vec v = load(block + i * stride + grouped + g * lanes, Whole{});
          squares[g] += v * v;
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < group; ++g) addDouble(sums + grouped + g * lanes, squares[g], Whole{});
    }
    overVectors(cols - grouped, [&](int64_t rest, auto part) {
      const int64_t j = grouped + rest;
      Vec squares{};
      for (int64_t i = 0; i < count; ++i) {
        const Vec v = load(block + i * stride + j, part);
        squares += v * v;
      }
      addDouble(sums + j, squares, part);
    });
  }
}

double squaredNorm(const float* x, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// --- AdamW, as torch.optim.AdamW: the decay is decoupled ---

void adamw(float* value, const float* grad, float* firstMoment, float* secondMoment, uint16_t* shadow, int64_t count,
           const AdamWStep& step, float gradScale, float biasCorrection1, float biasCorrection2) {
  const float decay = static_cast<float>(1.0 - static_cast<double>(step.learningRate) * static_cast<double>(step.weightDecay));
  const float rate = static_cast<float>(static_cast<double>(step.learningRate) / static_cast<double>(biasCorrection1));
  const float root2 = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(biasCorrection2)));
  const float keep1 = step.beta1, add1 = 1.0f - step.beta1;
  const float keep2 = step.beta2, add2 = 1.0f - step.beta2;
  const float epsilon = step.epsilon;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i] * gradScale;
    const float m = keep1 * firstMoment[i] + add1 * g;
    const float v = keep2 * secondMoment[i] + add2 * g * g;
    firstMoment[i] = m;
    secondMoment[i] = v;
    value[i] = value[i] * decay - rate * (m / (__builtin_sqrtf(v) * root2 + epsilon));
  }
  if (shadow) fromFloat<Bf16>(value, shadow, count);
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.rmsNorm = rmsNorm<T>;
  table.rmsNormApply = rmsNormApply<T>;
  table.rmsNormGrad = rmsNormGrad<T>;
  table.rope = rope<T>;
  table.ropeGrad = ropeGrad<T>;
  table.gatedMlp = gatedMlp<T>;
  table.gatedMlpGrad = gatedMlpGrad<T>;
  table.fromFloat = fromFloat<T>;
  table.toFloat = toFloat<T>;
  table.squareSum = squareSum<T>;
}

}  // namespace

void fillElementwise(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
  table.scaleRow = scaleRow;
  table.addRow = addRow;
  table.squaredNorm = squaredNorm;
  table.adamw = adamw;
}

}  // namespace lora_da::cpu::KERNEL_ISA
