// Attention of one query over a cache of keys and values, as decoding needs it (attention_forward.cu has the formulas).
//
// q, o [1, heads*headDim]; keys, values [length, kvHeads*headDim]. The rows of a tile are the query heads of one key head, so
// that keys and values are read once for all of them. A block has a range of keys, of which its warps take turns; each warp
// leaves its sums, relative to its own maxima, in scratch memory, and a second kernel joins them head by head.
#include <algorithm>

#include "cuda/attention_tiles.h"
#include "cuda/cuda_device.h"

namespace lora_da::cuda {

namespace {

template <class Element, int headDim>
struct CachedPlan;
template <int headDim>
struct CachedPlan<Bf16, headDim> {
  using Math = Bf16Math<headDim, 1, headDim <= 128 ? 32 : 16>;
};
template <int headDim>
struct CachedPlan<float, headDim> {
  using Math = F32Math<headDim, 4, headDim <= 64 ? 32 : headDim <= 128 ? 16 : 8>;
};

template <class Math>
struct CachedShared {
  static constexpr int tileKeys = attentionWarps * Math::columns;
  static constexpr int queryBytes = Math::warpRows * Math::Layout::rowBytes;
  static constexpr int tileBytes = tileKeys * Math::Layout::rowBytes;
  static constexpr int bytes =
      queryBytes + std::max(2 * tileBytes, Staging<Math, float>::bytes) + attentionWarps * Math::exchangeBytes;

  unsigned char* start = sharedMemory<unsigned char>();
  __device__ unsigned char* queries() const { return start; }
  __device__ unsigned char* keys() const { return start + queryBytes; }
  __device__ unsigned char* values() const { return keys() + tileBytes; }
  __device__ unsigned char* staging() const { return keys(); }
  __device__ unsigned char* exchange() const { return start + bytes - (warp() + 1) * Math::exchangeBytes; }
};

// What a warp knows of a head: sums [heads, parts, headDim] relative to 2^maximum, and maximum and sum of exponentials.
struct Parts {
  float* sums;
  float2* exponents;  // [heads, parts]
  int32_t count;
  int32_t keys;  // of a block
};

template <class Math>
__global__ void __launch_bounds__(attentionThreads, 2)
    attentionCachedKernel(AttentionProblem problem, const typename Math::Element* q, Rows<const typename Math::Element> keys,
                          Rows<const typename Math::Element> values, Parts parts) {
  using Shared = CachedShared<Math>;
  const Shared shared;
  const int32_t headDim = problem.headDim, keyHead = static_cast<int32_t>(blockIdx.y);
  const bool vectors = problem.vectors != 0;
  // Rows of the tile: query heads [firstHead, firstHead + headCount).
  const int32_t inGroup = static_cast<int32_t>(blockIdx.z) * Math::warpRows;
  const int32_t firstHead = keyHead * problem.group + inGroup, headCount = min(Math::warpRows, problem.group - inGroup);
  const int32_t from = problem.rows - problem.window + static_cast<int32_t>(blockIdx.x) * parts.keys;
  const int32_t to = min(from + parts.keys, problem.rows);
  const auto headKeys = headRows(keys, keyHead, headDim), headValues = headRows(values, keyHead, headDim);
  const Rows<const typename Math::Element> queries{q + int64_t{firstHead} * headDim, headDim};
  startTile<Math::headDim, Math::warpRows>(shared.queries(), queries, headDim, vectors, 0, 0, headCount);

  OnlineSoftmax<Math> softmax;
  typename Math::Sums sums;
  clearSums<Math>(sums);
  const auto copyTile = [&](int32_t i, int) {
    const int32_t key = from + i * Shared::tileKeys;
    startTile<Math::headDim, Shared::tileKeys>(shared.keys(), headKeys, headDim, vectors, key, from, to);
    startTile<Math::headDim, Shared::tileKeys>(shared.values(), headValues, headDim, vectors, key, from, to);
  };
  const auto addTile = [&](int32_t i, int) {
    const int32_t key = from + i * Shared::tileKeys + warp() * Math::columns;
    if (key >= to) return;
    const int warpOffset = warp() * Math::columns * Math::Layout::rowBytes;
    typename Math::Scores scores;
    Math::multiply(shared.queries(), shared.keys() + warpOffset, scores);
#pragma unroll
    for (int c = 0; c < Math::threadColumns; ++c) {
      if (key + Math::column(c) < to) continue;
#pragma unroll
      for (int r = 0; r < Math::threadRows; ++r) scores.at(r, c) = -INFINITY;
    }
    softmax.update(problem.scale * log2OfE, scores, sums);
    Math::accumulate(scores, shared.values() + warpOffset, shared.exchange(), sums);
  };
  overTiles<1>(ceilDivide(to - from, Shared::tileKeys), copyTile, addTile);
  softmax.finish();
  const int32_t part = static_cast<int32_t>(blockIdx.x) * attentionWarps + warp();
  const auto owns = [&](int32_t row) { return row < headCount; };
  const Rows<float> own{parts.sums + (int64_t{firstHead} * parts.count + part) * headDim, int64_t{parts.count} * headDim};
  storeSums<Math>(
      sums, shared.staging(), own, 0, headDim, vectors, [](int) { return 1.0f; }, owns);
#pragma unroll
  for (int r = 0; r < Math::threadRows; ++r) {
    const int32_t row = ownRow<Math>(r);
    if (lane() % Math::lanesPerRow != 0 || !owns(row)) continue;
    parts.exponents[int64_t{firstHead + row} * parts.count + part] = make_float2(softmax.maximum[r], softmax.sum[r]);
  }
}

constexpr int joinWarps = 8;
constexpr int joinThreads = joinWarps * warpThreads;
constexpr int mostLaneElements = maxAttentionHeadDim / warpThreads;

// Parts of one head joined: sums of up to maxAttentionHeadDim elements, dealt out to the lanes of a warp.
struct Joined {
  float maximum = -INFINITY;
  float sum = 0;
  float value[mostLaneElements] = {};

  __device__ void add(float otherMaximum, float otherSum, const float* otherValues, int32_t headDim) {
    const float largest = fmaxf(maximum, otherMaximum);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    const float own = exp2Flushed(maximum - shift), other = exp2Flushed(otherMaximum - shift);
    maximum = largest;
    sum = sum * own + otherSum * other;
#pragma unroll
    for (int e = 0; e < mostLaneElements; ++e) {
      const int32_t column = e * warpThreads + lane();
      if (column < headDim) value[e] = value[e] * own + otherValues[column] * other;
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(joinThreads) joinPartsKernel(Parts parts, int32_t headDim, Element* out) {
  // [joinWarps, 2 + headDim]: what each warp has joined.
  auto* shared = sharedMemory<float>();
  const int64_t head = blockIdx.x, firstPart = head * parts.count;
  Joined joined;
  for (int32_t part = warp(); part < parts.count; part += joinWarps) {
    const float2 exponents = parts.exponents[firstPart + part];
    joined.add(exponents.x, exponents.y, parts.sums + (firstPart + part) * headDim, headDim);
  }
  float* own = shared + warp() * (2 + headDim);
  own[0] = joined.maximum;
  own[1] = joined.sum;
#pragma unroll
  for (int e = 0; e < mostLaneElements; ++e) {
    if (e * warpThreads + lane() < headDim) own[2 + e * warpThreads + lane()] = joined.value[e];
  }
  __syncthreads();
  if (warp() != 0) return;
  for (int other = 1; other < joinWarps; ++other) {
    const float* from = shared + other * (2 + headDim);
    joined.add(from[0], from[1], from + 2, headDim);
  }
#pragma unroll
  for (int e = 0; e < mostLaneElements; ++e) {
    const int32_t column = e * warpThreads + lane();
    if (column < headDim) store<1>(out + head * headDim + column, Floats<1>{{joined.value[e] / joined.sum}});
  }
}

// Keys of a block: whole tiles, more than one where that leaves four blocks for each of 132 multiprocessors.
int32_t keysOfBlock(int32_t keys, int32_t tileKeys, int64_t blocksOfRange) {
  constexpr int64_t enoughBlocks = 528;
  const int64_t tiles = ceilDivide(keys, tileKeys);
  return static_cast<int32_t>(std::max<int64_t>(1, tiles * blocksOfRange / enoughBlocks)) * tileKeys;
}

}  // namespace

void CudaDevice::attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                                 const Matrix& out) {
  requireAttentionShape(shape, q, keys);
  AttentionProblem problem = attentionProblem({}, shape, keys, values, q);
  withAttentionPlan<CachedPlan>(q.dtype, shape.headDim, [&](auto plan) {
    using Math = typename decltype(plan)::Math;
    using Element = typename Math::Element;
    using Shared = CachedShared<Math>;
    const int32_t batches = ceilDivide(problem.group, Math::warpRows);
    Parts parts{};
    parts.keys = keysOfBlock(problem.window, Shared::tileKeys, int64_t{shape.kvHeads} * batches);
    const int32_t ranges = ceilDivide(problem.window, parts.keys);
    parts.count = ranges * attentionWarps;
    const int64_t partCount = int64_t{shape.heads} * parts.count;
    parts.exponents =
        static_cast<float2*>(scratch(static_cast<size_t>(partCount) * (sizeof(float2) + shape.headDim * sizeof(float))));
    parts.sums = reinterpret_cast<float*>(parts.exponents + partCount);
    queue_.launch("attentionCached", attentionCachedKernel<Math>,
                  dim3(static_cast<unsigned>(ranges), static_cast<unsigned>(shape.kvHeads), static_cast<unsigned>(batches)),
                  dim3(attentionThreads), Shared::bytes, problem, q.as<const Element>(), rowsOf<const Element>(keys),
                  rowsOf<const Element>(values), parts);
    queue_.launch("attentionCached: join", joinPartsKernel<Element>, dim3(static_cast<unsigned>(shape.heads)), dim3(joinThreads),
                  static_cast<size_t>(joinWarps * (2 + shape.headDim)) * sizeof(float), parts, shape.headDim, out.as<Element>());
  });
}

}  // namespace lora_da::cuda
