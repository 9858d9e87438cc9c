// Attention of one new token over rows that are kept (decoding). It is bound by memory: keys and values are read once, in order,
// for up to four query heads of their key head. The rows are cut into parts that threads share (Dao et al. 2023, Flash-Decoding):
//
//   m = max s,  sum = sum of 2^(s - m),  out = sum of 2^(s - m) v      with s = scale log2(e) q k, over the rows of a part
//
// and merged, each weighted by 2^(m - largest m).
#include "cpu/kernels/attention_tiles.h"
#include "cpu/kernels/dots.h"

namespace lora_da::cpu::KERNEL_ISA {

namespace {

// Rows are asked for so long ahead, into the second-level cache: as many as are under way then, the nearest has no place for, and
// the processor waits.
constexpr int64_t askedAhead = 64;

// Rows whose scores are formed before their values are added.
constexpr int64_t stepRows = 64;
constexpr int mostQueries = 4;  // that share a pass over the rows
// Vectors of a value's row in registers, once for every query, and of the row itself.
constexpr int valueVectors = lanes == 16 ? 4 : 2;

// scores[i] from `at` on, a vector = scale * log2(e) * q_i k^T, -infinity beyond the last of `rows`, which are as many or fewer.
template <int queries, class T, class P>
KERNEL_INLINE void scoreRows(const CachedAttention& a, const T* q, const T* keys, int64_t rows, P part,
                             float (&scores)[queries][stepRows], int64_t at, Vec (&peaks)[queries]) {
  const auto key = [&](int64_t i) { return keys + (__is_same(P, Whole) ? i : least(i, rows - 1)) * a.keyStride; };
#pragma GCC unroll 4
  for (int i = 0; i < queries; ++i) {
    const T* query = q + i * a.headDim;
    Vec sums[lanes] = {};
    int64_t d = 0;
    for (; d + wideDot<T> <= a.headDim; d += wideDot<T>) {
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) sums[r] = addWide(sums[r], query + d, key(r) + d);
    }
    overVectors(a.headDim - d, [&](int64_t j, auto rest) {
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) sums[r] = addDot(sums[r], query + d + j, key(r) + d + j, rest);
    });
    const Vec products = keep(a.scale * log2e * sumsOfLanes(sums), part, -__builtin_inff());
    peaks[i] = larger(products, peaks[i]);
    store(scores[i] + at, products, Whole{});
  }
}

// Columns [col, col + vectors * lanes) of out[i] = factor[i] * out[i] + scores[i] v.
template <int queries, int vectors, class T, class P>
KERNEL_INLINE void addValues(const CachedAttention& a, const T* values, int64_t rows, const float (&scores)[queries][stepRows],
                             const float* factor, float* out, int64_t outStride, int64_t col, P last) {
  Vec sums[queries][vectors];
#pragma GCC unroll 4
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = factor[i] * load(out + i * outStride + col + v * lanes, Whole{});
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = values + row * a.valueStride + col;
    prefetchRows(from + askedAhead * a.valueStride, 0, 1, vectors * lanes);
    Vec value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v + 1 < vectors; ++v) value[v] = load(from + v * lanes, Whole{});
    value[vectors - 1] = load(from + (vectors - 1) * lanes, last);
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[i][v] += scores[i][row] * value[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + i * outStride + col + v * lanes, sums[i][v], Whole{});
  }
}

template <int queries, class T>
void attendQueries(const CachedAttention& a, const T* q, float* parts) {
  const int64_t floats = cachedPartFloats(a.headDim);
  float peaks[queries];
  Vec sums[queries];
  for (int i = 0; i < queries; ++i) {
    peaks[i] = noMaximum;
    sums[i] = Vec{};
    zeroWords(parts + i * floats, attentionRowWidth(a.headDim));
  }
  for (int64_t first = 0; first < a.rows; first += stepRows) {
    const int64_t rows = least(stepRows, a.rows - first);
    const T* keys = static_cast<const T*>(a.keys) + first * a.keyStride;
    const T* values = static_cast<const T*>(a.values) + first * a.valueStride;
    float scores[queries][stepRows], factor[queries];
    Vec found[queries];
    for (int i = 0; i < queries; ++i) found[i] = broadcast(peaks[i]);
    overVectors(rows, [&](int64_t row, auto part) {
      prefetchRows(keys + (row + askedAhead) * a.keyStride, a.keyStride, lanes, a.headDim);
      scoreRows(a, q, keys + row * a.keyStride, rows - row, part, scores, row, found);
    });
    for (int i = 0; i < queries; ++i) {
      const float before = peaks[i];
      peaks[i] = maxOfLanes(found[i]);
      factor[i] = exp2OfBounded<false>(broadcast(before - peaks[i]))[0];
      sums[i] *= factor[i];
      for (int64_t j = 0; j < rows; j += lanes) {
        const Vec e = exp2OfBounded<false>(load(scores[i] + j, Whole{}) - peaks[i]);
        sums[i] += e;
        store(scores[i] + j, e, Whole{});
      }
    }
    int64_t col = 0;
    for (; col + valueVectors * lanes <= a.headDim; col += valueVectors * lanes) {
      addValues<queries, valueVectors>(a, values, rows, scores, factor, parts, floats, col, Whole{});
    }
    overVectors(a.headDim - col, [&](int64_t j, auto part) {
      addValues<queries, 1>(a, values, rows, scores, factor, parts, floats, col + j, part);
    });
  }
  for (int i = 0; i < queries; ++i) {
    float* result = parts + i * floats + attentionRowWidth(a.headDim);
    result[0] = peaks[i];
    result[1] = sumOfLanes(sums[i]);
  }
}

template <class T>
void attentionCachedPart(const CachedAttention& a, float* parts) {
  for (int64_t i = 0; i < a.queries; i += mostQueries) {
    const T* q = static_cast<const T*>(a.q) + i * a.headDim;
    float* to = parts + i * cachedPartFloats(a.headDim);
    switch (least(mostQueries, a.queries - i)) {
      case 1: attendQueries<1>(a, q, to); break;
      case 2: attendQueries<2>(a, q, to); break;
      case 3: attendQueries<3>(a, q, to); break;
      default: attendQueries<mostQueries>(a, q, to);
    }
  }
}

template <class T>
void mergeCached(const float* parts, int64_t count, int64_t stride, int32_t headDim, void* out) {
  const float* results = parts + attentionRowWidth(headDim);  // of each part: its m and its sum
  float peak = noMaximum;
  for (int64_t p = 0; p < count; ++p) peak = results[p * stride] > peak ? results[p * stride] : peak;
  float weights[mostCachedParts];
  double total = 0;
  for (int64_t p = 0; p < count; ++p) {
    weights[p] = exp2OfBounded<false>(broadcast(results[p * stride] - peak))[0];
    total += static_cast<double>(weights[p]) * static_cast<double>(results[p * stride + 1]);
  }
  const float share = static_cast<float>(1 / total);
  overVectors(headDim, [&](int64_t j, auto part) {
    Vec sum{};
    for (int64_t p = 0; p < count; ++p) sum += weights[p] * load(parts + p * stride + j, Whole{});
    store(static_cast<T*>(out) + j, share * sum, part);
  });
}

template <class T>
void fillTyped(TypedKernels& table) {
  table.attentionCachedPart = attentionCachedPart<T>;
  table.mergeCached = mergeCached<T>;
}

}  // namespace

void fillAttentionCached(Kernels& table) {
  fillTyped<float>(table.f32);
  fillTyped<Bf16>(table.bf16);
}

}  // namespace lora_da::cpu::KERNEL_ISA
