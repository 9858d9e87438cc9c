// Products with a panel (kernels/panels.h): `panelCols` columns of the right operand, often a frozen weight, times many rows of
// the left operand.
//
// Written for AVX-512. Where an instruction set has no kernel here the table's entries stay null and oneDNN serves.
#include "cpu/kernels/dots.h"
#include "cpu/kernels/panels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lora_da::cpu::KERNEL_ISA {

#if defined(__AVX512F__)

namespace {

// --- multiplying ---

// One factor's rows and the panel that they are multiplied with.
template <class T>
struct Factor {
  const T* x;
  int64_t stride, depth;
  const float* panel;
};

template <class T, int rows, int vectors>
KERNEL_INLINE void addStep(Vec (&sum)[rows][vectors], const Factor<T>& factor, int64_t step, bool last) {
  const T* x = factor.x + step * Step<T>::depth;
  Vec right[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) right[v] = load(factor.panel + (step * vectors + v) * lanes, Whole{});
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const Vec left = last ? Step<T>::spreadLast(x + i * factor.stride) : Step<T>::spread(x + i * factor.stride);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[i][v] = Step<T>::add(sum[i][v], left, right[v]);
  }
}

// Steps of one cache line of a row.
template <class T>
inline constexpr int64_t lineSteps = 64 / (static_cast<int64_t>(sizeof(T)) * Step<T>::depth);

// Asks the second-level cache for a line of each of some rows to come: they are far apart, and prefetchers begin anew with every
// row.
template <int rows, class T>
KERNEL_INLINE void askForLines(const T* x, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) __builtin_prefetch(x + i * stride, 0, 2);
}

// The same for what is added to a tile.
template <int rows, int vectors>
KERNEL_INLINE void askForTile(const float* y, int64_t stride) {
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) askForLines<rows>(y + v * lanes, stride);
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
  if (p.residual) askForTile<rows, vectors>(p.residual + row * p.residualStride, p.residualStride);
  // Both factors in one loop: the sums of two loops would go to memory between them.
  const Factor<T> factors[] = {
      {static_cast<const T*>(p.x) + row * p.xStride, p.xStride, p.depth, static_cast<const float*>(p.panel)},
      {static_cast<const T*>(p.lowRank) + row * p.lowRankStride, p.lowRankStride, p.lowRankDepth,
       static_cast<const float*>(p.lowRankPanel)}};
  for (const Factor<T>& factor : factors) {
    const int64_t steps = factor.depth / Step<T>::depth;
    const T* next = factor.x + rows * factor.stride;
    int64_t step = 0;
    for (; step + lineSteps<T> <= steps; step += lineSteps<T>) {
      askForLines<rows>(next + step * Step<T>::depth, factor.stride);
      for (int64_t i = 0; i < lineSteps<T>; ++i) addStep<T, rows, vectors>(sum, factor, step + i, false);
    }
    for (; step < steps; ++step) addStep<T, rows, vectors>(sum, factor, step, false);
    if (factor.depth % Step<T>::depth != 0) addStep<T, rows, vectors>(sum, factor, steps, true);
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
    case 1: multiplyRows<T, 1>(p); break;
    case 2: multiplyRows<T, 2>(p); break;
    default: multiplyRows<T, 3>(p);
  }
}

// --- sums over rows: c += a^T b, for gradients of thin factors ---

// Rows and columns of b that stay in the nearest cache for all rows of c.
constexpr int64_t outerRows = 128;
constexpr int64_t outerCols = 4 * lanes;

template <class T>
KERNEL_INLINE void askForColumns(const T* row) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 4
  for (int64_t i = 0; i < outerCols; i += line) __builtin_prefetch(row + i, 0, 2);
}

// a is laid out as pairs (see packRows, one column block of all its columns): [steps][k padded to lanes]. b is read as it lies,
// in blocks; `next` elements on is the block after it, which the second-level cache is asked for.
template <class T, int rows, int vectors>
KERNEL_INLINE void addOuterTile(const float* left, int64_t leftStride, const T* b, int64_t bStride, int64_t bRows, int64_t count,
                                int64_t next, float* c, int64_t cStride) {
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
    askForColumns(upper + next);
    if (lower) askForColumns(lower + next);
    Vec right[vectors];
    if (lastCols == lanes) {
      wholeSteps<T, vectors>(upper, lower, right);
    } else {
      constexpr int64_t last = (vectors - 1) * lanes;
      wholeSteps<T, vectors - 1>(upper, lower, right);
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
  const int64_t next = col + count < p.cols ? count : outerRows * p.bStride - col;
  const auto tile = [&](auto rows, int64_t row) {
    addOuterTile<T, decltype(rows)::value, vectors>(left + row, p.leftStride, b + col, p.bStride, bRows, count, next,
                                                    p.c + row * p.cStride + col, p.cStride);
  };
  int64_t row = 0;
  for (; row + 4 <= p.leftCols; row += 4) tile(std::integral_constant<int, 4>{}, row);
  for (; row < p.leftCols; ++row) tile(std::integral_constant<int, 1>{}, row);
}

template <class T>
void addOuter(const OuterSum& p) {
  for (int64_t first = 0; first < p.rows; first += outerRows) {
    const int64_t rows = p.rows - first < outerRows ? p.rows - first : outerRows;
    const float* left = static_cast<const float*>(p.left) + first / Step<T>::depth * p.leftStride;
    const T* b = static_cast<const T*>(p.b) + first * p.bStride;
    for (int64_t col = 0; col < p.cols; col += outerCols) {
      const int64_t count = p.cols - col < outerCols ? p.cols - col : outerCols;
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

// Asks for memory that is read in order, well ahead, since prefetchers stop at the end of a page; into the second-level cache,
// since the nearest has too few places for what has to be under way.
template <class S>
KERNEL_INLINE void askAhead(const S* now) {
  constexpr int64_t ahead = 4096;  // bytes
  __builtin_prefetch(reinterpret_cast<const char*>(now) + ahead, 0, 2);
}

// One row's products, lane by lane.
template <class T, class S>
KERNEL_INLINE Vec dotLanes(const T* x, const S* w, int64_t depth) {
  Vec sums[4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, Bf16) && __is_same(S, Bf16)) {
    for (; i + 8 * lanes <= depth; i += 8 * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        askAhead(w + i + 2 * v * lanes);
        sums[v] = addWide(sums[v], x + i + 2 * v * lanes, w + i + 2 * v * lanes);
      }
    }
  }
#endif
  for (; i + 4 * lanes <= depth; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      askAhead(w + i + v * lanes);
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
    store(y + row, sumsOfLanes(sums), Whole{});
  }
  for (; row < rows; ++row) y[row] = sumOfLanes(dotLanes(x, w + row * stride, depth));
}

template <class T>
void dotRowsOf(const void* x, const void* w, DType type, int64_t stride, int64_t rows, int64_t depth, float* y) {
  withSource<T>(
      type, [&](auto element) { dotRows(static_cast<const T*>(x), static_cast<decltype(element)>(w), stride, rows, depth, y); });
}

// One row times a panel of a weight, read once, in order and ahead of its turn: two sums for each vector, so that additions need
// not wait for one another.
template <class T, class S, int vectors>
void multiplyRowVectors(const T* x, const float* panel, int64_t depth, float* y) {
  constexpr int64_t pair = Step<S>::depth;
  Vec sums[2][vectors] = {};
  const auto addStep = [&](int64_t i, const float* right, Vec(&sum)[vectors], bool whole) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      askAhead(right + v * lanes);
      const Vec w = load(right + v * lanes, Whole{});
      if constexpr (__is_same(T, S)) {
        sum[v] = Step<T>::add(sum[v], whole ? Step<T>::spread(x + i) : Step<T>::spreadLast(x + i), w);
      } else {  // pairs times float32
        sum[v] += broadcast(x[i]) * fromBits(bitsOf(w) << 16);
        if (whole) sum[v] += broadcast(x[i + 1]) * fromBits(bitsOf(w) & 0xffff0000u);
      }
    }
  };
  int64_t i = 0;
  for (; i + 2 * pair <= depth; i += 2 * pair, panel += 2 * vectors * lanes) {
    addStep(i, panel, sums[0], true);
    addStep(i + pair, panel + vectors * lanes, sums[1], true);
  }
  for (; i < depth; i += pair, panel += vectors * lanes) addStep(i, panel, sums[0], i + pair <= depth);
  for (int v = 0; v < vectors; ++v) store(y + v * lanes, sums[0][v] + sums[1][v], Whole{});
}

template <class T>
void multiplyRowOf(const void* x, const void* panel, DType type, int64_t depth, int64_t cols, float* y) {
  withSource<T>(type, [&](auto element) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    const T* row = static_cast<const T*>(x);
    const float* right = static_cast<const float*>(panel);
    switch ((cols + lanes - 1) / lanes) {
      case 1: return multiplyRowVectors<T, S, 1>(row, right, depth, y);
      case 2: return multiplyRowVectors<T, S, 2>(row, right, depth, y);
      default: return multiplyRowVectors<T, S, 3>(row, right, depth, y);
    }
  });
}

// --- few columns: lanes run along the depth, so that none is idle and nothing is laid out ---

template <class T, int rows>
KERNEL_INLINE void multiplyThinRows(const Matrix& x, const T* const (&columns)[thinCols], float scale, const Matrix& y,
                                    int64_t row) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T)), rowsAhead = 8;
  const T* in = static_cast<const T*>(x.data) + row * x.stride;
  Vec sums[lanes] = {};
  const auto overSums = [&](auto&& body) {
#pragma GCC unroll 8
    for (int j = 0; j < thinCols; ++j) {
#pragma GCC unroll 2
      for (int i = 0; i < rows; ++i) body(sums[i * thinCols + j], in + i * x.stride, columns[j]);
    }
  };
  int64_t d = 0;
  for (; d + line <= x.cols; d += line) {
    askForLines<rows>(in + rowsAhead * x.stride + d, x.stride);
    overSums([&](Vec& sum, const T* left, const T* right) { sum = addWide(sum, left + d, right + d); });
  }
  overVectors(x.cols - d, [&](int64_t i, auto part) {
    overSums([&](Vec& sum, const T* left, const T* right) { sum = addDot(sum, left + d + i, right + d + i, part); });
  });
  float values[lanes];
  store(values, scale * sumsOfLanes(sums), Whole{});
  for (int i = 0; i < rows; ++i) {
    const Part part{static_cast<int>(y.cols)};
    const Vec result = load(values + i * thinCols, part);
    const int64_t at = (row + i) * y.stride;
    if (y.dtype == DType::f32) {
      store(static_cast<float*>(y.data) + at, result, part);
    } else {
      store(static_cast<T*>(y.data) + at, result, part);
    }
  }
}

template <class T>
void multiplyThin(const Matrix& x, const Matrix& b, float scale, const Matrix& y) {
  static_assert(2 * thinCols == lanes, "two rows of sums fill a vector");
  const T* columns[thinCols];
  for (int64_t j = 0; j < thinCols; ++j) columns[j] = static_cast<const T*>(b.data) + (j < b.rows ? j : 0) * b.stride;
  int64_t row = 0;
  for (; row + 2 <= x.rows; row += 2) multiplyThinRows<T, 2>(x, columns, scale, y, row);
  if (row < x.rows) multiplyThinRows<T, 1>(x, columns, scale, y, row);
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.multiplyPanel = multiplyPanel<T>;
  table.multiplyRow = multiplyRowOf<T>;
  table.multiplyThin = multiplyThin<T>;
  table.addOuter = addOuter<T>;
  table.dotRows = dotRowsOf<T>;
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
