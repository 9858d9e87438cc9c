// Causal softmax attention over the sequences of a packed batch, in tiles (Dao 2022, 2023: FlashAttention, FlashAttention-2).
//
//   S = scale q k^T,  P = softmax(S),  o = P v,  lse = log of each row's sum of exponentials
//
// q, o [T, heads*headDim]; k, v [T, kvHeads*headDim]; lse [T, heads] float32. A block has a tile of query rows of one head and
// goes over their keys from the last to the first, with a running maximum; the tiles of keys and values are copied to shared
// memory while those before them are at work. Sums are float32; with bfloat16 the exponentials enter their product rounded, their
// sum is taken before. The last tiles, which have the most keys of a long sequence, start first.
#include <algorithm>

#include "cuda/attention_tiles.h"
#include "cuda/cuda_device.h"

namespace lora_da::cuda {

namespace {

// Sizes that leave every accumulator in registers, and the block's shared memory within the 99 KB of the smallest GPUs.
template <class Element, int headDim>
struct ForwardPlan;
template <int headDim>
struct ForwardPlan<Bf16, headDim> {
  using Math = Bf16Math<headDim, headDim <= 128 ? 2 : 1, headDim <= 64 ? 64 : 32>;
};
template <int headDim>
struct ForwardPlan<float, headDim> {
  using Math = F32Math<headDim, headDim <= 128 ? 4 : 2, headDim <= 64 ? 32 : 16>;
};

template <class Math>
struct ForwardShared {
  static constexpr int tileRows = attentionWarps * Math::warpRows;
  static constexpr int queryBytes = tileRows * Math::Layout::rowBytes;
  static constexpr int keyBytes = Math::columns * Math::Layout::rowBytes;
  static constexpr int streamBytes = std::max(4 * keyBytes, Staging<Math, typename Math::Element>::bytes);
  static constexpr int bytes = queryBytes + streamBytes + attentionWarps * Math::exchangeBytes;

  unsigned char* start = sharedMemory<unsigned char>();
  __device__ unsigned char* queries() const { return start; }
  __device__ unsigned char* warpQueries() const { return start + warp() * Math::warpRows * Math::Layout::rowBytes; }
  __device__ unsigned char* keys(int stage) const { return start + queryBytes + stage * 2 * keyBytes; }
  __device__ unsigned char* values(int stage) const { return keys(stage) + keyBytes; }
  __device__ unsigned char* staging() const { return keys(0); }
  __device__ unsigned char* exchange() const { return start + queryBytes + streamBytes + warp() * Math::exchangeBytes; }
};

// rowLse [the warp's rows] = log of each row's sum of exponentials.
template <class Math>
__device__ void stageLse(const OnlineSoftmax<Math>& softmax, float* rowLse) {
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Math::threadRows; ++r) {
    if (lane() % Math::lanesPerRow == 0) rowLse[ownRow<Math>(r)] = lnOf2 * (softmax.maximum[r] + log2f(softmax.sum[r]));
  }
  __syncwarp();
}

template <class Math>
__global__ void __launch_bounds__(attentionThreads, 2)
    attentionKernel(AttentionProblem problem, Rows<const typename Math::Element> q, Rows<const typename Math::Element> k,
                    Rows<const typename Math::Element> v, Rows<typename Math::Element> out, float* lse) {
  using Shared = ForwardShared<Math>;
  const Shared shared;
  const int32_t headDim = problem.headDim, head = static_cast<int32_t>(blockIdx.y), keyHead = head / problem.group;
  const bool vectors = problem.vectors != 0;
  const int32_t from = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x) * Shared::tileRows;
  const int32_t to = min(from + Shared::tileRows, problem.rows), warpFirst = from + warp() * Math::warpRows;
  const auto keys = headRows(k, keyHead, headDim), values = headRows(v, keyHead, headDim);
  const auto headOut = headRows(out, head, headDim);
  startTile<Math::headDim, Shared::tileRows>(shared.queries(), headRows(q, head, headDim), headDim, vectors, from, from, to);

  const auto attend = [&](const Segment& segment) {
    const KeyTiles<Math::columns> tiles(segment, problem.window, warpFirst, Math::warpRows);
    OnlineSoftmax<Math> softmax;
    typename Math::Sums sums;
    clearSums<Math>(sums);
    const auto copyTile = [&](int32_t i, int stage) {
      const int32_t key = tiles.key(i), lowest = tiles.lowest();
      startTile<Math::headDim, Math::columns>(shared.keys(stage), keys, headDim, vectors, key, lowest, segment.stop);
      startTile<Math::headDim, Math::columns>(shared.values(stage), values, headDim, vectors, key, lowest, segment.stop);
    };
    const auto addTile = [&](int32_t i, int stage) {
      const int32_t key = tiles.key(i);
      if (tiles.hidden(key)) return;
      typename Math::Scores scores;
      Math::multiply(shared.warpQueries(), shared.keys(stage), scores);
      if (!tiles.open(key)) hideScores<Math>(tiles, warpFirst, key, -INFINITY, scores);
      softmax.update(problem.scale * log2OfE, scores, sums);
      Math::accumulate(scores, shared.values(stage), shared.exchange(), sums);
    };
    overTiles<2>(tiles.count(), copyTile, addTile);
    softmax.finish();
    storeSums<Math>(
        sums, shared.staging(), headOut, warpFirst, headDim, vectors, [&](int r) { return 1.0f / softmax.sum[r]; },
        [&](int32_t row) { return tiles.ownsRow(row); });
    auto* rowLse = reinterpret_cast<float*>(shared.staging() + warp() * Staging<Math, typename Math::Element>::warpBytes);
    stageLse<Math>(softmax, rowLse);
    const int32_t row = warpFirst + lane();
    if (lane() < Math::warpRows && tiles.ownsRow(row)) lse[int64_t{row} * problem.heads + head] = rowLse[lane()];
  };
  overSegments(problem, from, to, attend, [&](int32_t first, int32_t last) {
    clearRows(headOut, headDim, first, last);
    clearRows(Rows<float>{lse + head, problem.heads}, 1, first, last);
  });
}

}  // namespace

void CudaDevice::attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                           const AttentionShape& shape, const Matrix& out, float* lse) {
  requireAttentionShape(shape, q, k);
  const AttentionProblem problem = attentionProblem(sequences, shape, q, k, v, out);
  withAttentionPlan<ForwardPlan>(q.dtype, shape.headDim, [&](auto plan) {
    using Math = typename decltype(plan)::Math;
    using Element = typename Math::Element;
    using Shared = ForwardShared<Math>;
    const dim3 grid(static_cast<unsigned>(ceilDivide(problem.rows, Shared::tileRows)), static_cast<unsigned>(shape.heads));
    queue_.launch("attention", attentionKernel<Math>, grid, dim3(attentionThreads), Shared::bytes, problem,
                  rowsOf<const Element>(q), rowsOf<const Element>(k), rowsOf<const Element>(v), rowsOf<Element>(out), lse);
  });
}

}  // namespace lora_da::cuda
