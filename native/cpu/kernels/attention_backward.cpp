// Backward of attention_forward.cpp (Dao 2022, FlashAttention):
//
//   P = exp(S - lse),  D = rowsum(do * o),  dS = P * (do v^T - D)
//   dv = P^T do,  dk = scale dS^T q,  dq = scale dS k,  dv and dk summed over the query heads
//
// Everything is packed once (see attention_tiles.h), keys for all heads. Head by head, so that its packed queries stay in the
// second cache, a span of keys meets the queries that see it, a span at a time: first S, do v^T, P, dS and dq in blocks of query
// rows, then dv and dk in blocks of key rows over the whole span of queries, so that their sums are loaded and stored rarely.
//
// Sums are float32 whatever the compute type. With products of pairs P and dS are rounded to bfloat16.
#include "cpu/kernels/attention_tiles.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

constexpr int64_t keySpan = 2 * tile;
constexpr int64_t querySpan = 6 * tile;
static_assert(keySpan % tile == 0 && querySpan % blockRows == 0 && blockRows % 2 == 0, "pairs of queries are within blocks");

// What the backward pass of a group reads and writes, as in TypedKernels::attentionGroupGrad. Row 0 is the first of the group's
// queries.
template <class T>
struct GradTensors {
  const T* q = nullptr;
  const T* out = nullptr;
  const T* dout = nullptr;
  T* dq = nullptr;
  const float* lse = nullptr;
  int64_t qStride = 0, outStride = 0, doutStride = 0, dqStride = 0, lseStride = 0;
};

// One query head: its tensors and its packed operands, of words.
template <class T>
struct QueryHead : GradTensors<T> {
  float* queries;         // rows
  float* douts;           // rows
  float* queriesStacked;  // stacked
  float* doutsStacked;    // stacked
  float* dqSums;          // [queries, width]
  float* log2Sums;        // [queries]: lse in powers of two
  float* d;               // [queries]
};

// The sizes of a group and the layout of its scratch memory.
template <class T>
struct GradWork {
  static constexpr int64_t count = Operand<T>::count;

  int64_t headDim, depth, width, rowWidth, window, end, firstKey, firstQuery, queryCount, paddedKeys, paddedQueries;
  float scale;
  float* keysAcross;    // across
  float* valuesAcross;  // across
  float* keys;          // stacked
  float* scores;        // [blockRows, keySpan]: S
  float* slopes;        // [blockRows, keySpan]: do v^T
  float* p;             // [querySpan / count, keySpan] stacked
  float* ds;            // [querySpan / count, keySpan] stacked
  float* dsRows;        // [blockRows, keySpan / count]: dS of a block again, for the product with k
  float* queries;       // the packed operands of the head at work
  int64_t headWords;

  GradWork(const AttentionGroup& group, float* scratch)
      : headDim(group.shape.headDim),
        depth(words<T>(headDim)),
        width(attentionRowWidth(group.shape.headDim)),
        rowWidth(rowWords<T>(headDim)),
        window(group.shape.window),
        end(group.firstQuery + group.queryCount),
        firstKey(group.firstKey),
        firstQuery(group.firstQuery),
        queryCount(group.queryCount),
        paddedKeys(attentionKeyRows(group)),
        paddedQueries(roundUp(group.queryCount, blockRows)),
        scale(group.shape.scale),
        keysAcross(scratch),
        valuesAcross(keysAcross + paddedKeys * depth),
        keys(valuesAcross + paddedKeys * depth),
        scores(keys + paddedKeys / count * width),
        slopes(scores + blockRows * keySpan),
        p(slopes + blockRows * keySpan),
        ds(p + querySpan / count * keySpan),
        dsRows(ds + querySpan / count * keySpan),
        queries(dsRows + blockRows * keySpan / count),
        headWords(paddedQueries * (2 * rowWidth + width + 2) + 2 * (paddedQueries / count * width)) {}

  QueryHead<T> head(const GradTensors<T>& tensors, int64_t i) const {
    QueryHead<T> h;
    static_cast<GradTensors<T>&>(h) = tensors;
    h.q += i * headDim;
    h.out += i * headDim;
    h.dout += i * headDim;
    h.dq += i * headDim;
    h.lse += i;
    h.queries = queries;
    h.douts = h.queries + paddedQueries * rowWidth;
    h.queriesStacked = h.douts + paddedQueries * rowWidth;
    h.doutsStacked = h.queriesStacked + paddedQueries / count * width;
    h.dqSums = h.doutsStacked + paddedQueries / count * width;
    h.log2Sums = h.dqSums + paddedQueries * width;
    h.d = h.log2Sums + paddedQueries;
    return h;
  }
};

template <class T>
int64_t attentionGradScratch(const AttentionGroup& group) {
  float* none = nullptr;
  const GradWork<T> work(group, none);
  return work.queries - none + work.headWords;
}

// Packs the queries [row, row + rows) of a head; those beyond the last are padding.
template <class T>
void packQueries(const GradWork<T>& w, const QueryHead<T>& h, int64_t row, int64_t rows) {
  const int64_t real = least(rows, w.queryCount - row);
  const T* q = h.q + row * h.qStride;
  const T* dout = h.dout + row * h.doutStride;
  const T* out = h.out + row * h.outStride;
  packRows(q, h.qStride, real, w.headDim, rows, h.queries + row * w.rowWidth);
  packRows(dout, h.doutStride, real, w.headDim, rows, h.douts + row * w.rowWidth);
  packStacked(q, h.qStride, real, w.headDim, w.width, rows, h.queriesStacked + row / w.count * w.width);
  packStacked(dout, h.doutStride, real, w.headDim, w.width, rows, h.doutsStacked + row / w.count * w.width);
  for (int64_t i = 0; i < real; ++i) {
    if (i + rowsAhead < real) prefetchRows(out + (i + rowsAhead) * h.outStride, h.outStride, 1, w.headDim);
    Vec products{};
    overVectors(w.headDim, [&](int64_t j, auto part) {
      products += load(dout + i * h.doutStride + j, part) * load(out + i * h.outStride + j, part);
    });
    h.d[row + i] = sumOfLanes(products);
    h.log2Sums[row + i] = h.lse[(row + i) * h.lseStride] * log2e;
  }
  for (int64_t i = real; i < rows; ++i) {
    h.d[row + i] = 0;
    h.log2Sums[row + i] = -noMaximum;  // its probabilities are all 0
  }
}

// Rows `i` and `i + 1` of a block: scores and slopes become P and dS, stacked from `to` on and dS in rows too.
template <class T>
KERNEL_INLINE void scoreGrads(const GradWork<T>& w, int i, int64_t vectors, const float* log2Sums, const float* d, int64_t to) {
  using Element = typename Operand<T>::Element;
  constexpr int64_t count = Operand<T>::count;
  Element* p = reinterpret_cast<Element*>(w.p + to);
  Element* ds = reinterpret_cast<Element*>(w.ds + to);
  const float scale = w.scale * log2e;
  const float* scores = w.scores + i * keySpan;
  const float* slopes = w.slopes + i * keySpan;
  for (int64_t j = 0; j < vectors; ++j) {
    Vec e[2], s[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      e[r] = exp2OfBounded<Operand<T>::rounded>(load(scores + r * keySpan + j * lanes, Whole{}) * scale - log2Sums[i + r]);
      s[r] = e[r] * (load(slopes + r * keySpan + j * lanes, Whole{}) - d[i + r]);
    }
    storeStacked(p + j * lanes, keySpan, e[0], e[1]);
    storeStacked(ds + j * lanes, keySpan, s[0], s[1]);
    if constexpr (count > 1) {
      for (int r = 0; r < 2; ++r) {
        store(reinterpret_cast<Bf16*>(w.dsRows + (i + r) * (keySpan / count)) + j * lanes, s[r], Whole{});
      }
    }
  }
}

// Queries of a head that are packed soon.
template <class T>
struct Ahead {
  QueryHead<T> head;
  int64_t row;
  int64_t rows;

  // Asks for the rows of `m` that correspond to the block at `i` of the queries at work. A tensor at a time: the processor waits
  // where it is asked for much at once.
  void prefetch(const T* m, int64_t stride, int64_t i, int64_t headDim) const {
    prefetchRows(m + (row + i) * stride, stride, least(blockRows, rows - i), headDim);
  }
};

// The keys [key, key + keys) against the queries [row, row + rows) of a head, counted from the group's first.
template <class T>
void gradSpan(const GradWork<T>& w, const QueryHead<T>& h, int64_t key, int64_t keys, int64_t row, int64_t rows,
              const Ahead<T>& ahead, float* dk, float* dv) {
  using Element = typename Operand<T>::Element;
  constexpr int64_t count = Operand<T>::count;
  const int64_t keyRow = key - w.firstKey, query = w.firstQuery + row, vectorsAcross = w.width / lanes;
  const auto element = [](const float* words) { return reinterpret_cast<const Element*>(words); };
  const Left<Element> queryRows{element(h.queries + row * w.rowWidth), w.rowWidth, 1};
  const Left<Element> doutRows{element(h.douts + row * w.rowWidth), w.rowWidth, 1};
  const Panel<Element> keyPanel{element(w.keys + keyRow / count * w.width), w.width};

  int64_t firstRow = rows, endRow = 0;  // of the blocks that see any of the keys
  for (int64_t i = 0; i < rows; i += blockRows) {
    const Visible seen = visible(query + i, key, keys, w.window);
    if (seen.keys == 0) continue;
    ahead.prefetch(ahead.head.q, ahead.head.qStride, i, w.headDim);
    firstRow = least(firstRow, i);
    endRow = i + blockRows;
    const int64_t vectors = (seen.keys + lanes - 1) / lanes;
    for (int64_t j = 0; j < vectors; j += tile / lanes) {
      const int64_t panel = (keyRow + j * lanes) * w.depth, now = least(vectors - j, tile / lanes);
      multiply<blockRows, Start::zero>(queryRows.from(i), Panel<Element>{element(w.keysAcross + panel), tile}, w.depth, nullptr,
                                       w.scores + j * lanes, keySpan, now);
      multiply<blockRows, Start::zero>(doutRows.from(i), Panel<Element>{element(w.valuesAcross + panel), tile}, w.depth, nullptr,
                                       w.slopes + j * lanes, keySpan, now);
    }
    ahead.prefetch(ahead.head.dout, ahead.head.doutStride, i, w.headDim);
    if (!seen.all) {
      for (int r = 0; r < blockRows; ++r) maskRow(w.scores + r * keySpan, vectors, query + i + r, key, w.window);
    }
    const int64_t stacked = i / count * keySpan;
#pragma GCC unroll 3
    for (int r = 0; r < blockRows; r += 2) {
      scoreGrads<T>(w, r, vectors, h.log2Sums + row + i, h.d + row + i, stacked + r / count * keySpan);
    }
    ahead.prefetch(ahead.head.out, ahead.head.outStride, i, w.headDim);
    // Blocks of keys that end beyond what these queries see read on.
    for (int64_t r = 0; r < blockRows / count; ++r) {
      for (int64_t j = vectors * lanes; j < least(roundUp(seen.keys, blockRows), keys); j += lanes) {
        store(w.p + stacked + r * keySpan + j, Vec{}, Whole{});
        store(w.ds + stacked + r * keySpan + j, Vec{}, Whole{});
      }
    }
    const float* ds = count > 1 ? w.dsRows : w.ds + stacked;
    const Left<Element> dsRows{element(ds), keySpan / count, 1};
    float* dq = h.dqSums + (row + i) * w.width;
    if (key == w.firstKey || (w.window > 0 && key <= query + i - w.window + 1)) {  // the first keys that these queries see
      multiply<blockRows, Start::zero>(dsRows, keyPanel, words<T>(seen.keys), nullptr, dq, w.width, vectorsAcross);
    } else {
      multiply<blockRows, Start::sum>(dsRows, keyPanel, words<T>(seen.keys), nullptr, dq, w.width, vectorsAcross);
    }
    if (query + i + blockRows <= key + keys || key + keys >= w.end) {  // the last
      for (int64_t r = 0; r < least(blockRows, w.end - query - i); ++r) {
        T* to = h.dq + (row + i + r) * h.dqStride;
        overVectors(w.headDim, [&](int64_t j, auto part) { store(to + j, w.scale * load(dq + r * w.width + j, Whole{}), part); });
      }
    }
  }

  for (int64_t j = 0; j < keys; j += blockRows) {
    const int64_t from = greatest(firstRow, key + j - query) / count * count;
    const int64_t to = w.window > 0 ? least(endRow, roundUp(key + j + blockRows - 1 + w.window - query, count)) : endRow;
    if (from >= to) continue;
    const int64_t first = from / count, sums = (to - from) / count, operand = (row / count + first) * w.width;
    multiply<blockRows, Start::sum>(Left<Element>{element(w.p + first * keySpan + j), 1, keySpan},
                                    Panel<Element>{element(h.doutsStacked + operand), w.width}, sums, nullptr, dv + j * w.width,
                                    w.width, vectorsAcross);
    multiply<blockRows, Start::sum>(Left<Element>{element(w.ds + first * keySpan + j), 1, keySpan},
                                    Panel<Element>{element(h.queriesStacked + operand), w.width}, sums, nullptr, dk + j * w.width,
                                    w.width, vectorsAcross);
  }
}

template <class T>
void attentionGroupGrad(const AttentionGroup& group, const void* out, const void* dout, int64_t outStride, int64_t doutStride,
                        const float* lse, int64_t lseStride, void* dq, int64_t dqStride, float* dk, float* dv, float* scratch) {
  const GradWork<T> w(group, scratch);
  const int64_t keyCount = w.end - w.firstKey, heads = group.shape.heads / group.shape.kvHeads;
  const T* k = static_cast<const T*>(group.k) + group.firstKey * group.kStride;
  const T* v = static_cast<const T*>(group.v) + group.firstKey * group.vStride;
  packAcross(k, group.kStride, keyCount, w.headDim, w.keysAcross);
  packAcross(v, group.vStride, keyCount, w.headDim, w.valuesAcross);
  packStacked(k, group.kStride, keyCount, w.headDim, w.width, w.paddedKeys, w.keys);
  GradTensors<T> tensors;
  tensors.q = static_cast<const T*>(group.q) + group.firstQuery * group.qStride;
  tensors.out = static_cast<const T*>(out) + group.firstQuery * outStride;
  tensors.dout = static_cast<const T*>(dout) + group.firstQuery * doutStride;
  tensors.dq = static_cast<T*>(dq) + group.firstQuery * dqStride;
  tensors.lse = lse + group.firstQuery * lseStride;
  tensors.qStride = group.qStride;
  tensors.outStride = outStride;
  tensors.doutStride = doutStride;
  tensors.dqStride = dqStride;
  tensors.lseStride = lseStride;

  for (int64_t i = 0; i < heads; ++i) {
    const QueryHead<T> head = w.head(tensors, i);
    int64_t packed = 0;  // queries of this head
    for (int64_t key = w.firstKey; key < w.end; key += keySpan) {
      const int64_t keyRow = key - w.firstKey, keys = least(keySpan, w.paddedKeys - keyRow);
      const int64_t seenFrom = greatest(0, (key - w.firstQuery) / blockRows * blockRows);
      const int64_t seenTo =
          w.window > 0 ? least(w.paddedQueries, roundUp(key + keys - 1 + w.window - w.firstQuery, blockRows)) : w.paddedQueries;
      const int64_t spans = greatest(1, (seenTo - seenFrom + querySpan - 1) / querySpan);
      const int64_t span = roundUp((seenTo - seenFrom + spans - 1) / spans, blockRows);  // about equal ones
      float* keyGrads = dk + keyRow * w.width;
      float* valueGrads = dv + keyRow * w.width;
      if (i == 0) {
        zeroWords(keyGrads, keys * w.width);
        zeroWords(valueGrads, keys * w.width);
      }
      for (int64_t row = seenFrom; row < seenTo; row += span) {
        const int64_t rows = least(span, seenTo - row), fresh = greatest(row, packed);
        Ahead<T> ahead{head, row + rows, 0};
        if (fresh < row + rows) {
          packQueries(w, head, fresh, row + rows - fresh);
          packed = row + rows;
          if (packed >= w.paddedQueries && i + 1 < heads) ahead = {w.head(tensors, i + 1), 0, 0};
          ahead.rows = greatest(0, least(span, w.queryCount - ahead.row));
        }
        gradSpan(w, head, key, keys, row, rows, ahead, keyGrads, valueGrads);
      }
      if (i + 1 < heads) continue;
      for (int64_t j = 0; j < keys * w.width; j += lanes) store(keyGrads + j, w.scale * load(keyGrads + j, Whole{}), Whole{});
    }
  }
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.attentionGroupGrad = attentionGroupGrad<T>;
  table.attentionGradScratch = attentionGradScratch<T>;
}

}  // namespace

void fillAttentionGrad(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
}

}  // namespace lora_da::cpu::KERNEL_ISA
