// Products of two rows, lane by lane, and the sums of their lanes. Included by kernel files only (see vector.h).
#pragma once

#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

template <class T, class S, class P>
KERNEL_INLINE Vec addDot(Vec sum, const T* x, const S* w, P part) {
  return sum + load(x, part) * load(w, part);
}

// Elements of T that addWide takes at a time.
template <class T>
inline constexpr int64_t wideDot = lanes;

KERNEL_INLINE Vec addWide(Vec sum, const float* x, const float* w) {
  return addDot(sum, x, w, Whole{});
}
#if defined(__AVX512BF16__)
template <>
inline constexpr int64_t wideDot<Bf16> = 2 * lanes;

KERNEL_INLINE Vec addWide(Vec sum, const Bf16* x, const Bf16* w) {
  __m512bh left, right;
  __builtin_memcpy(&left, x, sizeof left);
  __builtin_memcpy(&right, w, sizeof right);
  return _mm512_dpbf16_ps(sum, left, right);
}
#else
KERNEL_INLINE Vec addWide(Vec sum, const Bf16* x, const Bf16* w) {
  return addDot(sum, x, w, Whole{});
}
#endif

// The sums of the lanes of `lanes` vectors, side by side. Each round adds the halves of two vectors and puts them into one.
template <int count = lanes>
KERNEL_INLINE Vec sumsOfLanes(const Vec (&sums)[count]) {
  if constexpr (count == 1) {
    return sums[0];
  } else {
    Vec half[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      const Vec a = sums[i], b = sums[i + count / 2];
      half[i] = interleaveLower(a, b, Lanes{}) + interleaveUpper(a, b, Lanes{});
    }
    return sumsOfLanes<count / 2>(half);
  }
}

}  // namespace lora_da::cpu::KERNEL_ISA
