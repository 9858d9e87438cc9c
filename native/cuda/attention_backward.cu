// Gradient of attention (attention_forward.cu), which recomputes P from lse tile by tile:
//
//   P = exp(scale q k^T - lse),  dv = P^T dout,  delta = rowsum(dout o),  dS = P (dout v^T - delta),  dq = scale dS k,
//   dk = scale dS^T q
//
// First delta and lse, as a power of two, are laid out by head. Then blocks with a tile of keys of one key head go over the queries
// of its group's heads and sum dk and dv; blocks with a tile of queries go over their keys and sum dq. So every sum has one owner
// and a fixed order. Where there are fewer key tiles than a GPU holds blocks, the heads of a group are dealt out to several blocks,
// whose parts, float32 in scratch memory, are added afterwards. Scores of key tiles are transposed: a warp's rows are keys.
#include <algorithm>

#include "cuda/attention_tiles.h"
#include "cuda/cuda_device.h"

namespace lora_da::cuda {

namespace {

// Sizes that leave every accumulator in registers, and the block's shared memory within the 99 KB of the smallest GPUs.
template <class Element, int headDim>
struct QueryGradPlan;
template <int headDim>
struct QueryGradPlan<Bf16, headDim> {
  using Math = Bf16Math<headDim, headDim <= 128 ? 2 : 1, 32>;
  static constexpr int stages = headDim <= 128 ? 2 : 1;
};
template <int headDim>
struct QueryGradPlan<float, headDim> {
  using Math = F32Math<headDim, headDim <= 128 ? 4 : 2, headDim <= 64 ? 32 : 16>;
  static constexpr int stages = headDim <= 96 ? 2 : 1;
};

template <class Element, int headDim>
struct KeyGradPlan;
template <int headDim>
struct KeyGradPlan<Bf16, headDim> {
  using Math = Bf16Math<headDim, headDim <= 64 ? 2 : 1, headDim <= 128 ? 32 : 16>;
  static constexpr int stages = 2;
  static constexpr bool together = headDim <= 128;  // dk and dv in one kernel; else they would not fit into registers
};
template <int headDim>
struct KeyGradPlan<float, headDim> {
  using Math = F32Math<headDim, headDim <= 128 ? 4 : 2, headDim <= 64 ? 32 : 16>;
  static constexpr int stages = headDim <= 96 ? 2 : 1;
  static constexpr bool together = true;
};

// Two tiles that stay, and two for each stage that come and go, with two numbers for each of their rows where `statistics`.
template <class Plan, bool statistics>
struct GradShared {
  using Math = typename Plan::Math;
  static constexpr int tileRows = attentionWarps * Math::warpRows;
  static constexpr int ownBytes = tileRows * Math::Layout::rowBytes;
  static constexpr int otherBytes = Math::columns * Math::Layout::rowBytes;
  static constexpr int statisticBytes = statistics ? Math::columns * static_cast<int>(sizeof(float)) : 0;
  static constexpr int stageBytes = 2 * otherBytes + 2 * statisticBytes;
  static constexpr int streamBytes = std::max(Plan::stages * stageBytes, Staging<Math, float>::bytes);
  static constexpr int bytes = 2 * ownBytes + streamBytes + attentionWarps * Math::exchangeBytes;

  unsigned char* start = sharedMemory<unsigned char>();
  // Of the block, and of this warp.
  __device__ unsigned char* own(int which) const { return start + which * ownBytes; }
  __device__ unsigned char* warpOwn(int which) const { return own(which) + warp() * Math::warpRows * Math::Layout::rowBytes; }
  __device__ unsigned char* other(int which, int stage) const { return staging() + stage * stageBytes + which * otherBytes; }
  __device__ float* statistic(int which, int stage) const {
    return reinterpret_cast<float*>(other(2, stage) + which * statisticBytes);
  }
  __device__ unsigned char* staging() const { return start + 2 * ownBytes; }
  __device__ unsigned char* exchange() const { return staging() + streamBytes + warp() * Math::exchangeBytes; }
};

// By head, so that neighbouring rows lie side by side: [heads, stride].
struct RowStatistics {
  float* lse;    // times log2(e)
  float* delta;
  int64_t stride;  // a multiple of four, at least the number of rows
};

constexpr int deltaLanes = 8;  // of a row
constexpr int deltaRows = attentionThreads / deltaLanes;

template <class Element, int width>
__global__ void __launch_bounds__(attentionThreads)
    deltaKernel(AttentionProblem problem, Rows<const Element> out, Rows<const Element> dout, const float* lse,
                RowStatistics statistics) {
  const int32_t head = static_cast<int32_t>(blockIdx.y);
  const int32_t row = static_cast<int32_t>(blockIdx.x) * deltaRows + static_cast<int32_t>(threadIdx.x) / deltaLanes;
  const int32_t member = static_cast<int32_t>(threadIdx.x) % deltaLanes;
  float sum = 0;
  if (row < problem.rows) {
    const Element* o = headRows(out, head, problem.headDim)[row];
    const Element* d = headRows(dout, head, problem.headDim)[row];
    for (int32_t column = member * width; column < problem.headDim; column += deltaLanes * width) {
      const Floats<width> x = load<width>(o + column), y = load<width>(d + column);
#pragma unroll
      for (int i = 0; i < width; ++i) sum += x.at[i] * y.at[i];
    }
  }
  sum = sumOfLanes(sum, deltaLanes);
  if (row >= problem.rows || member != 0) return;
  statistics.delta[head * statistics.stride + row] = sum;
  statistics.lse[head * statistics.stride + row] = lse[int64_t{row} * problem.heads + head] * log2OfE;
}

template <class Plan>
__global__ void __launch_bounds__(attentionThreads, 2)
    queryGradKernel(AttentionProblem problem, Rows<const typename Plan::Math::Element> q,
                    Rows<const typename Plan::Math::Element> k, Rows<const typename Plan::Math::Element> v,
                    Rows<const typename Plan::Math::Element> dout, RowStatistics statistics,
                    Rows<typename Plan::Math::Element> dq) {
  using Math = typename Plan::Math;
  using Shared = GradShared<Plan, false>;
  const Shared shared;
  const int32_t headDim = problem.headDim, head = static_cast<int32_t>(blockIdx.y), keyHead = head / problem.group;
  const bool vectors = problem.vectors != 0;
  const int32_t from = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x) * Shared::tileRows;
  const int32_t to = min(from + Shared::tileRows, problem.rows), warpFirst = from + warp() * Math::warpRows;
  const auto keys = headRows(k, keyHead, headDim), values = headRows(v, keyHead, headDim);
  const auto headGrad = headRows(dq, head, headDim);
  startTile<Math::headDim, Shared::tileRows>(shared.own(0), headRows(q, head, headDim), headDim, vectors, from, from, to);
  startTile<Math::headDim, Shared::tileRows>(shared.own(1), headRows(dout, head, headDim), headDim, vectors, from, from, to);

  const float scale = problem.scale * log2OfE;
  float lse[Math::threadRows], delta[Math::threadRows];
#pragma unroll
  for (int r = 0; r < Math::threadRows; ++r) {
    const int64_t at = head * statistics.stride + min(warpFirst + ownRow<Math>(r), problem.rows - 1);
    lse[r] = statistics.lse[at];
    delta[r] = statistics.delta[at];
  }

  const auto differentiate = [&](const Segment& segment) {
    const KeyTiles<Math::columns> tiles(segment, problem.window, warpFirst, Math::warpRows);
    typename Math::Sums sums;
    clearSums<Math>(sums);
    const auto copyTile = [&](int32_t i, int stage) {
      const int32_t key = tiles.key(i), lowest = tiles.lowest();
      startTile<Math::headDim, Math::columns>(shared.other(0, stage), keys, headDim, vectors, key, lowest, segment.stop);
      startTile<Math::headDim, Math::columns>(shared.other(1, stage), values, headDim, vectors, key, lowest, segment.stop);
    };
    const auto addTile = [&](int32_t i, int stage) {
      const int32_t key = tiles.key(i);
      if (tiles.hidden(key)) return;
      typename Math::Scores scores, slopes;
      Math::multiply(shared.warpOwn(0), shared.other(0, stage), scores);
      Math::multiply(shared.warpOwn(1), shared.other(1, stage), slopes);
#pragma unroll
      for (int r = 0; r < Math::threadRows; ++r) {
#pragma unroll
        for (int c = 0; c < Math::threadColumns; ++c) {
          scores.at(r, c) = exp2f(scores.at(r, c) * scale - lse[r]) * (slopes.at(r, c) - delta[r]);
        }
      }
      if (!tiles.open(key)) hideScores<Math>(tiles, warpFirst, key, 0.0f, scores);
      Math::accumulate(scores, shared.other(0, stage), shared.exchange(), sums);
    };
    overTiles<Plan::stages>(tiles.count(), copyTile, addTile);
    __syncthreads();
    storeSums<Math>(
        sums, shared.staging(), headGrad, warpFirst, headDim, vectors, [&](int) { return problem.scale; },
        [&](int32_t row) { return tiles.ownsRow(row); });
  };
  overSegments(problem, from, to, differentiate,
               [&](int32_t first, int32_t last) { clearRows(headGrad, headDim, first, last); });
}

// Where a block's dk or dv goes: to the result, or, where blocks share a key head, to the block's part.
template <class Element>
struct KeyGrad {
  Rows<Element> result;
  float* parts;  // [parts, rows, kvHeads*headDim], or null
};

template <class Element>
__device__ inline Rows<float> partRows(const KeyGrad<Element>& grad, const AttentionProblem& problem, int32_t keyHead) {
  const int64_t width = int64_t{problem.kvHeads} * problem.headDim;
  return headRows(Rows<float>{grad.parts + int64_t{blockIdx.z} * problem.rows * width, width}, keyHead, problem.headDim);
}

template <class Math, class Tiles>
__device__ inline void storeKeyGrad(typename Math::Sums& sums, unsigned char* staging, const KeyGrad<typename Math::Element>& grad,
                                    const AttentionProblem& problem, int32_t keyHead, float scale, const Tiles& tiles,
                                    int32_t warpFirst) {
  const auto factor = [&](int) { return scale; };
  const auto owns = [&](int32_t row) { return tiles.ownsRow(row); };
  const bool vectors = problem.vectors != 0;
  if (grad.parts) {
    storeSums<Math>(sums, staging, partRows(grad, problem, keyHead), warpFirst, problem.headDim, vectors, factor, owns);
  } else {
    storeSums<Math>(sums, staging, headRows(grad.result, keyHead, problem.headDim), warpFirst, problem.headDim, vectors, factor,
                    owns);
  }
}

template <class Element>
__device__ inline void clearKeyGrad(const KeyGrad<Element>& grad, const AttentionProblem& problem, int32_t keyHead, int32_t from,
                                    int32_t to) {
  if (grad.parts)
    clearRows(partRows(grad, problem, keyHead), problem.headDim, from, to);
  else
    clearRows(headRows(grad.result, keyHead, problem.headDim), problem.headDim, from, to);
}

// dk where `forKeys`, dv where `forValues`.
template <class Plan, bool forKeys, bool forValues>
__global__ void __launch_bounds__(attentionThreads, 2)
    keyGradKernel(AttentionProblem problem, Rows<const typename Plan::Math::Element> q,
                  Rows<const typename Plan::Math::Element> k, Rows<const typename Plan::Math::Element> v,
                  Rows<const typename Plan::Math::Element> dout, RowStatistics statistics,
                  KeyGrad<typename Plan::Math::Element> dk, KeyGrad<typename Plan::Math::Element> dv) {
  using Math = typename Plan::Math;
  using Shared = GradShared<Plan, true>;
  const Shared shared;
  const int32_t headDim = problem.headDim, keyHead = static_cast<int32_t>(blockIdx.y);
  const bool vectors = problem.vectors != 0;
  const int32_t from = static_cast<int32_t>(blockIdx.x) * Shared::tileRows;
  const int32_t to = min(from + Shared::tileRows, problem.rows), warpFirst = from + warp() * Math::warpRows;
  const int32_t headCount = problem.group / static_cast<int32_t>(gridDim.z);
  const int32_t firstHead = keyHead * problem.group + static_cast<int32_t>(blockIdx.z) * headCount;
  startTile<Math::headDim, Shared::tileRows>(shared.own(0), headRows(k, keyHead, headDim), headDim, vectors, from, from, to);
  if (forKeys) {
    startTile<Math::headDim, Shared::tileRows>(shared.own(1), headRows(v, keyHead, headDim), headDim, vectors, from, from, to);
  }

  const auto differentiate = [&](const Segment& segment) {
    const QueryTiles<Math::columns> tiles(segment, problem.window, warpFirst, Math::warpRows);
    typename Math::Sums keySums, valueSums;
    if (forKeys) clearSums<Math>(keySums);
    if (forValues) clearSums<Math>(valueSums);
    const auto copyTile = [&](int32_t i, int stage) {
      const int32_t head = firstHead + i / tiles.count(), query = tiles.query(i % tiles.count());
      startTile<Math::headDim, Math::columns>(shared.other(0, stage), headRows(q, head, headDim), headDim, vectors, query,
                                              tiles.begin(), tiles.end());
      startTile<Math::headDim, Math::columns>(shared.other(1, stage), headRows(dout, head, headDim), headDim, vectors, query,
                                              tiles.begin(), tiles.end());
      const int32_t row = static_cast<int32_t>(threadIdx.x) * 4;
      if (row >= Math::columns) return;
      const int64_t at = head * statistics.stride + query + row;
      const bool inside = query + row < statistics.stride;
      copyAsync16(shared.statistic(0, stage) + row, statistics.lse + (inside ? at : 0), inside);
      copyAsync16(shared.statistic(1, stage) + row, statistics.delta + (inside ? at : 0), inside);
    };
    const auto addTile = [&](int32_t i, int stage) {
      const int32_t query = tiles.query(i % tiles.count());
      if (tiles.hidden(query)) return;
      const bool open = tiles.open(query);
      const float scale = problem.scale * log2OfE;
      typename Math::Scores scores;
      Math::multiply(shared.warpOwn(0), shared.other(0, stage), scores);
#pragma unroll
      for (int c = 0; c < Math::threadColumns; ++c) {
        const float lse = shared.statistic(0, stage)[Math::column(c)];
#pragma unroll
        for (int r = 0; r < Math::threadRows; ++r) scores.at(r, c) = exp2f(scores.at(r, c) * scale - lse);
      }
      if (!open) hideScores<Math>(tiles, warpFirst, query, 0.0f, scores);
      if (forValues) Math::accumulate(scores, shared.other(1, stage), shared.exchange(), valueSums);
      if (!forKeys) return;
      typename Math::Scores slopes;
      Math::multiply(shared.warpOwn(1), shared.other(1, stage), slopes);
#pragma unroll
      for (int c = 0; c < Math::threadColumns; ++c) {
        const float delta = shared.statistic(1, stage)[Math::column(c)];
#pragma unroll
        for (int r = 0; r < Math::threadRows; ++r) slopes.at(r, c) = scores.at(r, c) * (slopes.at(r, c) - delta);
      }
      if (!open) hideScores<Math>(tiles, warpFirst, query, 0.0f, slopes);
      Math::accumulate(slopes, shared.other(0, stage), shared.exchange(), keySums);
    };
    overTiles<Plan::stages>(tiles.count() * headCount, copyTile, addTile);
    __syncthreads();
    if (forKeys) storeKeyGrad<Math>(keySums, shared.staging(), dk, problem, keyHead, problem.scale, tiles, warpFirst);
    if (forValues) storeKeyGrad<Math>(valueSums, shared.staging(), dv, problem, keyHead, 1.0f, tiles, warpFirst);
  };
  overSegments(problem, from, to, differentiate, [&](int32_t first, int32_t last) {
    if (forKeys) clearKeyGrad(dk, problem, keyHead, first, last);
    if (forValues) clearKeyGrad(dv, problem, keyHead, first, last);
  });
}

constexpr int sumThreads = 256;

// result [rows, width] = sum of the parts.
template <class Element>
__global__ void __launch_bounds__(sumThreads) sumPartsKernel(KeyGrad<Element> grad, int32_t parts, int64_t rows, int64_t width) {
  const int64_t row = blockIdx.x, column = int64_t{blockIdx.y} * sumThreads + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int32_t part = 0; part < parts; ++part) sum += grad.parts[(part * rows + row) * width + column];
  store<1>(grad.result[row] + column, Floats<1>{{sum}});
}

// Blocks that share a key tile: a divisor of the group, so that GPUs of up to 132 multiprocessors get two blocks each.
int32_t keyGradParts(int32_t keyTiles, const AttentionProblem& problem) {
  constexpr int64_t enoughBlocks = 264;
  for (int32_t parts = 1; parts < problem.group; ++parts) {
    if (problem.group % parts == 0 && int64_t{keyTiles} * problem.kvHeads * parts >= enoughBlocks) return parts;
  }
  return problem.group;
}

}  // namespace

void CudaDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                               const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                               const Matrix& dk, const Matrix& dv) {
  requireAttentionShape(shape, q, k);
  const AttentionProblem problem = attentionProblem(sequences, shape, q, k, v, out, dout, dq, dk, dv);
  const auto heads = static_cast<unsigned>(shape.heads), kvHeads = static_cast<unsigned>(shape.kvHeads);
  withAttentionPlan<KeyGradPlan>(q.dtype, shape.headDim, [&](auto keyPlan) {
    using Plan = decltype(keyPlan);
    using Element = typename Plan::Math::Element;
    using Shared = GradShared<Plan, true>;
    const int32_t tiles = ceilDivide(problem.rows, Shared::tileRows), parts = keyGradParts(tiles, problem);

    const int64_t stride = (problem.rows + int64_t{3}) / 4 * 4, partFloats = parts > 1 ? parts * dk.rows * dk.cols : 0;
    auto* memory = static_cast<float*>(scratch(static_cast<size_t>(2 * shape.heads * stride + 2 * partFloats) * sizeof(float)));
    const RowStatistics statistics{memory, memory + shape.heads * stride, stride};
    float* keyParts = memory + 2 * shape.heads * stride;
    const KeyGrad<Element> keyGrad{rowsOf<Element>(dk), parts > 1 ? keyParts : nullptr};
    const KeyGrad<Element> valueGrad{rowsOf<Element>(dv), parts > 1 ? keyParts + partFloats : nullptr};
    const Rows<const Element> queries = rowsOf<const Element>(q), keys = rowsOf<const Element>(k),
                              values = rowsOf<const Element>(v), gradient = rowsOf<const Element>(dout);

    const auto deltas = problem.vectors ? deltaKernel<Element, fullWidth<Element>> : deltaKernel<Element, 1>;
    queue_.launch("attentionGrad: delta", deltas, dim3(static_cast<unsigned>(ceilDivide(problem.rows, deltaRows)), heads),
                  dim3(attentionThreads), 0, problem, rowsOf<const Element>(out), gradient, lse, statistics);

    const auto launchKeyGrad = [&](auto* kernel) {
      queue_.launch("attentionGrad: keys and values", kernel,
                    dim3(static_cast<unsigned>(tiles), kvHeads, static_cast<unsigned>(parts)), dim3(attentionThreads),
                    Shared::bytes, problem, queries, keys, values, gradient, statistics, keyGrad, valueGrad);
    };
    if constexpr (Plan::together) {
      launchKeyGrad(keyGradKernel<Plan, true, true>);
    } else {
      launchKeyGrad(keyGradKernel<Plan, false, true>);
      launchKeyGrad(keyGradKernel<Plan, true, false>);
    }
    if (parts > 1) {
      const dim3 grid(static_cast<unsigned>(problem.rows), static_cast<unsigned>((dk.cols + sumThreads - 1) / sumThreads));
      for (const KeyGrad<Element>& grad : {keyGrad, valueGrad}) {
        queue_.launch("attentionGrad: parts", sumPartsKernel<Element>, grid, dim3(sumThreads), 0, grad, parts, dk.rows, dk.cols);
      }
    }

    withAttentionPlan<QueryGradPlan>(q.dtype, shape.headDim, [&](auto plan) {
      using QueryPlan = decltype(plan);
      if constexpr (std::is_same_v<typename QueryPlan::Math::Element, Element>) {
        using QueryShared = GradShared<QueryPlan, false>;
        const dim3 grid(static_cast<unsigned>(ceilDivide(problem.rows, QueryShared::tileRows)), heads);
        queue_.launch("attentionGrad: queries", queryGradKernel<QueryPlan>, grid, dim3(attentionThreads), QueryShared::bytes,
                      problem, queries, keys, values, gradient, statistics, rowsOf<Element>(dq));
      }
    });
  });
}

}  // namespace lora_da::cuda
