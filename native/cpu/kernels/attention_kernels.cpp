// Causal softmax attention of one query head over one sequence, in tiles, with its backward (Dao 2022, FlashAttention).
//
// forward:   S = scale q k^T,  P = softmax(S),  o = P v,  lse = log of each row's sum of exponentials
// backward:  P = exp(S - lse),  D = rowsum(do * o),  dS = P * (do v^T - D),
//            dv = P^T do,  dk = scale dS^T q,  dq = scale dS k
//
// Everything is packed once per head: k (and for backward v) transposed in tiles of attentionTile keys, [tile][depth][key]; the
// rest in float32, [token][width], width = headDim padded with zeros to whole vectors. Query tiles have queryTile rows, worked on
// in blocks of blockRows: the scores of a block stay in the nearest cache between the two products. Exponentials are powers of
// two, of scores times scale * log2(e).
//
// Products and sums are float32 whatever the compute type. Where the processor multiplies pairs of bfloat16 into a float32 sum,
// the products of two inputs, q k^T and do v^T, use that: the factors are exact there too, and it is twice as fast.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

constexpr float log2e = 1.44269504089f;
constexpr float ln2 = 0.69314718056f;
// Stands for "nothing seen yet" in the running maximum: finite, so that the difference with itself is 0 and not NaN.
constexpr float noMaximum = -1e30f;

constexpr int64_t tile = attentionTile;
constexpr int blockRows = 6;
constexpr int64_t queryTile = 8 * blockRows;
// Vectors of a register block: blockRows x blockVectors accumulators, blockVectors of B and one of A fit the register file.
constexpr int blockVectors = lanes == 16 ? 4 : 2;

constexpr int64_t roundUp(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
KERNEL_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
KERNEL_INLINE int64_t greatest(int64_t a, int64_t b) {
  return a > b ? a : b;
}

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

KERNEL_INLINE Vec addProduct(Vec sum, float left, Vec right) {
  return sum + broadcast(left) * right;
}

#if defined(__AVX512BF16__)
// Two neighbours of the summed dimension; lanes hold pairs too.
struct Pair {
  uint32_t bits;
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

// c [rows, vectors * lanes] = (c * factor[i], or 0 where factor is null) + A [rows, depth] b [depth, vectors * lanes].
template <int rows, int vectors, class Element>
void multiplyBlock(Left<Element> a, Panel<Element> b, int64_t depth, const float* factor, float* c, int64_t cRow) {
  Vec sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = factor ? load(c + i * cRow + j * lanes, Whole{}) * factor[i] : Vec{};
  }
  const Element* left = a.data;
  const Element* right = b.data;
  for (int64_t d = 0; d < depth; ++d) {
    Vec r[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) r[j] = load(right + j * lanes, Whole{});
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = addProduct(sum[i][j], left[i * a.row], r[j]);
    }
    left += a.step;
    right += b.row;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * cRow + j * lanes, sum[i][j], Whole{});
  }
}

// The same for any number of vectors.
template <int rows, class Element>
void multiply(Left<Element> a, Panel<Element> b, int64_t depth, const float* factor, float* c, int64_t cRow, int64_t vectors) {
  for (; vectors >= blockVectors; vectors -= blockVectors) {
    multiplyBlock<rows, blockVectors>(a, b, depth, factor, c, cRow);
    b.data += blockVectors * lanes;
    c += blockVectors * lanes;
  }
  if constexpr (blockVectors > 2) {
    if (vectors == 3) multiplyBlock<rows, 3>(a, b, depth, factor, c, cRow);
    if (vectors == 2) multiplyBlock<rows, 2>(a, b, depth, factor, c, cRow);
  }
  if (vectors == 1) multiplyBlock<rows, 1>(a, b, depth, factor, c, cRow);
}

constexpr float ones[blockRows] = {1, 1, 1, 1, 1, 1};

// --- packing ---

// to [paddedRows, width] = from [rows, cols], zero outside.
template <class T>
void packRows(const T* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t paddedRows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = to + i * width;
    overVectors(cols, [&](int64_t j, auto part) { store(row + j, load(from + i * stride + j, part), Whole{}); });
    for (int64_t j = roundUp(cols, lanes); j < width; j += lanes) store(row + j, Vec{}, Whole{});
  }
  for (int64_t j = rows * width; j < paddedRows * width; j += lanes) store(to + j, Vec{}, Whole{});
}

// How the factors of scores are packed: as they are in float32.
template <class T>
struct ScoreFactors {
  using Element = float;
  static int64_t depth(int64_t headDim) { return headDim; }
  // Elements [d, d + lanes) of a token, zero from headDim on.
  static KERNEL_INLINE Vec lanesOf(const T* token, int64_t d, int64_t headDim) {
    return d + lanes <= headDim ? load(token + d, Whole{}) : load(token + d, Part{static_cast<int>(headDim - d)});
  }
  // The left factor is what packRows has made.
  static Left<float> left(const float* packed, int64_t width, const T*, int64_t, int64_t, int64_t, int64_t, float*) {
    return {packed, width, 1};
  }
  static int64_t leftFloats(int64_t, int64_t) { return 0; }
};

#if defined(__AVX512BF16__)
// As pairs where the processor has products of them; an odd headDim's last pair has a zero.
template <>
struct ScoreFactors<Bf16> {
  using Element = Pair;
  static int64_t depth(int64_t headDim) { return (headDim + 1) / 2; }
  static KERNEL_INLINE Vec lanesOf(const Bf16* token, int64_t d, int64_t headDim) {
    if (2 * (d + lanes) <= headDim) return load(reinterpret_cast<const float*>(token + 2 * d), Whole{});
    VecBits bits{};
    for (int i = 0; i < lanes && 2 * (d + i) < headDim; ++i) {
      const Bf16* pair = token + 2 * (d + i);
      bits[i] = pair[0].bits | (2 * (d + i) + 1 < headDim ? static_cast<uint32_t>(pair[1].bits) << 16 : 0u);
    }
    return fromBits(bits);
  }
  // to [paddedRows, depth], depth padded to whole vectors = the pairs of from [rows, headDim], zero outside.
  static Left<Pair> left(const float*, int64_t, const Bf16* from, int64_t stride, int64_t headDim, int64_t rows,
                         int64_t paddedRows, float* to) {
    const int64_t width = roundUp(depth(headDim), lanes);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < width; d += lanes) store(to + i * width + d, lanesOf(from + i * stride, d, headDim), Whole{});
    }
    for (int64_t j = rows * width; j < paddedRows * width; j += lanes) store(to + j, Vec{}, Whole{});
    return {reinterpret_cast<const Pair*>(to), width, 1};
  }
  static int64_t leftFloats(int64_t rows, int64_t headDim) { return rows * roundUp(depth(headDim), lanes); }
};
#endif

// to [tiles][depth][tile] = the score factors of from [rows, headDim], transposed within each tile of rows, zero outside.
template <class T>
void packTransposed(const T* from, int64_t stride, int64_t rows, int64_t headDim, float* to) {
  const int64_t depth = ScoreFactors<T>::depth(headDim);
  for (int64_t first = 0; first < rows; first += lanes) {
    float* out = to + first / tile * tile * depth + first % tile;
    const int64_t count = least(lanes, rows - first);
    for (int64_t d = 0; d < depth; d += lanes) {
      Vec square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        square[i] = i < count ? ScoreFactors<T>::lanesOf(from + (first + i) * stride, d, headDim) : Vec{};
      transpose(square);
      const int64_t height = least(lanes, depth - d);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < height) store(out + (d + i) * tile, square[i], Whole{});
      }
    }
  }
  for (int64_t first = roundUp(rows, lanes); first < roundUp(rows, tile); first += lanes) {
    float* out = to + first / tile * tile * depth + first % tile;
    for (int64_t d = 0; d < depth; ++d) store(out + d * tile, Vec{}, Whole{});
  }
}

// --- masks ---

// What a block of queries [query, query + blockRows) sees of the tile of keys [key, key + tile).
struct Visible {
  int64_t keys;  // the tile's first `keys` cover all that any of the queries sees; 0: none
  bool all;      // each query sees all of them
};
Visible visible(int64_t query, int64_t key, int64_t window) {
  const int64_t keys = least(tile, query + blockRows - key);
  if (keys <= 0 || (window > 0 && key + tile <= query - window + 1)) return {0, false};
  return {keys, key + keys - 1 <= query && (window <= 0 || query + blockRows - window <= key)};
}

KERNEL_INLINE VecInt columnNumbers() {
  VecInt numbers;
  for (int i = 0; i < lanes; ++i) numbers[i] = i;
  return numbers;
}

// Element j of `row`, a query's values for `vectors` vectors of keys from `key` on, becomes `fill` where the query does not see
// the key.
void maskRow(float* row, int64_t vectors, int64_t query, int64_t key, int64_t window, float fill) {
  const int32_t last = static_cast<int32_t>(least(query - key, tile));
  const int32_t first = window > 0 ? static_cast<int32_t>(greatest(query - window + 1 - key, -1)) : -1;
  VecInt column = columnNumbers();
  for (int64_t j = 0; j < vectors; ++j, column += lanes) {
    const Vec v = load(row + j * lanes, Whole{});
    store(row + j * lanes, (column > last) | (column < first) ? broadcast(fill) : v, Whole{});
  }
}

// --- forward ---

// The state of a query tile between key tiles.
struct Running {
  float* out;      // [queryTile, width], relative to the maximum
  float* maximum;  // [queryTile], in powers of two
  float* sum;      // [queryTile, lanes]: a row's sum of exponentials is the sum of its lanes
};

// scores [blockRows, tile] become exponentials relative to the running maximum, which they may raise by -log2(factor). `scale` is
// positive.
void softmaxBlock(float* scores, int64_t vectors, float scale, float* maximum, float* sum, float* factor) {
  float raised[16];
  for (int i = 0; i < blockRows; ++i) {
    const float* row = scores + i * tile;
    Vec peaks = load(row, Whole{});
    for (int64_t j = 1; j < vectors; ++j) peaks = larger(load(row + j * lanes, Whole{}), peaks);
    const float peak = scale * maxOfLanes(peaks);
    raised[i] = peak > maximum[i] ? peak : maximum[i];
  }
  for (int i = 0; i < blockRows; ++i) {
    const float peak = raised[i];
    const float f = exp2OfNonPositive(broadcast(maximum[i] - peak))[0];
    float* row = scores + i * tile;
    Vec total = load(sum + i * lanes, Whole{}) * f;
    for (int64_t j = 0; j < vectors; ++j) {
      const Vec e = exp2OfNonPositive(load(row + j * lanes, Whole{}) * scale - peak);
      total += e;
      store(row + j * lanes, e, Whole{});
    }
    store(sum + i * lanes, total, Whole{});
    maximum[i] = peak;
    factor[i] = f;
  }
}

template <class T>
int64_t attentionScratch(const AttentionHead& head) {
  const int64_t headDim = head.shape.headDim, width = attentionRowWidth(head.shape.headDim);
  return attentionGradRows(head) * (headDim + width) + queryTile * (2 * width + 1 + lanes) + blockRows * tile +
         ScoreFactors<T>::leftFloats(queryTile, headDim);
}

template <class T>
void attentionHead(const AttentionHead& head, void* out, int64_t outStride, float* lse, int64_t lseStride, float* scratch) {
  using Factors = ScoreFactors<T>;
  using Element = typename Factors::Element;
  const int64_t headDim = head.shape.headDim, window = head.shape.window;
  const int64_t width = attentionRowWidth(head.shape.headDim), depth = Factors::depth(headDim);
  const int64_t paddedKeys = attentionGradRows(head);
  const int64_t end = head.firstQuery + head.queryCount, keyCount = end - head.firstKey;
  const float scale = head.shape.scale * log2e;

  float* keys = scratch;                         // [tiles][depth][tile]
  float* values = keys + paddedKeys * headDim;   // [paddedKeys, width]
  float* queries = values + paddedKeys * width;  // [queryTile, width]
  const Running running{queries + queryTile * width, queries + 2 * queryTile * width, queries + queryTile * (2 * width + 1)};
  float* scores = running.sum + queryTile * lanes;  // [blockRows, tile]
  float* queryFactors = scores + blockRows * tile;  // [queryTile, depth] where that is not `queries`

  packTransposed(static_cast<const T*>(head.k) + head.firstKey * head.kStride, head.kStride, keyCount, headDim, keys);
  packRows(static_cast<const T*>(head.v) + head.firstKey * head.vStride, head.vStride, keyCount, headDim, values, paddedKeys,
           width);

  for (int64_t first = head.firstQuery; first < end; first += queryTile) {
    const int64_t rows = least(queryTile, end - first);
    const T* q = static_cast<const T*>(head.q) + first * head.qStride;
    if (Factors::leftFloats(1, headDim) == 0) packRows(q, head.qStride, rows, headDim, queries, queryTile, width);
    const Left<Element> left = Factors::left(queries, width, q, head.qStride, headDim, rows, queryTile, queryFactors);
    for (int64_t i = 0; i < queryTile * width; ++i) running.out[i] = 0;
    for (int64_t i = 0; i < queryTile * lanes; ++i) running.sum[i] = 0;
    for (int64_t i = 0; i < queryTile; ++i) running.maximum[i] = noMaximum;

    for (int64_t key = head.firstKey; key < first + rows; key += tile) {
      const Panel<Element> keyPanel{reinterpret_cast<const Element*>(keys + (key - head.firstKey) * depth), tile};
      const Panel<float> valuePanel{values + (key - head.firstKey) * width, width};
      for (int64_t row = 0; row < rows; row += blockRows) {
        const Visible seen = visible(first + row, key, window);
        if (seen.keys == 0) continue;
        const int64_t vectors = (seen.keys + lanes - 1) / lanes;
        multiply<blockRows>(left.from(row), keyPanel, depth, nullptr, scores, tile, vectors);
        if (!seen.all) {
          for (int i = 0; i < blockRows; ++i)
            maskRow(scores + i * tile, vectors, first + row + i, key, window, -__builtin_inff());
        }
        float factor[blockRows];
        softmaxBlock(scores, vectors, scale, running.maximum + row, running.sum + row * lanes, factor);
        multiply<blockRows>(Left<float>{scores, tile, 1}, valuePanel, seen.keys, factor, running.out + row * width, width,
                            width / lanes);
      }
    }

    for (int64_t i = 0; i < rows; ++i) {
      const float sum = sumOfLanes(load(running.sum + i * lanes, Whole{}));
      const float share = 1.0f / sum;
      T* to = static_cast<T*>(out) + (first + i) * outStride;
      const float* from = running.out + i * width;
      overVectors(headDim, [&](int64_t j, auto part) { store(to + j, share * load(from + j, Whole{}), part); });
      lse[(first + i) * lseStride] = static_cast<float>(running.maximum[i] * static_cast<double>(ln2) + __builtin_log(sum));
    }
  }
}

// --- backward ---

template <class T>
int64_t attentionGradScratch(const AttentionHead& head) {
  const int64_t headDim = head.shape.headDim, width = attentionRowWidth(head.shape.headDim);
  const int64_t queries = roundUp(head.queryCount, queryTile);
  return attentionGradRows(head) * (2 * headDim + width) + queries * (3 * width + 2) + 2 * queryTile * tile +
         2 * ScoreFactors<T>::leftFloats(queries, headDim);
}

// Probabilities and score gradients of one row: p holds scores and becomes P, ds holds do v^T and becomes dS.
KERNEL_INLINE void scoreGradRow(float* p, float* ds, int64_t vectors, float scale, float lse, float d) {
  for (int64_t j = 0; j < vectors; ++j) {
    const Vec e = exp2OfNonPositive(load(p + j * lanes, Whole{}) * scale - lse);
    store(p + j * lanes, e, Whole{});
    store(ds + j * lanes, e * (load(ds + j * lanes, Whole{}) - d), Whole{});
  }
}

// The packed operands of one head's backward pass.
template <class Element>
struct GradOperands {
  int64_t depth, width, window, end;
  float scale;                  // of scores, for powers of two
  const Element* keysAcross;    // [tiles][depth][tile]
  const Element* valuesAcross;  // [tiles][depth][tile]
  Left<Element> queryFactors;   // [queries, depth]
  Left<Element> doutFactors;    // [queries, depth]
  float* keys;                  // [paddedKeys, width]
  float* queries;               // [queries, width]
  float* dout;                  // [queries, width]
  float* dq;                    // [queries, width]
  float* lse;                   // [queries], in powers of two
  float* d;                     // [queries]
  float* p;                     // [queryTile, tile]
  float* ds;                    // [queryTile, tile]
};

// One tile of keys (`key`, the `keyRow`-th packed) against one tile of queries (`query`, the `row`-th packed).
template <class Element>
void gradTile(const GradOperands<Element>& o, int64_t key, int64_t keyRow, int64_t query, int64_t row, float* dk, float* dv) {
  const int64_t width = o.width, vectorsAcross = width / lanes;
  const Panel<Element> keyPanel{o.keysAcross + keyRow * o.depth, tile}, valuePanel{o.valuesAcross + keyRow * o.depth, tile};
  const Panel<float> keyRows{o.keys + keyRow * width, width};
  // Queries of this tile that see any of the keys, in whole blocks.
  const int64_t rowsHere = least(queryTile, roundUp(o.end - query, blockRows));
  int64_t firstRow = rowsHere, endRow = 0;
  for (int64_t i = 0; i < rowsHere; i += blockRows) {
    const Visible seen = visible(query + i, key, o.window);
    if (seen.keys == 0) continue;
    firstRow = least(firstRow, i);
    endRow = i + blockRows;
    const int64_t vectors = (seen.keys + lanes - 1) / lanes;
    float* p = o.p + i * tile;
    float* ds = o.ds + i * tile;
    multiply<blockRows>(o.queryFactors.from(row + i), keyPanel, o.depth, nullptr, p, tile, vectors);
    multiply<blockRows>(o.doutFactors.from(row + i), valuePanel, o.depth, nullptr, ds, tile, vectors);
    for (int r = 0; r < blockRows; ++r) {
      scoreGradRow(p + r * tile, ds + r * tile, vectors, o.scale, o.lse[row + i + r], o.d[row + i + r]);
      if (seen.all) continue;
      // The whole row: blocks of keys below read what this block of queries has not computed.
      maskRow(p + r * tile, tile / lanes, query + i + r, key, o.window, 0.0f);
      maskRow(ds + r * tile, tile / lanes, query + i + r, key, o.window, 0.0f);
    }
    multiply<blockRows>(Left<float>{ds, tile, 1}, keyRows, seen.keys, ones, o.dq + (row + i) * width, width, vectorsAcross);
  }
  const auto keyBlock = [&](auto blockSize, int64_t j) {
    constexpr int size = decltype(blockSize)::value;
    const int64_t from = greatest(firstRow, key + j - query);
    const int64_t to = o.window > 0 ? least(endRow, key + j + size - 1 + o.window - query) : endRow;
    if (from >= to) return;
    multiply<size>(Left<float>{o.p + from * tile + j, 1, tile}, Panel<float>{o.dout + (row + from) * width, width}, to - from,
                   ones, dv + j * width, width, vectorsAcross);
    multiply<size>(Left<float>{o.ds + from * tile + j, 1, tile}, Panel<float>{o.queries + (row + from) * width, width}, to - from,
                   ones, dk + j * width, width, vectorsAcross);
  };
  int64_t j = 0;
  for (; j + blockRows <= tile; j += blockRows) keyBlock(std::integral_constant<int, blockRows>{}, j);
  if constexpr (tile % blockRows != 0) keyBlock(std::integral_constant<int, tile % blockRows>{}, j);
}

template <class T>
void attentionHeadGrad(const AttentionHead& head, const void* out, const void* dout, int64_t outStride, int64_t doutStride,
                       const float* lse, int64_t lseStride, void* dq, int64_t dqStride, float* dk, float* dv, float* scratch) {
  using Factors = ScoreFactors<T>;
  using Element = typename Factors::Element;
  const int64_t headDim = head.shape.headDim, width = attentionRowWidth(head.shape.headDim);
  const int64_t paddedKeys = attentionGradRows(head), paddedQueries = roundUp(head.queryCount, queryTile);
  const int64_t end = head.firstQuery + head.queryCount, keyCount = end - head.firstKey;

  const T* k = static_cast<const T*>(head.k) + head.firstKey * head.kStride;
  const T* v = static_cast<const T*>(head.v) + head.firstKey * head.vStride;
  const T* q = static_cast<const T*>(head.q) + head.firstQuery * head.qStride;
  const T* g = static_cast<const T*>(dout) + head.firstQuery * doutStride;
  const T* y = static_cast<const T*>(out) + head.firstQuery * outStride;

  GradOperands<Element> o{};
  o.depth = Factors::depth(headDim);
  o.width = width;
  o.window = head.shape.window;
  o.end = end;
  o.scale = head.shape.scale * log2e;
  float* keysAcross = scratch;
  float* valuesAcross = keysAcross + paddedKeys * headDim;
  o.keys = valuesAcross + paddedKeys * headDim;
  o.queries = o.keys + paddedKeys * width;
  o.dout = o.queries + paddedQueries * width;
  o.dq = o.dout + paddedQueries * width;
  o.p = o.dq + paddedQueries * width;
  o.ds = o.p + queryTile * tile;
  float* queryFactors = o.ds + queryTile * tile;
  float* doutFactors = queryFactors + Factors::leftFloats(paddedQueries, headDim);
  o.lse = doutFactors + Factors::leftFloats(paddedQueries, headDim);
  o.d = o.lse + paddedQueries;

  packTransposed(k, head.kStride, keyCount, headDim, keysAcross);
  packTransposed(v, head.vStride, keyCount, headDim, valuesAcross);
  o.keysAcross = reinterpret_cast<const Element*>(keysAcross);
  o.valuesAcross = reinterpret_cast<const Element*>(valuesAcross);
  packRows(k, head.kStride, keyCount, headDim, o.keys, paddedKeys, width);
  packRows(q, head.qStride, head.queryCount, headDim, o.queries, paddedQueries, width);
  packRows(g, doutStride, head.queryCount, headDim, o.dout, paddedQueries, width);
  o.queryFactors = Factors::left(o.queries, width, q, head.qStride, headDim, head.queryCount, paddedQueries, queryFactors);
  o.doutFactors = Factors::left(o.dout, width, g, doutStride, headDim, head.queryCount, paddedQueries, doutFactors);
  for (int64_t i = 0; i < paddedQueries; ++i) {
    const bool real = i < head.queryCount;
    Vec products{};
    if (real) {
      overVectors(headDim, [&](int64_t j, auto part) {
        products += load(g + i * doutStride + j, part) * load(y + i * outStride + j, part);
      });
    }
    o.d[i] = sumOfLanes(products);
    // A padding query's probabilities are all 0.
    o.lse[i] = real ? lse[(head.firstQuery + i) * lseStride] * log2e : -noMaximum;
  }
  for (int64_t i = 0; i < paddedQueries * width; ++i) o.dq[i] = 0;
  for (int64_t i = 0; i < paddedKeys * width; ++i) dk[i] = 0;
  for (int64_t i = 0; i < paddedKeys * width; ++i) dv[i] = 0;

  for (int64_t key = head.firstKey; key < end; key += tile) {
    const int64_t keyRow = key - head.firstKey;
    for (int64_t row = 0; row < head.queryCount; row += queryTile) {
      gradTile(o, key, keyRow, head.firstQuery + row, row, dk + keyRow * width, dv + keyRow * width);
    }
    for (int64_t i = 0; i < tile * width; ++i) dk[keyRow * width + i] *= head.shape.scale;
  }
  for (int64_t i = 0; i < head.queryCount; ++i) {
    T* to = static_cast<T*>(dq) + (head.firstQuery + i) * dqStride;
    const float* from = o.dq + i * width;
    overVectors(headDim, [&](int64_t j, auto part) { store(to + j, head.shape.scale * load(from + j, Whole{}), part); });
  }
}

// --- decoding ---

template <class T>
void attentionCachedHead(const void* q, const void* keys, int64_t keyStride, const void* values, int64_t valueStride,
                         int64_t length, const AttentionShape& shape, void* out, float* scratch) {
  const int64_t headDim = shape.headDim;
  const int64_t first = shape.window > 0 ? greatest(length - shape.window, 0) : 0;
  const int64_t count = length - first;
  const T* k = static_cast<const T*>(keys) + first * keyStride;
  const T* v = static_cast<const T*>(values) + first * valueStride;
  float query[maxHeadDim];
  overVectors(headDim, [&](int64_t j, auto part) {
    store(query + j, shape.scale * log2e * load(static_cast<const T*>(q) + j, part), part);
  });

  float peak = noMaximum;
  for (int64_t i = 0; i < count; ++i) {
    Vec products{};
    overVectors(headDim, [&](int64_t j, auto part) { products += load(query + j, part) * load(k + i * keyStride + j, part); });
    scratch[i] = sumOfLanes(products);
    peak = scratch[i] > peak ? scratch[i] : peak;
  }
  Vec total{};
  overVectors(count, [&](int64_t i, auto part) {
    const Vec e = keep(exp2OfNonPositive(load(scratch + i, part) - peak), part, 0.0f);
    total += e;
    store(scratch + i, e, part);
  });
  const float share = 1.0f / static_cast<float>(sumOfLanesDouble(total));

  float sums[maxHeadDim];
  for (int64_t j = 0; j < headDim; ++j) sums[j] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float weight = share * scratch[i];
    overVectors(headDim, [&](int64_t j, auto part) {
      store(sums + j, load(sums + j, part) + weight * load(v + i * valueStride + j, part), part);
    });
  }
  overVectors(headDim, [&](int64_t j, auto part) { store(static_cast<T*>(out) + j, load(sums + j, part), part); });
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.attentionHead = attentionHead<T>;
  table.attentionHeadGrad = attentionHeadGrad<T>;
  table.attentionCachedHead = attentionCachedHead<T>;
  table.attentionScratch = attentionScratch<T>;
  table.attentionGradScratch = attentionGradScratch<T>;
}

}  // namespace

void fillAttention(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
}

}  // namespace lora_da::cpu::KERNEL_ISA
