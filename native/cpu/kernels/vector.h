// Vectors of the instruction set that a kernel file is compiled for, on GCC/Clang vector types: one source for every set.
//
// All of it lives in a namespace named after the instruction set, so that no inline function compiled for a newer processor is
// linked into code that runs on an older one. For the same reason kernels use nothing inline of the standard library.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#ifndef KERNEL_ISA
#error "kernel files are compiled once per instruction set, with -DKERNEL_ISA=name"
#endif
#define KERNEL_INLINE __attribute__((always_inline)) inline

namespace lora_da::cpu::KERNEL_ISA {

#if defined(__AVX512F__)
inline constexpr int lanes = 16;
#elif defined(__AVX2__)
inline constexpr int lanes = 8;
#else
inline constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * lanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * lanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * lanes)));

struct Bf16 {
  uint16_t bits;
};

template <class T>
inline constexpr bool isBf16 = __is_same(T, Bf16);

// How many elements of a vector take part: all, or the first `count` of the row's end.
struct Whole {};
struct Part {
  int count;
};

// body(i, Whole or Part) for each vector of [0, count).
template <class Body>
KERNEL_INLINE void overVectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, Whole{});
  if (i < count) body(i, Part{static_cast<int>(count - i)});
}

KERNEL_INLINE Vec broadcast(float x) {
  return x - Vec{};
}
KERNEL_INLINE VecBits bitsOf(Vec x) {
  return reinterpret_cast<VecBits>(x);
}
KERNEL_INLINE Vec fromBits(VecBits x) {
  return reinterpret_cast<Vec>(x);
}

KERNEL_INLINE Vec load(const float* p, Whole) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
#if defined(__AVX512F__)
KERNEL_INLINE __mmask16 maskOf(Part part) {
  return static_cast<__mmask16>((1u << part.count) - 1);
}
#endif
KERNEL_INLINE Vec load(const float* p, Part part) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(maskOf(part), p));
#else
  Vec v{};
  for (int i = 0; i < part.count; ++i) v[i] = p[i];
  return v;
#endif
}
KERNEL_INLINE Vec widen(VecHalf half) {
#if defined(__AVX512F__)  // which GCC 12 would do in halves
  return fromBits(reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(half))) << 16);
#else
  return fromBits(__builtin_convertvector(half, VecBits) << 16);
#endif
}
KERNEL_INLINE Vec load(const Bf16* p, Whole) {
  VecHalf half;
  __builtin_memcpy(&half, p, sizeof half);
  return widen(half);
}
KERNEL_INLINE Vec load(const Bf16* p, Part part) {
#if defined(__AVX512F__)
  return widen(reinterpret_cast<VecHalf>(_mm256_maskz_loadu_epi16(maskOf(part), p)));
#else
  VecHalf half{};
  for (int i = 0; i < part.count; ++i) half[i] = p[i].bits;
  return widen(half);
#endif
}

// Round to nearest even; NaN stays NaN.
KERNEL_INLINE VecHalf narrow(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(v));  // subnormal numbers become 0
#else
  const VecBits bits = bitsOf(v);
  const VecBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecBits quiet = bits | 0x400000u;
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, VecHalf);
#endif
}

KERNEL_INLINE void store(float* p, Vec v, Whole) {
  __builtin_memcpy(p, &v, sizeof v);
}
KERNEL_INLINE void store(float* p, Vec v, Part part) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, maskOf(part), reinterpret_cast<__m512>(v));
#else
  for (int i = 0; i < part.count; ++i) p[i] = v[i];
#endif
}
KERNEL_INLINE void store(Bf16* p, Vec v, Whole) {
  const VecHalf half = narrow(v);
  __builtin_memcpy(p, &half, sizeof half);
}
KERNEL_INLINE void store(Bf16* p, Vec v, Part part) {
  const VecHalf half = narrow(v);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, maskOf(part), reinterpret_cast<__m256i>(half));
#else
  for (int i = 0; i < part.count; ++i) p[i].bits = half[i];
#endif
}

// The lanes beyond a Part become `fill`.
KERNEL_INLINE Vec keep(Vec v, Whole, float) {
  return v;
}
KERNEL_INLINE Vec keep(Vec v, Part part, float fill) {
  for (int i = part.count; i < lanes; ++i) v[i] = fill;
  return v;
}

// As the hardware's max and min: `b` where either is NaN.
KERNEL_INLINE Vec larger(Vec a, Vec b) {
  return a > b ? a : b;
}
KERNEL_INLINE Vec smaller(Vec a, Vec b) {
  return a < b ? a : b;
}

using Lanes = std::make_integer_sequence<int, lanes>;

// Lane i of the result is lane i ^ step.
template <int step, int... i>
KERNEL_INLINE Vec exchange(Vec v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ step)...);
}
template <int step = lanes / 2>
KERNEL_INLINE float sumOfLanes(Vec v) {
  if constexpr (step == 0)
    return v[0];
  else
    return sumOfLanes<step / 2>(v + exchange<step>(v, Lanes{}));
}
template <int step = lanes / 2>
KERNEL_INLINE float maxOfLanes(Vec v) {
  if constexpr (step == 0)
    return v[0];
  else
    return maxOfLanes<step / 2>(larger(v, exchange<step>(v, Lanes{})));
}

KERNEL_INLINE bool anyAbove(Vec v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ) != 0;
#else
  return maxOfLanes(v) > bound;
#endif
}

// a0 b0 a1 b1 ... of the lower or upper halves.
template <int... i>
KERNEL_INLINE Vec interleaveLower(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + (i % 2) * lanes)...);
}
template <int... i>
KERNEL_INLINE Vec interleaveUpper(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (lanes / 2 + i / 2 + (i % 2) * lanes)...);
}
// Each round rotates the bits of (row, column) by one; after log2(lanes) rounds row and column have changed places.
template <int rounds = lanes>
KERNEL_INLINE void transpose(Vec (&m)[lanes]) {
  if constexpr (rounds > 1) {
    Vec next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleaveLower(m[i], m[i + lanes / 2], Lanes{});
      next[2 * i + 1] = interleaveUpper(m[i], m[i + lanes / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) m[i] = next[i];
    transpose<rounds / 2>(m);
  }
}

// Sums of squares and of exponentials end in double: the lanes have few terms, the row may have many lanes' worth.
KERNEL_INLINE double sumOfLanesDouble(Vec v) {
  float values[lanes];
  __builtin_memcpy(values, &v, sizeof v);
  double sums[lanes];
  for (int i = 0; i < lanes; ++i) sums[i] = static_cast<double>(values[i]);
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}
KERNEL_INLINE void addDouble(double* sums, Vec v, Whole) {
  float values[lanes];
  __builtin_memcpy(values, &v, sizeof v);
#pragma omp simd
  for (int i = 0; i < lanes; ++i) sums[i] += static_cast<double>(values[i]);
}
KERNEL_INLINE void addDouble(double* sums, Vec v, Part part) {
  for (int i = 0; i < part.count; ++i) sums[i] += static_cast<double>(v[i]);
}

// --- exponentials, without branches ---

// 1.5 * 2^23: adding it leaves round(x) in the low bits of the sum.
inline constexpr float roundingMagic = 12582912.0f;

// p * 2^n where `shifted` is n + roundingMagic: n goes into the exponent's bits.
KERNEL_INLINE Vec scaleByPower(Vec p, Vec shifted) {
  return fromBits(bitsOf(p) + (bitsOf(shifted) << 23));
}

// 2^x for x <= 126 (softmax after about its maximum is subtracted); 0 well below 2^-126; NaN stays NaN. A minimax polynomial of
// the fraction, exact at 0, of relative error 2e-9 before rounding, or 3e-6 for what becomes bfloat16.
template <bool toBf16>
KERNEL_INLINE Vec exp2OfBounded(Vec x) {
#if defined(__AVX512F__)
  const Vec r = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 of an infinity
  if (toBf16) {
    const Vec p = ((1.34266880e-2f * r + 5.22424682e-2f) * r + 2.41280208e-1f) * r + 6.93044845e-1f;
    return _mm512_maskz_scalef_ps(0xffff, p * r + 1.0f, x);  // by 2^floor(x)
  }
  Vec p = 2.16129191e-4f * r + 1.24678453e-3f;
  p = p * r + 9.67545167e-3f;
  p = p * r + 5.54852806e-2f;
  p = p * r + 2.40229306e-1f;
  p = p * r + 6.93147044e-1f;
  return _mm512_maskz_scalef_ps(0xffff, p * r + 1.0f, x);
#else
  const Vec shifted = x + roundingMagic;
  const Vec r = x - (shifted - roundingMagic);
  Vec p = 1.5345812e-4f * r + 1.3399930e-3f;
  p = p * r + 9.6184889e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  const Vec value = scaleByPower(p * r + 1.0f, shifted);
  return x < -126.0f ? Vec{} : value;
#endif
}

// The natural logarithm of a normal positive number; NaN stays NaN (polynomial of Cephes' logf).
KERNEL_INLINE Vec logOfNormal(Vec x) {
  // x = m 2^e, m from sqrt(1/2) to sqrt(2).
  const VecInt e = (reinterpret_cast<VecInt>(x) - 0x3f3504f3) >> 23;
  const Vec t = fromBits(bitsOf(x) - reinterpret_cast<VecBits>(e << 23)) - 1.0f;
  Vec p = 7.0376836e-2f * t - 1.1514610e-1f;
  p = p * t + 1.1676998e-1f;
  p = p * t - 1.2420141e-1f;
  p = p * t + 1.4249323e-1f;
  p = p * t - 1.6668058e-1f;
  p = p * t + 2.0000715e-1f;
  p = p * t - 2.4999994e-1f;
  p = p * t + 3.3333331e-1f;
  const Vec square = t * t;
  const Vec logM = t + (p * t - 0.5f) * square;
  return __builtin_convertvector(e, Vec) * 0.69314718f + logM + (x - x);
}

// e^x where it is a normal number: |x| <= 87.
KERNEL_INLINE Vec expOfNormal(Vec x) {
  const Vec shifted = x * 1.44269504f + roundingMagic;
  const Vec n = shifted - roundingMagic;
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = 1.3836846e-3f * r + 8.3748158e-3f;
  p = p * r + 4.1668226e-2f;
  p = p * r + 1.6666420e-1f;
  p = p * r + 4.9999992e-1f;
  p = (p * r) * r + r + 1.0f;
  return scaleByPower(p, shifted);
}

// e^x; 0 below the smallest normal number, infinity above the largest.
KERNEL_INLINE Vec expOf(Vec x) {
  const Vec value = x < -87.336f ? Vec{} : expOfNormal(x);
  return x > 88.72283f ? broadcast(__builtin_inff()) : value;
}
// The same for x <= 0.
KERNEL_INLINE Vec expOfNonPositive(Vec x) {
  return x < -87.336f ? Vec{} : expOfNormal(x);
}

// e^x for x <= 0, by the fastest way to the accuracy of float32 or of what becomes bfloat16.
template <bool toBf16>
KERNEL_INLINE Vec softmaxExp(Vec x) {
#if defined(__AVX512F__)
  return exp2OfBounded<toBf16>(x * 1.44269504f);
#else
  return expOfNonPositive(x);
#endif
}

// Clamped where e^x would leave the normal numbers; NaN stays NaN.
template <bool toBf16>
KERNEL_INLINE Vec sigmoid(Vec x) {
#if defined(__AVX512F__)
  if (toBf16) {  // the estimate's relative error of 6e-5 is a thirtieth of bfloat16's rounding
    return _mm512_maskz_rcp14_ps(0xffff, 1.0f + exp2OfBounded<true>(larger(broadcast(-87.0f), x) * -1.44269504f));
  }
#endif
  const Vec bounded = smaller(broadcast(87.0f), larger(broadcast(-87.0f), x));
  return 1.0f / (1.0f + expOfNormal(-bounded));
}

// The normal distribution function and its density.
struct Normal {
  Vec below;
  Vec density;
};
KERNEL_INLINE Normal normalDistribution(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec gauss = expOfNonPositive(-0.5f * x * x);
  // erfc(t) exp(t^2), t = |x| / sqrt 2, as a polynomial in 1 / (1 + p t): relative error 6e-8 for t <= 9.5 (fitted; the form is
  // Hastings').
  const Vec k = 1.0f / (1.0f + (0.3275911f * 0.70710678f) * magnitude);
  Vec p = -0.14643881f * k + 0.52095580f;
  p = p * k - 0.45295718f;
  p = p * k + 0.50373378f;
  p = p * k - 7.3352422e-3f;
  p = p * k + 0.21904676f;
  p = p * k + 0.17753851f;
  p = p * k + 0.18548058f;
  p = p * k - 2.4254665e-5f;
  const Vec tail = 0.5f * gauss * p;
  return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * gauss};
}

}  // namespace lora_da::cpu::KERNEL_ISA
