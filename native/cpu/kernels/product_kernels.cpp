// Products with a panel: `panelCols` columns of the right operand (often a frozen weight), laid out for the vector units in the
// caller's memory and then multiplied with many rows of the left operand.
//
// Layout: [steps][vectors][16]. A step is one element of the depth in float32 and a pair of neighbours in bfloat16, which
// `vdpbf16ps` multiplies and adds at once; an odd depth ends with a pair whose second half is zero. Laying a panel out costs a
// few per cent of its product with a thousand rows, so weights stay as they lie in their file.
//
// Written for AVX-512. Where an instruction set has no kernel here the table's entries stay null and oneDNN serves.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lora_da::cpu::KERNEL_ISA {

#if defined(__AVX512F__)

namespace {

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

#if defined(__AVX512BF16__)
template <>
struct Step<Bf16> {
  static constexpr int64_t depth = 2;
  static KERNEL_INLINE Vec spread(const Bf16* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return fromBits(pair - VecBits{});
  }
  static KERNEL_INLINE Vec spreadLast(const Bf16* x) { return fromBits(uint32_t{x->bits} - VecBits{}); }
  static KERNEL_INLINE Vec add(Vec sum, Vec left, Vec right) {
    return reinterpret_cast<Vec>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right)));
  }
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
#endif

// --- laying out ---

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

// body(i, vector) for the vectors of one step, from a row and, in bfloat16, its neighbour (null: zeros).
template <class T, class S, class Body>
KERNEL_INLINE void overSteps(const S* upper, const S* lower, int64_t cols, Body body) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, Bf16)) {  // two vectors at a time cost half as much
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; lower && i + 2 * lanes <= cols; i += 2 * lanes) {
      const __m512i first = _mm512_loadu_si512(upper + i), second = _mm512_loadu_si512(lower + i);
      body(i, reinterpret_cast<Vec>(_mm512_permutex2var_epi16(first, low, second)));
      body(i + lanes, reinterpret_cast<Vec>(_mm512_permutex2var_epi16(first, high, second)));
    }
  }
#endif
  overVectors(cols - i,
              [&](int64_t j, auto part) { body(i + j, Step<T>::join(upper + i + j, lower ? lower + i + j : nullptr, part)); });
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

// A float32 product also takes bfloat16 weights and widens them on the way.
template <class T, class Body>
KERNEL_INLINE void withSource(DType type, Body body) {
  if constexpr (__is_same(T, float)) {
    if (type == DType::f32) return body(static_cast<const float*>(nullptr));
  }
  body(static_cast<const Bf16*>(nullptr));
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

// --- multiplying ---

template <class T, int rows, int vectors>
KERNEL_INLINE void addSteps(Vec (&sum)[rows][vectors], const T* x, int64_t stride, int64_t depth, const float*& panel) {
  constexpr int64_t stepDepth = Step<T>::depth;
  const int64_t steps = depth / stepDepth;
  for (int64_t step = 0; step < steps; ++step) {
    Vec right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(panel + v * lanes, Whole{});
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec left = Step<T>::spread(x + i * stride + step * stepDepth);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Step<T>::add(sum[i][v], left, right[v]);
    }
    panel += vectors * lanes;
  }
  if (stepDepth > 1 && depth % stepDepth != 0) {
    for (int i = 0; i < rows; ++i) {
      const Vec left = Step<T>::spreadLast(x + i * stride + depth - 1);
      for (int v = 0; v < vectors; ++v) sum[i][v] = Step<T>::add(sum[i][v], left, load(panel + v * lanes, Whole{}));
    }
    panel += vectors * lanes;
  }
}

template <class Y, class P>
KERNEL_INLINE void finish(const PanelProduct& p, Vec value, int64_t row, int64_t col, P part) {
  value *= p.scale;
  if (p.bias) value += load(p.bias + col, part);
  if (p.residual) value += load(p.residual + row * p.residualStride + col, part);
  store(static_cast<Y*>(p.y) + row * p.yStride + col, value, part);
}

template <class T, int rows, int vectors>
__attribute__((noinline)) void multiplyTile(const PanelProduct& p, int64_t row) {
  Vec sum[rows][vectors] = {};
  const int64_t lastCols = p.cols - (vectors - 1) * lanes;
  const auto overTile = [&](auto&& body) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (v + 1 < vectors || lastCols == lanes) {
          body(sum[i][v], row + i, v * lanes, Whole{});
        } else {
          body(sum[i][v], row + i, v * lanes, Part{static_cast<int>(lastCols)});
        }
      }
    }
  };
  if (p.accumulate) {
    overTile([&](Vec& value, int64_t r, int64_t col, auto part) {
      value = load(static_cast<const float*>(p.y) + r * p.yStride + col, part);
    });
  }
  const float* panel = static_cast<const float*>(p.panel);
  addSteps<T, rows, vectors>(sum, static_cast<const T*>(p.x) + row * p.xStride, p.xStride, p.depth, panel);
  if (p.lowRankDepth > 0) {
    addSteps<T, rows, vectors>(sum, static_cast<const T*>(p.lowRank) + row * p.lowRankStride, p.lowRankStride, p.lowRankDepth,
                               panel);
  }
  if (p.floatOutput) {
    overTile([&](Vec& value, int64_t r, int64_t col, auto part) { finish<float>(p, value, r, col, part); });
  } else {
    overTile([&](Vec& value, int64_t r, int64_t col, auto part) { finish<T>(p, value, r, col, part); });
  }
}

// The rows that are left after whole tiles, fewer than `rows`.
template <class T, int rows, int vectors>
void multiplyRest(const PanelProduct& p, int64_t row) {
  if constexpr (rows > 0) {
    if (p.rows - row == rows) return multiplyTile<T, rows, vectors>(p, row);
    return multiplyRest<T, rows - 1, vectors>(p, row);
  }
}

// Tiles as high as the registers allow: 24 sums or fewer, the panel's vectors and one number of the left operand.
template <class T, int vectors>
void multiplyRows(const PanelProduct& p) {
  constexpr int rows = vectors == 3 ? 8 : 12;
  int64_t row = 0;
  for (; row + rows <= p.rows; row += rows) multiplyTile<T, rows, vectors>(p, row);
  multiplyRest<T, rows - 1, vectors>(p, row);
}

template <class T>
void multiplyPanel(const PanelProduct& p) {
  switch ((p.cols + lanes - 1) / lanes) {
    case 1: return multiplyRows<T, 1>(p);
    case 2: return multiplyRows<T, 2>(p);
    default: return multiplyRows<T, 3>(p);
  }
}

// --- sums over rows: c += a^T b, for gradients of thin factors ---

// a is laid out as pairs (see packRows, one column block of all its columns): [steps][k padded to lanes]. b is read as it lies,
// in blocks of rows that stay in the nearest cache.
template <class T, int rows, int vectors>
KERNEL_INLINE void addOuterTile(const float* left, int64_t leftStride, const T* b, int64_t bStride, int64_t bRows, int64_t count,
                                float* c, int64_t cStride) {
  constexpr int64_t stepDepth = Step<T>::depth;
  const int64_t lastCols = count - (vectors - 1) * lanes;
  Vec sum[rows][vectors];
  const auto overTile = [&](auto&& body) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (v + 1 < vectors || lastCols == lanes) {
          body(sum[i][v], c + i * cStride + v * lanes, Whole{});
        } else {
          body(sum[i][v], c + i * cStride + v * lanes, Part{static_cast<int>(lastCols)});
        }
      }
    }
  };
  overTile([&](Vec& value, const float* at, auto part) { value = load(at, part); });
  for (int64_t t = 0; t < bRows; t += stepDepth) {
    const T* upper = b + t * bStride;
    const T* lower = stepDepth > 1 && t + 1 < bRows ? upper + bStride : nullptr;
    Vec right[vectors];
    const auto keep = [&](int64_t i, Vec vector) { right[i / lanes] = vector; };
    if (lastCols == lanes) {
      overSteps<T>(upper, lower, vectors * lanes, keep);
    } else {
      constexpr int64_t last = (vectors - 1) * lanes;
      overSteps<T>(upper, lower, last, keep);
      right[vectors - 1] = Step<T>::join(upper + last, lower ? lower + last : nullptr, Part{static_cast<int>(lastCols)});
    }
    const float* leftStep = left + t / stepDepth * leftStride;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec leftVector = broadcast(leftStep[i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Step<T>::add(sum[i][v], leftVector, right[v]);
    }
  }
  overTile([&](Vec& value, float* at, auto part) { store(at, value, part); });
}

template <class T, int vectors>
void addOuterColumns(const OuterSum& p, const float* left, const T* b, int64_t bRows, int64_t col, int64_t count) {
  const auto tile = [&](auto rows, int64_t row) {
    addOuterTile<T, decltype(rows)::value, vectors>(left + row, p.leftStride, b + col, p.bStride, bRows, count,
                                                    p.c + row * p.cStride + col, p.cStride);
  };
  int64_t row = 0;
  for (; row + 4 <= p.leftCols; row += 4) tile(std::integral_constant<int, 4>{}, row);
  for (; row < p.leftCols; ++row) tile(std::integral_constant<int, 1>{}, row);
}

// A block of b's rows and columns is small enough to be still in the nearest cache for all rows of c.
template <class T>
void addOuter(const OuterSum& p) {
  constexpr int64_t blockRows = 128;
  constexpr int64_t blockCols = 4 * lanes;
  for (int64_t first = 0; first < p.rows; first += blockRows) {
    const int64_t rows = p.rows - first < blockRows ? p.rows - first : blockRows;
    const float* left = static_cast<const float*>(p.left) + first / Step<T>::depth * p.leftStride;
    const T* b = static_cast<const T*>(p.b) + first * p.bStride;
    for (int64_t col = 0; col < p.cols; col += blockCols) {
      const int64_t count = p.cols - col < blockCols ? p.cols - col : blockCols;
      switch ((count + lanes - 1) / lanes) {
        case 1: addOuterColumns<T, 1>(p, left, b, rows, col, count); break;
        case 2: addOuterColumns<T, 2>(p, left, b, rows, col, count); break;
        case 3: addOuterColumns<T, 3>(p, left, b, rows, col, count); break;
        default: addOuterColumns<T, 4>(p, left, b, rows, col, count); break;
      }
    }
  }
}

// --- one row: decoding reads every weight once and is bound by memory ---

template <class T, class S, class P>
KERNEL_INLINE Vec addDot(Vec sum, const T* x, const S* w, P part) {
  return sum + load(x, part) * load(w, part);
}
#if defined(__AVX512BF16__)
// 32 elements at a time where both are bfloat16.
KERNEL_INLINE Vec addPairs(Vec sum, const Bf16* x, const Bf16* w) {
  Vec left, right;
  __builtin_memcpy(&left, x, sizeof left);
  __builtin_memcpy(&right, w, sizeof right);
  return Step<Bf16>::add(sum, left, right);
}
#endif

// One row's products, lane by lane. Memory is read in order and asked for well ahead: prefetchers stop at the end of a page.
template <class T, class S>
KERNEL_INLINE Vec dotLanes(const T* x, const S* w, int64_t depth) {
  constexpr int64_t ahead = 4096;  // bytes
  Vec sums[4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, Bf16) && __is_same(S, Bf16)) {
    for (; i + 8 * lanes <= depth; i += 8 * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + i + 2 * v * lanes) + ahead);
        sums[v] = addPairs(sums[v], x + i + 2 * v * lanes, w + i + 2 * v * lanes);
      }
    }
  }
#endif
  for (; i + 4 * lanes <= depth; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + i + v * lanes) + ahead);
      sums[v] = addDot(sums[v], x + i + v * lanes, w + i + v * lanes, Whole{});
    }
  }
  overVectors(depth - i, [&](int64_t j, auto part) { sums[0] = addDot(sums[0], x + i + j, w + i + j, part); });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T, class S>
void dotRows(const T* x, const S* w, int64_t stride, int64_t rows, int64_t depth, float* y) {
  int64_t row = 0;
  for (; row + lanes <= rows; row += lanes) {  // the lanes of 16 rows are added up together
    Vec sums[lanes];
    for (int i = 0; i < lanes; ++i) sums[i] = dotLanes(x, w + (row + i) * stride, depth);
    transpose(sums);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    store(y + row, sums[0], Whole{});
  }
  for (; row < rows; ++row) y[row] = sumOfLanes(dotLanes(x, w + row * stride, depth));
}

template <class T>
void dotRowsOf(const void* x, const void* w, DType type, int64_t stride, int64_t rows, int64_t depth, float* y) {
  withSource<T>(
      type, [&](auto element) { dotRows(static_cast<const T*>(x), static_cast<decltype(element)>(w), stride, rows, depth, y); });
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.packColumns = packColumnsOf<T>;
  table.packRows = packRowsOf<T>;
  table.multiplyPanel = multiplyPanel<T>;
  table.addOuter = addOuter<T>;
  table.dotRows = dotRowsOf<T>;
  table.stepDepth = Step<T>::depth;
}

}  // namespace

void fillProducts(Kernels& table) {
  fillTyped<float>(table.f32);
#if defined(__AVX512BF16__)
  fillTyped<Bf16>(table.bf16);
#endif
}

#else

void fillProducts(Kernels&) {}

#endif

}  // namespace lora_da::cpu::KERNEL_ISA
