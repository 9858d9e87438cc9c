// Causal softmax attention of the query heads of one key head over one sequence, in tiles (Dao 2022, FlashAttention).
//
//   S = scale q k^T,  P = softmax(S),  o = P v,  lse = log of each row's sum of exponentials
//
// k and v are packed once for all query heads (see attention_tiles.h). Of the queries, a tile at a time goes over the keys, a
// span at a time, in blocks of rows whose scores stay in the nearest cache from one product to the other. Exponentials are powers
// of two, of scores times scale * log2(e), relative to a running maximum that is raised only where a score exceeds it by more
// than `slack`: then sums stay far from overflow, and the output is hardly ever rescaled.
//
// Sums are float32 whatever the compute type. With products of pairs P is rounded to bfloat16; its sum is taken before.
#include "cpu/kernels/attention_tiles.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

constexpr int64_t keySpan = 4 * tile;
constexpr int64_t queryTile = tile;
constexpr float slack = 8;

template <class T>
int64_t attentionScratch(const AttentionGroup& group) {
  const int64_t headDim = group.shape.headDim, width = attentionRowWidth(group.shape.headDim);
  return attentionKeyRows(group) * (words<T>(headDim) + width / Operand<T>::count) + queryTile * rowWords<T>(headDim) +
         blockRows * keySpan + queryTile * (width + lanes + 1);
}

// The state of a query tile between spans of keys.
struct Running {
  float* out;      // [queryTile, width], relative to the maximum
  float* sum;      // [queryTile, lanes]: a row's sum of exponentials is the sum of its lanes
  float* maximum;  // [queryTile], in powers of two

  Running from(int64_t row, int64_t width) const { return {out + row * width, sum + row * lanes, maximum + row}; }
};

// Raises the maxima of a block to which scores [blockRows, keySpan] are added; factor[i] = what the row's sums shrink by.
KERNEL_INLINE Start raiseMaxima(const float* scores, int64_t vectors, float scale, const Running& running, float* factor) {
  bool raised = false, fresh = true;
  for (int i = 0; i < blockRows; ++i) {
    const float* row = scores + i * keySpan;
    Vec peaks = load(row, Whole{});
    for (int64_t j = 1; j < vectors; ++j) peaks = larger(load(row + j * lanes, Whole{}), peaks);
    const float before = running.maximum[i];
    fresh = fresh && before == noMaximum;
    factor[i] = 1;  // also of nothing
    if (!anyAbove(peaks * scale, before + slack)) continue;
    running.maximum[i] = scale * maxOfLanes(peaks);
    if (before == noMaximum) continue;
    factor[i] = exp2OfBounded<false>(broadcast(before - running.maximum[i]))[0];
    raised = true;
  }
  return fresh ? Start::zero : raised ? Start::scaled : Start::sum;
}

// Scores become exponentials relative to the maximum, as elements of the product with v, in place.
template <class T>
KERNEL_INLINE void exponentials(float* scores, int64_t vectors, float scale, const Running& running, const float* factor) {
  using Element = typename Operand<T>::Element;
  for (int i = 0; i < blockRows; ++i) {
    float* row = scores + i * keySpan;
    Element* to = reinterpret_cast<Element*>(row);
    const Vec maximum = broadcast(running.maximum[i]);
    const auto exponential = [&](int64_t j) {
      return exp2OfBounded<Operand<T>::rounded>(load(row + j * lanes, Whole{}) * scale - maximum);
    };
    Vec sum = factor[i] * load(running.sum + i * lanes, Whole{});
    int64_t j = 0;
    for (; j + 2 <= vectors; j += 2) {
      const Vec a = exponential(j), b = exponential(j + 1);
      sum += a + b;
      storeNeighbours(to + j * lanes / Operand<T>::count, a, b);
    }
    if (j < vectors) {
      const Vec a = exponential(j);
      sum += a;
      storeNeighbours(to + j * lanes / Operand<T>::count, a, Vec{});
    }
    store(running.sum + i * lanes, sum, Whole{});
  }
}

template <class T>
void attentionGroup(const AttentionGroup& group, void* out, int64_t outStride, float* lse, int64_t lseStride, float* scratch) {
  using Element = typename Operand<T>::Element;
  constexpr int64_t count = Operand<T>::count;
  const int64_t headDim = group.shape.headDim, width = attentionRowWidth(group.shape.headDim), window = group.shape.window;
  const int64_t depth = words<T>(headDim), paddedKeys = attentionKeyRows(group), vectorsAcross = width / lanes;
  const int64_t end = group.firstQuery + group.queryCount, keyCount = end - group.firstKey;
  const float scale = group.shape.scale * log2e;

  float* keys = scratch;                                       // across
  float* values = keys + paddedKeys * depth;                   // stacked
  float* queries = values + paddedKeys / count * width;        // rows
  float* scores = queries + queryTile * rowWords<T>(headDim);  // [blockRows, keySpan]
  Running tileState;
  tileState.out = scores + blockRows * keySpan;
  tileState.sum = tileState.out + queryTile * width;
  tileState.maximum = tileState.sum + queryTile * lanes;
  packAcross(static_cast<const T*>(group.k) + group.firstKey * group.kStride, group.kStride, keyCount, headDim, keys);
  packStacked(static_cast<const T*>(group.v) + group.firstKey * group.vStride, group.vStride, keyCount, headDim, width,
              paddedKeys, values);

  const auto queryOf = [&](int64_t token, int64_t head) {
    return static_cast<const T*>(group.q) + token * group.qStride + head * headDim;
  };
  const auto outOf = [&](int64_t token, int64_t head) { return static_cast<T*>(out) + token * outStride + head * headDim; };
  const int64_t heads = group.shape.heads / group.shape.kvHeads;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t first = group.firstQuery; first < end; first += queryTile) {
      const int64_t rows = least(queryTile, end - first);
      packRows(queryOf(first, head), group.qStride, rows, headDim, queryTile, queries);
      const bool lastOfHead = first + queryTile >= end;
      const int64_t nextFirst = lastOfHead ? group.firstQuery : first + queryTile, nextHead = lastOfHead ? head + 1 : head;
      const int64_t nextRows = nextHead < heads ? least(queryTile, end - nextFirst) : 0;
      const Left<Element> left{reinterpret_cast<const Element*>(queries), rowWords<T>(headDim), 1};
      zeroWords(tileState.sum, queryTile * lanes);
      for (int64_t i = 0; i < queryTile; ++i) tileState.maximum[i] = noMaximum;

      const int64_t seenFrom = window > 0 ? greatest((first - window + 1) / tile * tile, group.firstKey) : group.firstKey;
      for (int64_t key = seenFrom; key < first + rows; key += keySpan) {
        const int64_t keyRow = key - group.firstKey;
        const Panel<Element> valuePanel{reinterpret_cast<const Element*>(values + keyRow / count * width), width};
        for (int64_t row = 0; row < rows; row += blockRows) {
          const Visible seen = visible(first + row, key, keySpan, window);
          if (seen.keys == 0) continue;
          if (key == seenFrom) {
            prefetchRows<true>(outOf(first + row, head), outStride, least(blockRows, rows - row), headDim);
            prefetchRows(queryOf(nextFirst + row, nextHead), group.qStride, least(blockRows, nextRows - row), headDim);
          }
          const int64_t vectors = (seen.keys + lanes - 1) / lanes;
          for (int64_t j = 0; j < vectors; j += tile / lanes) {
            const Panel<Element> keyPanel{reinterpret_cast<const Element*>(keys + (keyRow + j * lanes) * depth), tile};
            multiply<blockRows, Start::zero>(left.from(row), keyPanel, depth, nullptr, scores + j * lanes, keySpan,
                                             least(vectors - j, tile / lanes));
          }
          if (!seen.all) {
            for (int i = 0; i < blockRows; ++i) maskRow(scores + i * keySpan, vectors, first + row + i, key, window);
          }
          const Running running = tileState.from(row, width);
          float factor[blockRows];
          const Start start = raiseMaxima(scores, vectors, scale, running, factor);
          exponentials<T>(scores, vectors, scale, running, factor);
          const Left<Element> weights{reinterpret_cast<const Element*>(scores), keySpan, 1};
          const int64_t sums = words<T>(seen.keys);
          if (start == Start::zero) {
            multiply<blockRows, Start::zero>(weights, valuePanel, sums, factor, running.out, width, vectorsAcross);
          } else if (start == Start::sum) {
            multiply<blockRows, Start::sum>(weights, valuePanel, sums, factor, running.out, width, vectorsAcross);
          } else {
            multiply<blockRows, Start::scaled>(weights, valuePanel, sums, factor, running.out, width, vectorsAcross);
          }
        }
      }

      float total[queryTile];
      for (int64_t i = 0; i < rows; ++i) {
        total[i] = sumOfLanes(load(tileState.sum + i * lanes, Whole{}));
        const float share = 1.0f / total[i];
        T* to = outOf(first + i, head);
        const float* from = tileState.out + i * width;
        overVectors(headDim, [&](int64_t j, auto part) { store(to + j, share * load(from + j, Whole{}), part); });
      }
      overVectors(rows, [&](int64_t i, auto part) {
        store(total + i, load(tileState.maximum + i, part) * ln2 + logOfNormal(load(total + i, part)), part);
      });
      for (int64_t i = 0; i < rows; ++i) lse[(first + i) * lseStride + head] = total[i];
    }
  }
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.attentionGroup = attentionGroup<T>;
  table.attentionScratch = attentionScratch<T>;
}

}  // namespace

void fillAttention(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
  fillAttentionGrad(table);
  fillAttentionCached(table);
}

}  // namespace lora_da::cpu::KERNEL_ISA
