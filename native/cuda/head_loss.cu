// Cross-entropy through the head, a chunk of rows at a time: logits [rows, vocabulary] of one chunk are made, reduced to losses,
// turned into their gradient and multiplied back before the next chunk begins.
//   loss[i]        = log(sum_v exp(logit[i, v])) - logit[i, target[i]]
//   gradient[i, v] = rowScale[i] * (exp(logit[i, v]) / sum - (v == target[i]))        in the compute type
// A row's logits are read once where they fit into shared memory beside each other, else twice. float32 gradients take the place
// of their logits; bfloat16 ones lie behind the chunk's logits.
#include <algorithm>
#include <cfloat>

#include "core/integers.h"
#include "cuda/cuda_device.h"
#include "cuda/reduction.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int rowThreads = 1024;
constexpr int warps = rowThreads / warpThreads;
constexpr int sumThreads = 512;

// Chunks are deep enough for the products with the head to be bound by arithmetic, and small beside a GPU's memory.
constexpr int64_t chunkBytes = int64_t{384} << 20;
constexpr int64_t fewestRows = 128;
constexpr int64_t rowGrain = 64;
// Rows begin at multiples of 32 bytes in float32 and of 16 in bfloat16.
constexpr int64_t strideGrain = 8;

// sum = sum of exp(logit - largest) of what was seen. Nothing seen: the lowest finite number, whose differences are no NaN.
struct Exponentials {
  float largest = -FLT_MAX;
  float sum = 0;
};

// A NaN never becomes the largest, but makes the sum NaN.
__device__ inline void add(Exponentials& seen, float4 logits) {
  const float largest = fmaxf(fmaxf(logits.x, logits.y), fmaxf(logits.z, logits.w));
  if (largest > seen.largest) {
    seen.sum *= __expf(seen.largest - largest);
    seen.largest = largest;
  }
  seen.sum += (__expf(logits.x - seen.largest) + __expf(logits.y - seen.largest)) +
              (__expf(logits.z - seen.largest) + __expf(logits.w - seen.largest));
}

__device__ inline Exponentials merge(Exponentials a, Exponentials b) {
  const float largest = fmaxf(a.largest, b.largest);
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

__device__ inline Exponentials mergeWarp(Exponentials value) {
  for (int offset = warpThreads / 2; offset > 0; offset /= 2) {
    Exponentials other;
    other.largest = __shfl_xor_sync(allLanes, value.largest, offset);
    other.sum = __shfl_xor_sync(allLanes, value.sum, offset);
    value = merge(value, other);
  }
  return value;
}

// Of the whole block, for every thread. `shared` has room for one value a warp.
__device__ inline Exponentials mergeBlock(Exponentials value, Exponentials* shared) {
  const int warp = static_cast<int>(threadIdx.x) / warpThreads, lane = static_cast<int>(threadIdx.x) % warpThreads;
  value = mergeWarp(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return mergeWarp(lane < warps ? shared[lane] : Exponentials{});
}

// Four logits from `first` on; beyond the vocabulary what adds nothing.
__device__ inline float4 loadLogits(const float* row, int first, int vocabulary) {
  if (first + 4 <= vocabulary) return *reinterpret_cast<const float4*>(row + first);
  const float nothing = -INFINITY;
  return {row[first], first + 1 < vocabulary ? row[first + 1] : nothing, first + 2 < vocabulary ? row[first + 2] : nothing,
          nothing};
}

// One block a row. Both strides are multiples of strideGrain, so that whole vectors are stored where a row ends. A thread reads
// back only what it read or stored itself, but for the target's logit, which is read before the barrier.
template <class Gradient, bool kept>
__global__ void __launch_bounds__(rowThreads)
    crossEntropyKernel(const float* logits, int64_t logitStride, int vocabulary, const int32_t* targets, const float* rowScale,
                       float* losses, Gradient* gradient, int64_t gradientStride) {
  auto* shared = sharedMemory<Exponentials>();
  auto* keptLogits = reinterpret_cast<float4*>(shared + warps);
  const int64_t row = blockIdx.x;
  const float* rowLogits = logits + row * logitStride;
  const int target = targets[row], first = static_cast<int>(threadIdx.x) * 4;
  const float targetLogit = rowLogits[target];

  Exponentials seen;
  for (int i = first; i < vocabulary; i += rowThreads * 4) {
    const float4 four = loadLogits(rowLogits, i, vocabulary);
    if (kept) keptLogits[i / 4] = four;
    add(seen, four);
  }
  const Exponentials all = mergeBlock(seen, shared);
  if (threadIdx.x == 0) losses[row] = all.largest + logf(all.sum) - targetLogit;
  if (!gradient) return;

  const float scale = rowScale ? rowScale[row] : 0.0f, inverse = 1.0f / all.sum;
  const auto derivative = [&](float logit, int index) {
    return scale * (__expf(logit - all.largest) * inverse - (index == target ? 1.0f : 0.0f));
  };
  Gradient* rowGradient = gradient + row * gradientStride;
  for (int i = first; i < vocabulary; i += rowThreads * 4) {
    const float4 four = kept ? keptLogits[i / 4] : loadLogits(rowLogits, i, vocabulary);
    store<4>(rowGradient + i,
             Floats<4>{{derivative(four.x, i), derivative(four.y, i + 1), derivative(four.z, i + 2), derivative(four.w, i + 3)}});
  }
}

// One block: a step has a few thousand losses.
__global__ void __launch_bounds__(sumThreads)
    sumLossesKernel(const float* losses, const float* scale, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += sumThreads) sum += static_cast<double>(losses[i]) * static_cast<double>(scale[i]);
  sum = sumOfBlock<sumThreads>(sum, sharedMemory<double>());
  if (threadIdx.x == 0) total[0] += sum;
}

struct Chunk {
  int64_t rows = 0;
  int64_t stride = 0;  // elements from one row to the next, of logits and gradients
  int64_t logitBytes = 0;
  int64_t gradientBytes = 0;  // of gradients that lie beside the logits
};

Chunk chunkFor(int64_t rows, int64_t vocabulary, DType computeType) {
  Chunk chunk;
  chunk.stride = roundUp(vocabulary, strideGrain);
  const auto gradientWidth = computeType == DType::f32 ? int64_t{0} : static_cast<int64_t>(sizeOf(computeType));
  const int64_t rowBytes = chunk.stride * (static_cast<int64_t>(sizeof(float)) + gradientWidth);
  const int64_t most = std::max(fewestRows, chunkBytes / rowBytes);
  const int64_t chunks = std::max<int64_t>((rows + most - 1) / most, 1);
  chunk.rows = std::min(rows, roundUp((rows + chunks - 1) / chunks, rowGrain));
  chunk.logitBytes = chunk.rows * chunk.stride * static_cast<int64_t>(sizeof(float));
  chunk.gradientBytes = chunk.rows * chunk.stride * gradientWidth;
  return chunk;
}

// Shared memory for a block that keeps its row, or for one that does not where a row is too long.
size_t rowSharedBytes(int64_t vocabulary, bool& kept) {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for shared memory");
  const size_t fixed = warps * sizeof(Exponentials);
  const size_t whole = fixed + static_cast<size_t>(roundUp(vocabulary, 4)) * sizeof(float);
  kept = kept && whole <= static_cast<size_t>(limit);
  return kept ? whole : fixed;
}

template <class Gradient>
void crossEntropy(Queue& queue, const Matrix& logits, const int32_t* targets, const float* rowScale, float* losses,
                  const Matrix* gradient) {
  bool kept = gradient != nullptr;
  const size_t sharedBytes = rowSharedBytes(logits.cols, kept);
  queue.launch("headLoss", kept ? crossEntropyKernel<Gradient, true> : crossEntropyKernel<Gradient, false>,
               dim3(static_cast<unsigned>(logits.rows)), dim3(rowThreads), sharedBytes, logits.as<float>(), logits.stride,
               static_cast<int>(logits.cols), targets, rowScale, losses, gradient ? gradient->as<Gradient>() : nullptr,
               gradient ? gradient->stride : 0);
}

}  // namespace

size_t CudaDevice::headLossBytes(int64_t rows, int64_t vocabulary) const {
  const Chunk chunk = chunkFor(rows, vocabulary, computeType_);
  return static_cast<size_t>(chunk.logitBytes + chunk.gradientBytes);
}

void CudaDevice::headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                          const Matrix* dx) {
  const int64_t vocabulary = head.out;
  const Chunk chunk = chunkFor(x.rows, vocabulary, computeType_);
  auto* memory = static_cast<char*>(
      headScratch_.reserve(*this, static_cast<size_t>(chunk.logitBytes + chunk.gradientBytes), "the head's logits"));
  for (int64_t first = 0; first < x.rows; first += chunk.rows) {
    const int64_t count = std::min(chunk.rows, x.rows - first);
    const Matrix logits{memory, DType::f32, count, vocabulary, chunk.stride};
    const Matrix gradient{chunk.gradientBytes == 0 ? memory : memory + chunk.logitBytes, computeType_, count, vocabulary,
                          chunk.stride};
    linear(x.rowRange(first, count), head, nullptr, nullptr, nullptr, nullptr, logits);
    const auto loss = computeType_ == DType::bf16 ? crossEntropy<Bf16> : crossEntropy<float>;
    loss(queue_, logits, targets + first, rowScale ? rowScale + first : nullptr, losses + first, dx ? &gradient : nullptr);
    if (dx) linearInputGrad(gradient, head, nullptr, nullptr, dx->rowRange(first, count));
  }
}

void CudaDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  queue_.launch("sumLosses", sumLossesKernel, dim3(1), dim3(sumThreads), sumThreads / warpThreads * sizeof(double), losses, scale,
                count, total);
}

}  // namespace lora_da::cuda
