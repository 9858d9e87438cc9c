// Panels: how a product's right operand lies for the vector units, [steps][vectors][16] for up to panelCols columns. A step is
// one element of the depth in float32 and a pair of neighbours in bfloat16, which `vdpbf16ps` multiplies and adds at once; an odd
// depth ends with a pair whose second half is zero.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

#if defined(__AVX512F__)

namespace lora_da::cpu::KERNEL_ISA {

// How a type's numbers enter a product.
template <class T>
struct Step;

template <>
struct Step<float> {
  static constexpr int64_t depth = 1;
  static KERNEL_INLINE Vec spread(const float* x) { return broadcast(*x); }
  static KERNEL_INLINE Vec spreadLast(const float* x) { return broadcast(*x); }
  static KERNEL_INLINE Vec add(Vec sum, Vec left, Vec right) { return sum + left * right; }
  // The panel's vector of one step: elements of one row.
  template <class S, class P>
  static KERNEL_INLINE Vec join(const S* row, const S*, P part) {
    return load(row, part);
  }
};

template <>
struct Step<Bf16> {
  static constexpr int64_t depth = 2;
  static KERNEL_INLINE Vec spread(const Bf16* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return fromBits(pair - VecBits{});
  }
  static KERNEL_INLINE Vec spreadLast(const Bf16* x) { return fromBits(uint32_t{x->bits} - VecBits{}); }
#if defined(__AVX512BF16__)
  static KERNEL_INLINE Vec add(Vec sum, Vec left, Vec right) {
    return reinterpret_cast<Vec>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right)));
  }
#endif
  template <class P>
  static KERNEL_INLINE VecBits bits(const Bf16* row, P part) {
    return bitsOf(load(row, part)) >> 16;
  }
  // Pairs of two rows' elements, the first row's in the lower halves; `lower` may be null: zeros.
  template <class P>
  static KERNEL_INLINE Vec join(const Bf16* upper, const Bf16* lower, P part) {
    const VecBits first = bits(upper, part);
    return fromBits(lower ? first | bits(lower, part) << 16 : first);
  }
};

// Two vectors of one step from two whole vectors of each row, at half the cost of two joins.
KERNEL_INLINE void joinTwo(const Bf16* upper, const Bf16* lower, Vec& first, Vec& second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                       35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i left = _mm512_loadu_si512(upper), right = _mm512_loadu_si512(lower);
  first = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(left, low, right));
  second = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(left, high, right));
}

// body(i, vector) for the vectors of one step, from a row and, in bfloat16, its neighbour (null: zeros).
template <class T, class S, class Body>
KERNEL_INLINE void overSteps(const S* upper, const S* lower, int64_t cols, Body body) {
  int64_t i = 0;
  if constexpr (isBf16<T>) {
    for (; lower && i + 2 * lanes <= cols; i += 2 * lanes) {
      Vec first, second;
      joinTwo(upper + i, lower + i, first, second);
      body(i, first);
      body(i + lanes, second);
    }
  }
  overVectors(cols - i,
              [&](int64_t j, auto part) { body(i + j, Step<T>::join(upper + i + j, lower ? lower + i + j : nullptr, part)); });
}

// The first vectors of one step, all whole; the number of vectors is known, so that they stay in registers.
template <class T, int vectors, int size>
KERNEL_INLINE void wholeSteps(const T* upper, const T* lower, Vec (&steps)[size]) {
  constexpr int pairs = isBf16<T> ? vectors / 2 : 0;
  if constexpr (pairs > 0) {
    if (lower) {
#pragma GCC unroll 2
      for (int v = 0; v < 2 * pairs; v += 2) joinTwo(upper + v * lanes, lower + v * lanes, steps[v], steps[v + 1]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    if (v < 2 * pairs && lower) continue;
    steps[v] = Step<T>::join(upper + v * lanes, lower ? lower + v * lanes : nullptr, Whole{});
  }
}

// A float32 product also takes bfloat16 weights and widens them on the way.
template <class T, class Body>
KERNEL_INLINE void withSource(DType type, Body body) {
  if constexpr (__is_same(T, float)) {
    if (type == DType::f32) return body(static_cast<const float*>(nullptr));
  }
  body(static_cast<const Bf16*>(nullptr));
}

}  // namespace lora_da::cpu::KERNEL_ISA

#endif
