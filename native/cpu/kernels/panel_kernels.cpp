// Laying panels out (kernels/panels.h): from rows of a matrix as they lie, and from weights that are kept as panels.
//
// Written for AVX-512. Where an instruction set has no kernel here the table's entries stay null and oneDNN serves.
#include "cpu/kernels/panels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lora_da::cpu::KERNEL_ISA {

#if defined(__AVX512F__)

namespace {

// Sixteen rows of the source become sixteen columns: one block of 16 steps, [16 steps][16 columns] before they are spread over
// the panel. A null row is zeros.
template <class T, class S>
KERNEL_INLINE Vec rowSteps(const S* row, int64_t first, int64_t depth) {
  if (!row) return Vec{};
  const int64_t left = depth - first;
  if constexpr (Step<T>::depth == 1) {
    return left >= lanes ? load(row + first, Whole{}) : load(row + first, Part{static_cast<int>(left)});
  } else {
    const auto mask = left >= 2 * lanes ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, row + first));
  }
}

template <class T, class S>
void packColumns(const S* const* rows, int64_t depth, int vectors, float* panel) {
  const int64_t steps = (depth + Step<T>::depth - 1) / Step<T>::depth;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t first = 0; first < steps; first += lanes) {
      Vec block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) block[i] = rowSteps<T>(rows[v * lanes + i], first * Step<T>::depth, depth);
      transpose(block);
      const int64_t count = steps - first < lanes ? steps - first : lanes;
      if (count == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(panel + ((first + i) * vectors + v) * lanes, block[i], Whole{});
      } else {
        for (int64_t i = 0; i < count; ++i) store(panel + ((first + i) * vectors + v) * lanes, block[i], Whole{});
      }
    }
  }
}

template <class T, class S>
void packRows(const S* upper, const S* lower, int64_t stride, int64_t steps, int64_t cols, float* panel) {
  const int64_t vectors = (cols + lanes - 1) / lanes;
  for (int64_t step = 0; step < steps; ++step) {
    float* target = panel + step * vectors * lanes;
    overSteps<T>(upper + step * stride, lower ? lower + step * stride : nullptr, cols,
                 [&](int64_t i, Vec vector) { store(target + i, vector, Whole{}); });
  }
}

template <class T>
void packColumnsOf(const void* const* rows, DType type, int64_t depth, int64_t cols, void* panel) {
  withSource<T>(type, [&](auto element) {
    packColumns<T>(reinterpret_cast<decltype(element) const*>(rows), depth, static_cast<int>((cols + lanes - 1) / lanes),
                   static_cast<float*>(panel));
  });
}

template <class T>
void packRowsOf(const void* upper, const void* lower, DType type, int64_t stride, int64_t steps, int64_t cols, void* panel) {
  withSource<T>(type, [&](auto element) {
    using Row = decltype(element);
    packRows<T>(static_cast<Row>(upper), static_cast<Row>(lower), stride, steps, cols, static_cast<float*>(panel));
  });
}

// --- from panels of bfloat16 pairs, or of float32 ---

// Sixteen rows of float32 from pairs: the elements of each pair that lie in its lower halves, or in its upper ones.
KERNEL_INLINE Vec lowerOfPairs(Vec pairs) {
  return fromBits(bitsOf(pairs) << 16);
}
KERNEL_INLINE Vec upperOfPairs(Vec pairs) {
  return fromBits(bitsOf(pairs) & 0xffff0000u);
}

void widenPanel(const void* stored, int64_t depth, int64_t cols, void* panel) {
  const int64_t width = (cols + lanes - 1) / lanes * lanes;
  const float* pairs = static_cast<const float*>(stored);
  float* target = static_cast<float*>(panel);
  for (int64_t step = 0; step < depth; step += 2) {
    for (int64_t i = 0; i < width; i += lanes) {
      const Vec both = load(pairs + i, Whole{});
      store(target + i, lowerOfPairs(both), Whole{});
      if (step + 1 < depth) store(target + width + i, upperOfPairs(both), Whole{});
    }
    pairs += width;
    target += 2 * width;
  }
}

// Rows and columns of an 8 x 8 block of pairs of floats change places, as in transpose(): one row of it is one vector.
template <int rounds = lanes / 2>
KERNEL_INLINE void transposePairs(Vec (&m)[lanes / 2]) {
  typedef double Pairs __attribute__((vector_size(4 * lanes)));
  constexpr int half = lanes / 4;
  if constexpr (rounds > 1) {
    Vec next[lanes / 2];
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      const Pairs a = reinterpret_cast<Pairs>(m[i]), b = reinterpret_cast<Pairs>(m[i + half]);
      next[2 * i] = reinterpret_cast<Vec>(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
      next[2 * i + 1] = reinterpret_cast<Vec>(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) m[i] = next[i];
    transposePairs<rounds / 2>(m);
  }
}

// Of four bfloat16 numbers that lie together the two in the middle change places: two pairs of one column each become two pairs
// of one row each.
KERNEL_INLINE Vec turnPairs(Vec v) {
  const __m512i order = _mm512_maskz_broadcast_i32x4(0xffff, _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  return reinterpret_cast<Vec>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(v), order));
}

// Of each pair of pairs the first, or the second, widened.
template <int which>
KERNEL_INLINE Vec widenEverySecond(Vec v) {
  const __m512i order = _mm512_set_epi16(29 + 2 * which, 0, 28 + 2 * which, 0, 25 + 2 * which, 0, 24 + 2 * which, 0,
                                         21 + 2 * which, 0, 20 + 2 * which, 0, 17 + 2 * which, 0, 16 + 2 * which, 0,
                                         13 + 2 * which, 0, 12 + 2 * which, 0, 9 + 2 * which, 0, 8 + 2 * which, 0, 5 + 2 * which,
                                         0, 4 + 2 * which, 0, 1 + 2 * which, 0, 0 + 2 * which, 0);
  return reinterpret_cast<Vec>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, reinterpret_cast<__m512i>(v)));
}

// One panel of a weight, columns [firstCol, firstCol + 16 vectors) of its depth: `depth` of its columns become the depth of a
// panel.
template <class T, class S>
void turnPanel(const float* stored, int64_t storedSteps, int storedVectors, int64_t firstCol, int vectors, int64_t depth,
               float* panel) {
  constexpr int64_t pair = Step<S>::depth;
  constexpr int rows = lanes / pair;
  for (int group = 0; group < storedVectors && group * lanes < depth; ++group) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = (firstCol + v * lanes) / pair;
      Vec block[rows];
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const bool there = first + i < storedSteps;
        block[i] = there ? load(stored + ((first + i) * storedVectors + group) * lanes, Whole{}) : Vec{};
      }
      const auto keep = [&](int64_t at, Vec vector) {
        const int64_t step = group * lanes / Step<T>::depth + at;
        if (step * Step<T>::depth < depth) store(panel + (step * vectors + v) * lanes, vector, Whole{});
      };
      if constexpr (pair == 1) {
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) keep(i, block[i]);
      } else {
        transposePairs(block);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          if constexpr (isBf16<T>) {
            keep(i, turnPairs(block[i]));
          } else {
            keep(2 * i, widenEverySecond<0>(block[i]));
            keep(2 * i + 1, widenEverySecond<1>(block[i]));
          }
        }
      }
    }
  }
}

template <class T>
void turnPanelOf(const void* stored, DType type, int64_t storedSteps, int64_t storedCols, int64_t firstCol, int64_t cols,
                 int64_t depth, void* panel) {
  const auto vectorsOf = [](int64_t count) { return static_cast<int>((count + lanes - 1) / lanes); };
  withSource<T>(type, [&](auto element) {
    turnPanel<T, std::remove_const_t<std::remove_pointer_t<decltype(element)>>>(static_cast<const float*>(stored), storedSteps,
                                                                                vectorsOf(storedCols), firstCol, vectorsOf(cols),
                                                                                depth, static_cast<float*>(panel));
  });
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.packColumns = packColumnsOf<T>;
  table.packRows = packRowsOf<T>;
  table.turnPanel = turnPanelOf<T>;
  table.stepDepth = Step<T>::depth;
}

}  // namespace

void fillPanels(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
  table.f32.widenPanel = widenPanel;
}

#else

void fillPanels(Kernels&) {}

#endif

}  // namespace lora_da::cpu::KERNEL_ISA
