// Gradient of attention (attention_forward.cu), which recomputes P from lse tile by tile:
//
//   P = exp(scale q k^T - lse),  dv = P^T dout,  delta = rowsum(dout o),  dS = P (dout v^T - delta),  dq = scale dS k,
//   dk = scale dS^T q
//
// First delta and lse, as a power of two, are laid out by head. Then blocks with a tile of keys of one key head go over the
// queries of its group's heads and sum dk and dv; blocks with a tile of queries go over their keys and sum dq. So every sum has
// one owner and a fixed order. Where there are fewer key tiles than a GPU holds blocks, the heads of a group are dealt out to
// several blocks, whose parts, float32 in scratch memory, are added afterwards. Scores of key tiles are transposed: a warp's rows
// are keys.
#include <algorithm>

#include "core/integers.h"
#include "cuda/attention_tiles.h"
#include "cuda/cuda_device.h"

namespace lora_da::cuda {

namespace {

// Sizes that leave every accumulator in registers, and the block's shared memory within the 99 KB of the smallest GPUs.
template <class Element, int headDim>
struct GradPlan;
template <int headDim>
struct GradPlan<Bf16, headDim> {
  using QueryMath = Bf16Math<headDim, headDim <= 128 ? 2 : 1, headDim == 128 ? 16 : 32>;
  using KeyMath = Bf16Math<headDim, headDim <= 64 ? 2 : 1, headDim == 64 || headDim == 256 ? 16 : 32>;
  static constexpr int queryStages = headDim <= 128 ? 2 : 1;
  static constexpr int keyStages = 2;
  static constexpr bool together = headDim <= 128;  // dk and dv in one kernel: two sums of more would not fit into registers
};
template <int headDim>
struct GradPlan<float, headDim> {
  using QueryMath = F32Math<headDim, headDim <= 128 ? 4 : 2, headDim <= 64 ? 32 : 16>;
  using KeyMath = F32Math<headDim, headDim <= 96 ? 4 : 2, headDim <= 64 ? 32 : 16>;
  static constexpr int queryStages = headDim <= 96 ? 2 : 1;
  static constexpr int keyStages = queryStages;
  static constexpr bool together = true;
};

// Two tiles that stay, and two for each stage that come and go, with two numbers for each of their rows where `statistics`; sums
// leave as Out.
template <class Math, int stages, bool statistics, class Out>
struct GradShared {
  static constexpr int tileRows = attentionWarps * Math::warpRows;
  static constexpr int ownBytes = tileRows * Math::Layout::rowBytes;
  static constexpr int otherBytes = Math::columns * Math::Layout::rowBytes;
  static constexpr int statisticBytes = statistics ? Math::columns * static_cast<int>(sizeof(float)) : 0;
  static constexpr int stageBytes = 2 * otherBytes + 2 * statisticBytes;
  static constexpr int streamBytes = std::max(stages * stageBytes, Staging<Math, Out>::bytes);
  static constexpr int bytes = 2 * ownBytes + streamBytes + attentionWarps * Math::exchangeBytes;

  unsigned char* start = sharedMemory<unsigned char>();
  // The tiles of the block, and this warp's rows of them.
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
  float* lse;  // times log2(e)
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

template <class Math, int stages>
__global__ void __launch_bounds__(attentionThreads, 2)
    queryGradKernel(AttentionProblem problem, Rows<const typename Math::Element> q, Rows<const typename Math::Element> k,
                    Rows<const typename Math::Element> v, Rows<const typename Math::Element> dout, RowStatistics statistics,
                    Rows<typename Math::Element> dq) {
  using Shared = GradShared<Math, stages, false, typename Math::Element>;
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
          scores.at(r, c) = exp2Flushed(scores.at(r, c) * scale - lse[r]) * (slopes.at(r, c) - delta[r]);
        }
      }
      if (!tiles.open(key)) hideScores<Math>(tiles, warpFirst, key, 0.0f, scores);
      Math::accumulate(scores, shared.other(0, stage), shared.exchange(), sums);
    };
    overTiles<stages>(tiles.count(), copyTile, addTile);
    storeSums<Math>(
        sums, shared.staging(), headGrad, warpFirst, headDim, vectors, [&](int) { return problem.scale; },
        [&](int32_t row) { return tiles.ownsRow(row); });
  };
  overSegments(problem, from, to, differentiate, [&](int32_t first, int32_t last) { clearRows(headGrad, headDim, first, last); });
}

// Where dk or dv goes: to the result, or, where blocks share a key head, to the part of each.
template <class Out>
struct KeyGrad {
  Rows<Out> rows;
  int64_t partStride;

  __device__ Rows<Out> head(int32_t keyHead, int32_t headDim) const {
    return headRows(Rows<Out>{rows.data + blockIdx.z * partStride, rows.stride}, keyHead, headDim);
  }
};

// dk where `forKeys`, dv where `forValues`.
template <class Math, int stages, bool forKeys, bool forValues, class Out>
__global__ void __launch_bounds__(attentionThreads, 2)
    keyGradKernel(AttentionProblem problem, Rows<const typename Math::Element> q, Rows<const typename Math::Element> k,
                  Rows<const typename Math::Element> v, Rows<const typename Math::Element> dout, RowStatistics statistics,
                  KeyGrad<Out> dk, KeyGrad<Out> dv) {
  using Shared = GradShared<Math, stages, true, Out>;
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
        for (int r = 0; r < Math::threadRows; ++r) scores.at(r, c) = exp2Flushed(scores.at(r, c) * scale - lse);
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
    overTiles<stages>(tiles.count() * headCount, copyTile, addTile);
    const auto owns = [&](int32_t row) { return tiles.ownsRow(row); };
    if (forKeys) {
      storeSums<Math>(
          keySums, shared.staging(), dk.head(keyHead, headDim), warpFirst, headDim, vectors, [&](int) { return problem.scale; },
          owns);
    }
    if (forValues) {
      storeSums<Math>(
          valueSums, shared.staging(), dv.head(keyHead, headDim), warpFirst, headDim, vectors, [](int) { return 1.0f; }, owns);
    }
  };
  overSegments(problem, from, to, differentiate, [&](int32_t first, int32_t last) {
    if (forKeys) clearRows(dk.head(keyHead, headDim), headDim, first, last);
    if (forValues) clearRows(dv.head(keyHead, headDim), headDim, first, last);
  });
}

constexpr int sumThreads = 256;

// result [rows, width] = sum of the parts, each contiguous.
template <class Element>
__global__ void __launch_bounds__(sumThreads)
    sumPartsKernel(const float* parts, int32_t count, int64_t rows, int64_t width, Rows<Element> result) {
  const int64_t row = blockIdx.x, column = int64_t{blockIdx.y} * sumThreads + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int32_t part = 0; part < count; ++part) sum += parts[(part * rows + row) * width + column];
  store<1>(result[row] + column, Floats<1>{{sum}});
}

// Blocks that share a key tile: a divisor of the group, so that GPUs of up to 132 multiprocessors get two blocks each.
int32_t keyGradParts(int64_t keyTiles, const AttentionShape& shape) {
  constexpr int64_t enoughBlocks = 264;
  const int32_t group = shape.heads / shape.kvHeads;
  for (int32_t parts = 1; parts < group; ++parts) {
    if (group % parts == 0 && keyTiles * shape.kvHeads * parts >= enoughBlocks) return parts;
  }
  return group;
}

// Scratch, in floats: each row's statistics, and what is added up.
struct GradScratch {
  int32_t parts;
  int64_t stride, statistics, partFloats;

  int64_t floats() const { return 2 * statistics + 2 * partFloats; }
};

template <class Plan>
GradScratch gradScratch(const AttentionShape& shape, int64_t rows) {
  const int32_t parts = keyGradParts(ceilDiv(rows, attentionWarps * Plan::KeyMath::warpRows), shape);
  const int64_t stride = (rows + 3) / 4 * 4;
  return {parts, stride, shape.heads * stride, parts > 1 ? parts * rows * shape.kvHeads * shape.headDim : 0};
}

// The matrices as kernels take them.
template <class Element>
struct GradOperands {
  AttentionProblem problem;
  Rows<const Element> q, k, v, dout;
  RowStatistics statistics;
};

template <class Plan, class Element, class Out>
void launchKeyGrad(Queue& queue, const GradOperands<Element>& o, int32_t parts, const KeyGrad<Out>& dk, const KeyGrad<Out>& dv) {
  using Math = typename Plan::KeyMath;
  using Shared = GradShared<Math, Plan::keyStages, true, Out>;
  const dim3 grid(static_cast<unsigned>(ceilDivide(o.problem.rows, Shared::tileRows)), static_cast<unsigned>(o.problem.kvHeads),
                  static_cast<unsigned>(parts));
  const auto launch = [&](auto* kernel) {
    queue.launch("attentionGrad: keys and values", kernel, grid, dim3(attentionThreads), Shared::bytes, o.problem, o.q, o.k, o.v,
                 o.dout, o.statistics, dk, dv);
  };
  if constexpr (Plan::together) {
    launch(keyGradKernel<Math, Plan::keyStages, true, true, Out>);
  } else {
    launch(keyGradKernel<Math, Plan::keyStages, false, true, Out>);
    launch(keyGradKernel<Math, Plan::keyStages, true, false, Out>);
  }
}

// The same in parts [2, parts, rows, width] of dk and dv, which are then added.
template <class Plan, class Element>
void launchKeyGradInParts(Queue& queue, const GradOperands<Element>& o, int32_t parts, float* memory, const Matrix& dk,
                          const Matrix& dv) {
  const int64_t partFloats = dk.rows * dk.cols, allFloats = parts * partFloats;
  launchKeyGrad<Plan>(queue, o, parts, KeyGrad<float>{{memory, dk.cols}, partFloats},
                      KeyGrad<float>{{memory + allFloats, dk.cols}, partFloats});
  const dim3 grid(static_cast<unsigned>(dk.rows), static_cast<unsigned>((dk.cols + sumThreads - 1) / sumThreads));
  queue.launch("attentionGrad: parts of dk", sumPartsKernel<Element>, grid, dim3(sumThreads), 0, memory, parts, dk.rows, dk.cols,
               rowsOf<Element>(dk));
  queue.launch("attentionGrad: parts of dv", sumPartsKernel<Element>, grid, dim3(sumThreads), 0, memory + allFloats, parts,
               dk.rows, dk.cols, rowsOf<Element>(dv));
}

template <class Plan, class Element>
void launchQueryGrad(Queue& queue, const GradOperands<Element>& o, const Matrix& dq) {
  using Math = typename Plan::QueryMath;
  using Shared = GradShared<Math, Plan::queryStages, false, Element>;
  const dim3 grid(static_cast<unsigned>(ceilDivide(o.problem.rows, Shared::tileRows)), static_cast<unsigned>(o.problem.heads));
  queue.launch("attentionGrad: queries", queryGradKernel<Math, Plan::queryStages>, grid, dim3(attentionThreads), Shared::bytes,
               o.problem, o.q, o.k, o.v, o.dout, o.statistics, rowsOf<Element>(dq));
}

template <class Element>
void launchDelta(Queue& queue, const GradOperands<Element>& o, const Matrix& out, const float* lse) {
  const auto kernel = o.problem.vectors ? deltaKernel<Element, fullWidth<Element>> : deltaKernel<Element, 1>;
  const dim3 grid(static_cast<unsigned>(ceilDivide(o.problem.rows, deltaRows)), static_cast<unsigned>(o.problem.heads));
  queue.launch("attentionGrad: delta", kernel, grid, dim3(attentionThreads), 0, o.problem, rowsOf<const Element>(out), o.dout,
               lse, o.statistics);
}

}  // namespace

void CudaDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                               const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                               const Matrix& dk, const Matrix& dv) {
  requireAttentionShape(shape, q, k);
  withAttentionPlan<GradPlan>(q.dtype, shape.headDim, [&](auto plan) {
    using Plan = decltype(plan);
    using Element = typename Plan::KeyMath::Element;
    const AttentionProblem problem = attentionProblem(sequences, shape, q, k, v, out, dout, dq, dk, dv);
    const GradScratch sizes = gradScratch<Plan>(shape, q.rows);
    auto* memory = static_cast<float*>(scratch(static_cast<size_t>(sizes.floats()) * sizeof(float)));
    const GradOperands<Element> operands{problem,
                                         rowsOf<const Element>(q),
                                         rowsOf<const Element>(k),
                                         rowsOf<const Element>(v),
                                         rowsOf<const Element>(dout),
                                         {memory, memory + sizes.statistics, sizes.stride}};
    launchDelta(queue_, operands, out, lse);
    if (sizes.parts > 1)
      launchKeyGradInParts<Plan>(queue_, operands, sizes.parts, memory + 2 * sizes.statistics, dk, dv);
    else
      launchKeyGrad<Plan>(queue_, operands, 1, KeyGrad<Element>{rowsOf<Element>(dk), 0},
                          KeyGrad<Element>{rowsOf<Element>(dv), 0});
    launchQueryGrad<Plan>(queue_, operands, dq);
  });
}

// The head's scratch is apart. A step of fewer rows may be cut into more parts, and need more.
size_t CudaDevice::workspaceBytes(const StepShape& step) const {
  constexpr int64_t rowGrain = 64;
  int64_t floats = 0;
  withAttentionPlan<GradPlan>(computeType_, step.attention.headDim, [&](auto plan) {
    for (int64_t rows = std::min(rowGrain, step.rows); rows <= step.rows; rows += rowGrain) {
      floats = std::max(floats, gradScratch<decltype(plan)>(step.attention, rows).floats());
    }
  });
  return static_cast<size_t>(floats) * sizeof(float) + headLossBytes(step.labelRows, step.vocabulary);
}

}  // namespace lora_da::cuda
