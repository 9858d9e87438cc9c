// What the attention kernels share: products of tiles, packing and masks. Included by kernel files only (see vector.h).
//
// Products are register blocks of blockRows rows: the left factor is read element by element and broadcast, the right one is a
// panel of vectors. In float32 an element is a number. Where the processor multiplies pairs of bfloat16 into float32 sums, an
// element is a Pair of neighbours along the summed dimension, so that half as many instructions do. Packed operands are counted
// in words of four bytes, either of the two:
//   rows     [token][depth]          left factor of products that sum over a head's elements
//   across   [tile][depth][token]    their right factor
//   stacked  [token / n][width]      right factor of products that sum over tokens; n = elements in a word
// depth = headDim / n, width = headDim, padded with zeros to whole vectors where a row of them is stored.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

inline constexpr float log2e = 1.44269504089f;
inline constexpr float ln2 = 0.69314718056f;
// Stands for "nothing seen yet" in the running maximum: finite, so that the difference with itself is 0 and not NaN.
inline constexpr float noMaximum = -1e30f;

inline constexpr int64_t tile = attentionTile;
inline constexpr int blockRows = 6;
// Vectors of a register block: blockRows x blockVectors accumulators, blockVectors of B and one of A fit the register file.
inline constexpr int blockVectors = lanes == 16 ? 4 : 2;
static_assert(tile % blockRows == 0 && tile % lanes == 0, "a tile is whole blocks of rows and whole vectors");

constexpr int64_t roundUp(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
KERNEL_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
KERNEL_INLINE int64_t greatest(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// --- elements of products ---

template <class T>
struct Operand {
  using Element = float;
  static constexpr int count = 1;  // numbers in an element
  static constexpr bool rounded = false;
};

KERNEL_INLINE Vec addProduct(Vec sum, float left, Vec right) {
  return sum + broadcast(left) * right;
}

#if defined(__AVX512BF16__)
struct Pair {
  uint32_t bits;
};
template <>
struct Operand<Bf16> {
  using Element = Pair;
  static constexpr int count = 2;
  static constexpr bool rounded = true;
};

KERNEL_INLINE Vec load(const Pair* p, Whole) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
KERNEL_INLINE Vec addProduct(Vec sum, Pair left, Vec right) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left.bits - VecBits{}), reinterpret_cast<__m512bh>(right));
}
#endif

// Words of `n` numbers.
template <class T>
constexpr int64_t words(int64_t n) {
  return (n + Operand<T>::count - 1) / Operand<T>::count;
}

// Two neighbouring vectors of a row of numbers, as elements.
KERNEL_INLINE void storeNeighbours(float* to, Vec a, Vec b) {
  store(to, a, Whole{});
  store(to + lanes, b, Whole{});
}
// The same vector of two neighbouring rows, as stacked elements; rows of words are `row` apart.
KERNEL_INLINE void storeStacked(float* to, int64_t row, Vec upper, Vec lower) {
  store(to, upper, Whole{});
  store(to + row, lower, Whole{});
}
#if defined(__AVX512BF16__)
KERNEL_INLINE void storeNeighbours(Pair* to, Vec a, Vec b) {
  const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
  __builtin_memcpy(to, &both, sizeof both);
}
KERNEL_INLINE void storeStacked(Pair* to, int64_t, Vec upper, Vec lower) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves both = reinterpret_cast<Halves>(_mm512_cvtne2ps_pbh(lower, upper));
  const Halves pairs = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                               10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __builtin_memcpy(to, &pairs, sizeof pairs);
}
#endif

// --- products of tiles ---

// A's element (i, d) is data[i * row + d * step].
template <class Element>
struct Left {
  const Element* data;
  int64_t row;
  int64_t step;

  Left from(int64_t i) const { return {data + i * row, row, step}; }
};
template <class Element>
struct Panel {
  const Element* data;
  int64_t row;
};

template <int n>
using Count = std::integral_constant<int, n>;

// What a product is added to: nothing, c, or c with each row scaled.
enum class Start { zero, sum, scaled };

// c [rows, vectors * lanes] = start + A [rows, depth] b [depth, vectors * lanes]. Numbers, not a Left and a Panel: those would be
// passed in memory, written in parts and read whole, which waits until every store before has reached the cache.
template <int rows, int vectors, Start start, class Element>
__attribute__((noinline)) void multiplyBlock(const Element* left, int64_t leftRow, int64_t leftStep, const Element* right,
                                             int64_t rightRow, int64_t depth, const float* factor, float* c, int64_t cRow) {
  Vec sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = start == Start::zero ? Vec{} : load(c + i * cRow + j * lanes, Whole{});
      if (start == Start::scaled) sum[i][j] *= factor[i];
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec r[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) r[j] = load(right + j * lanes, Whole{});
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = addProduct(sum[i][j], left[i * leftRow], r[j]);
    }
    left += leftStep;
    right += rightRow;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * cRow + j * lanes, sum[i][j], Whole{});
  }
}

// The same for any number of vectors.
template <int rows, Start start, class Element>
KERNEL_INLINE void multiply(Left<Element> a, Panel<Element> b, int64_t depth, const float* factor, float* c, int64_t cRow,
                            int64_t vectors) {
  const auto block = [&](auto count) {
    multiplyBlock<rows, decltype(count)::value, start>(a.data, a.row, a.step, b.data, b.row, depth, factor, c, cRow);
    vectors -= count;
    b.data += count * lanes;
    c += count * lanes;
  };
  // A block of one vector has too few sums to hide the latency of a product.
  while (vectors > blockVectors + 1) block(Count<blockVectors>{});
  if constexpr (blockVectors > 2) {
    if (vectors == blockVectors) return block(Count<blockVectors>{});
    if (vectors >= 3) block(Count<3>{});
    if (vectors >= 2) return block(Count<2>{});
  } else {
    if (vectors >= 2) block(Count<2>{});
  }
  if (vectors > 0) block(Count<1>{});
}

// --- packing ---

// A vector of words from `p` on.
template <class T>
KERNEL_INLINE Vec loadWords(const T* p) {
  return load(p, Whole{});
}
#if defined(__AVX512BF16__)
KERNEL_INLINE Vec loadWords(const Bf16* p) {
  return load(reinterpret_cast<const Pair*>(p), Whole{});
}
#endif

// Words [d, d + lanes) of a token, zero from headDim on.
template <class T>
KERNEL_INLINE Vec wordsOf(const T* token, int64_t d, int64_t headDim) {
  return d + lanes <= headDim ? loadWords(token + d) : load(token + d, Part{static_cast<int>(headDim - d)});
}
#if defined(__AVX512BF16__)
KERNEL_INLINE Vec wordsOf(const Bf16* token, int64_t d, int64_t headDim) {
  if (2 * (d + lanes) <= headDim) return loadWords(token + 2 * d);
  VecBits bits{};
  for (int i = 0; i < lanes && 2 * (d + i) < headDim; ++i) {
    const Bf16* pair = token + 2 * (d + i);
    bits[i] = pair[0].bits | (2 * (d + i) + 1 < headDim ? static_cast<uint32_t>(pair[1].bits) << 16 : 0u);
  }
  return fromBits(bits);
}
#endif

// Asks for rows that are packed, read or written soon. They are far apart in memory, so that the processor does not foresee them.
template <bool forWriting = false, class T>
KERNEL_INLINE void prefetchRows(const T* from, int64_t stride, int64_t rows, int64_t headDim) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < headDim; j += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(from + i * stride + j, forWriting, 2);
    }
  }
}
// How many rows ahead of packing that is.
inline constexpr int64_t rowsAhead = 16;

inline void zeroWords(float* to, int64_t count) {
  for (int64_t j = 0; j < count; j += lanes) store(to + j, Vec{}, Whole{});
}

// Words of a packed row, and of a packed operand of `tokens` of them.
template <class T>
constexpr int64_t rowWords(int64_t headDim) {
  return roundUp(words<T>(headDim), lanes);
}

// to [paddedRows][rowWords] = from [rows, headDim], zero outside.
template <class T>
void packRows(const T* from, int64_t stride, int64_t rows, int64_t headDim, int64_t paddedRows, float* to) {
  const int64_t width = rowWords<T>(headDim);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + rowsAhead < rows) prefetchRows(from + (i + rowsAhead) * stride, stride, 1, headDim);
    for (int64_t d = 0; d < width; d += lanes) store(to + i * width + d, wordsOf(from + i * stride, d, headDim), Whole{});
  }
  zeroWords(to + rows * width, (paddedRows - rows) * width);
}

// to [tiles][depth][tile] = from [rows, headDim], transposed within each tile of rows, zero outside.
template <class T>
void packAcross(const T* from, int64_t stride, int64_t rows, int64_t headDim, float* to) {
  const int64_t depth = words<T>(headDim);
  for (int64_t first = 0; first < roundUp(rows, tile); first += lanes) {
    float* out = to + first / tile * tile * depth + first % tile;
    const int64_t count = least(lanes, rows - first);
    const int64_t ahead = first + rowsAhead;
    prefetchRows(from + ahead * stride, stride, least(lanes, rows - ahead), headDim);
    for (int64_t d = 0; d < depth; d += lanes) {
      Vec square[lanes];
      if (count == lanes && (d + lanes) * Operand<T>::count <= headDim) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = loadWords(from + (first + i) * stride + d * Operand<T>::count);
      } else {
        for (int i = 0; i < lanes; ++i) square[i] = i < count ? wordsOf(from + (first + i) * stride, d, headDim) : Vec{};
      }
      transpose(square);
      const int64_t height = least(lanes, depth - d);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < height) store(out + (d + i) * tile, square[i], Whole{});
      }
    }
  }
}

// to [paddedRows / count][width] = from [rows, headDim], zero outside.
template <class T>
void packStacked(const T* from, int64_t stride, int64_t rows, int64_t headDim, int64_t width, int64_t paddedRows, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = to + i * width;
    if (i + rowsAhead < rows) prefetchRows(from + (i + rowsAhead) * stride, stride, 1, headDim);
    overVectors(headDim, [&](int64_t j, auto part) { store(row + j, load(from + i * stride + j, part), Whole{}); });
    for (int64_t j = roundUp(headDim, lanes); j < width; j += lanes) store(row + j, Vec{}, Whole{});
  }
  zeroWords(to + rows * width, (paddedRows - rows) * width);
}
#if defined(__AVX512BF16__)
inline void packStacked(const Bf16* from, int64_t stride, int64_t rows, int64_t headDim, int64_t width, int64_t paddedRows,
                        float* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const Bf16* upper = from + i * stride;
    const bool both = i + 1 < rows;
    if (i + rowsAhead + 1 < rows) prefetchRows(upper + rowsAhead * stride, stride, 2, headDim);
    overVectors(headDim, [&](int64_t j, auto part) {
      const VecBits low = bitsOf(load(upper + j, part)) >> 16;
      const VecBits high = both ? bitsOf(load(upper + stride + j, part)) : VecBits{};
      store(to + i / 2 * width + j, fromBits(low | high), Whole{});
    });
  }
  const int64_t filled = (rows + 1) / 2;
  zeroWords(to + filled * width, (paddedRows / 2 - filled) * width);
}
#endif

// --- masks ---

// What a block of queries [query, query + blockRows) sees of the keys [key, key + count).
struct Visible {
  int64_t keys;  // the first `keys` cover all that any of the queries sees; 0: none
  bool all;      // each query sees all of them
};
KERNEL_INLINE Visible visible(int64_t query, int64_t key, int64_t count, int64_t window) {
  const int64_t keys = least(count, query + blockRows - key);
  if (keys <= 0 || (window > 0 && key + count <= query - window + 1)) return {0, false};
  return {keys, key + keys - 1 <= query && (window <= 0 || query + blockRows - window <= key)};
}

KERNEL_INLINE VecInt columnNumbers() {
  VecInt numbers;
  for (int i = 0; i < lanes; ++i) numbers[i] = i;
  return numbers;
}

// Scores of keys, `vectors` vectors from `key` on, become -infinity where the query does not see the key.
KERNEL_INLINE void maskRow(float* scores, int64_t vectors, int64_t query, int64_t key, int64_t window) {
  const int32_t last = static_cast<int32_t>(greatest(least(query - key, vectors * lanes), -1));
  const int32_t first = window > 0 ? static_cast<int32_t>(greatest(query - window + 1 - key, -1)) : -1;
  const int64_t start = window > 0 ? 0 : (last + 1) / lanes;
  VecInt column = columnNumbers() + static_cast<int32_t>(start * lanes);
  for (int64_t j = start; j < vectors; ++j, column += lanes) {
    const Vec v = load(scores + j * lanes, Whole{});
    store(scores + j * lanes, (column > last) | (column < first) ? broadcast(-__builtin_inff()) : v, Whole{});
  }
}

void fillAttentionGrad(Kernels& table);
void fillAttentionCached(Kernels& table);

}  // namespace lora_da::cpu::KERNEL_ISA
