// Gradient norm and AdamW over a list of parameters, cut into chunks. A launch takes as many tensors as fit a kernel's
// parameters; a block is one chunk.
// norm:   sqrt of the sum of grad^2: a float64 sum per chunk, and then those in the order of the chunks
// adamw:  as torch.optim.AdamW (decoupled decay), with g = grad min(1, maxGradNorm / (norm + 1e-6)):
//         m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//         value = value (1 - rate decay) - rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + epsilon)
#include <algorithm>
#include <climits>

#include "cuda/cuda_device.h"
#include "cuda/reduction.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int chunkThreads = 256;
constexpr int sumThreads = 1024;
constexpr int64_t chunkSize = 4096;
constexpr int wide = fullWidth<float>;
constexpr int mostTensors = 64;

// Tensors of one launch. Chunk c is one of the last tensor whose first chunk is not after c.
struct Tensors {
  Parameter parameter[mostTensors];
  int32_t firstChunk[mostTensors];
};
static_assert(sizeof(Tensors) == mostTensors * (sizeof(Parameter) + sizeof(int32_t)), "padding would spoil fingerprints");

// What an update depends on besides the tensors' elements.
struct Factors {
  float gradScale;
  float keepFirst, addFirst;    // of the first moment
  float keepSecond, addSecond;  // of the second
  float decay;
  float rate;        // bias correction of the first moment included
  float secondRoot;  // 1/sqrt of the second moment's bias correction
  float epsilon;
  int32_t applies;
};

// A block's elements of a tensor.
struct Chunk {
  int tensor;
  int64_t first;
  int count;
};

__device__ inline Chunk chunkOf(const Tensors& tensors, int block) {
  int tensor = 0;
  while (tensor + 1 < mostTensors && tensors.firstChunk[tensor + 1] <= block) ++tensor;
  const int64_t first = int64_t{block - tensors.firstChunk[tensor]} * chunkSize;
  const int64_t left = tensors.parameter[tensor].count - first;
  return {tensor, first, static_cast<int>(left < chunkSize ? left : chunkSize)};
}

// body(i, width) with the width as a constant, for the thread's vectors and what elements are left, or for single elements.
template <class Body>
__device__ inline void overChunk(int count, bool inVectors, const Body& body) {
  const int thread = static_cast<int>(threadIdx.x), inVector = inVectors ? count / wide * wide : 0;
  for (int i = thread * wide; i < inVector; i += chunkThreads * wide) body(i, std::integral_constant<int, wide>{});
  for (int i = inVector + thread; i < count; i += chunkThreads) body(i, std::integral_constant<int, 1>{});
}

__global__ void __launch_bounds__(chunkThreads) squaredNormKernel(const __grid_constant__ Tensors tensors, double* partial) {
  const Chunk chunk = chunkOf(tensors, static_cast<int>(blockIdx.x));
  const float* grad = tensors.parameter[chunk.tensor].grad + chunk.first;
  double sum = 0;
  overChunk(chunk.count, isAligned(grad, 16), [&](int i, auto constant) {
    constexpr int width = decltype(constant)::value;
    const Floats<width> g = load<width>(grad + i);
#pragma unroll
    for (int e = 0; e < width; ++e) sum += static_cast<double>(g.at[e]) * static_cast<double>(g.at[e]);
  });
  sum = sumOfBlock<chunkThreads>(sum, sharedMemory<double>());
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(sumThreads) normKernel(const double* partial, int64_t chunks, double* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += sumThreads) sum += partial[i];
  sum = sumOfBlock<sumThreads>(sum, sharedMemory<double>());
  if (threadIdx.x == 0) norm[0] = sqrt(sum);
}

__global__ void __launch_bounds__(1)
    adamwFactorsKernel(const AdamWStep* step, const double* norm, const double* loss, Factors* factors) {
  const AdamWStep s = *step;
  const double exponent = static_cast<double>(s.step), learningRate = static_cast<double>(s.learningRate);
  const double firstCorrection = 1.0 - pow(static_cast<double>(s.beta1), exponent);
  const double secondCorrection = 1.0 - pow(static_cast<double>(s.beta2), exponent);
  Factors f;
  f.gradScale = s.maxGradNorm > 0 ? static_cast<float>(fmin(1.0, static_cast<double>(s.maxGradNorm) / (norm[0] + 1e-6))) : 1.0f;
  f.keepFirst = s.beta1;
  f.addFirst = 1.0f - s.beta1;
  f.keepSecond = s.beta2;
  f.addSecond = 1.0f - s.beta2;
  f.decay = static_cast<float>(1.0 - learningRate * static_cast<double>(s.weightDecay));
  f.rate = static_cast<float>(learningRate / firstCorrection);
  f.secondRoot = static_cast<float>(1.0 / sqrt(secondCorrection));
  f.epsilon = s.epsilon;
  f.applies = isfinite(norm[0]) && isfinite(loss[0]);
  *factors = f;
}

template <int width>
__device__ inline void update(const Parameter& p, int64_t i, const Factors& f) {
  const Floats<width> grad = load<width>(p.grad + i);
  Floats<width> value = load<width>(p.value + i), first = load<width>(p.firstMoment + i),
                second = load<width>(p.secondMoment + i);
#pragma unroll
  for (int e = 0; e < width; ++e) {
    const float g = grad.at[e] * f.gradScale;
    first.at[e] = f.keepFirst * first.at[e] + f.addFirst * g;
    second.at[e] = f.keepSecond * second.at[e] + f.addSecond * g * g;
    value.at[e] = value.at[e] * f.decay - f.rate * (first.at[e] / (sqrtf(second.at[e]) * f.secondRoot + f.epsilon));
  }
  store<width>(p.value + i, value);
  store<width>(p.firstMoment + i, first);
  store<width>(p.secondMoment + i, second);
  if (p.shadow) store<width>(static_cast<Bf16*>(p.shadow) + i, value);
}

__global__ void __launch_bounds__(chunkThreads) adamwKernel(const __grid_constant__ Tensors tensors, const Factors* factors) {
  const Factors f = *factors;
  if (!f.applies) return;
  const Chunk chunk = chunkOf(tensors, static_cast<int>(blockIdx.x));
  const Parameter& p = tensors.parameter[chunk.tensor];
  const bool inVectors = isAligned(p.value, 16) && isAligned(p.grad, 16) && isAligned(p.firstMoment, 16) &&
                         isAligned(p.secondMoment, 16) && isAligned(p.shadow, 8);
  overChunk(chunk.count, inVectors, [&](int i, auto constant) { update<decltype(constant)::value>(p, chunk.first + i, f); });
}

int64_t chunksOf(const Parameter& parameter) {
  return (parameter.count + chunkSize - 1) / chunkSize;
}

// body(tensors, chunks of them, chunks before them) for each launch's share of the parameters.
template <class Body>
void overLaunches(const std::vector<Parameter>& parameters, const Body& body) {
  int64_t before = 0;
  for (size_t begin = 0; begin < parameters.size(); begin += mostTensors) {
    const size_t count = std::min<size_t>(mostTensors, parameters.size() - begin);
    Tensors tensors{};
    std::fill(std::begin(tensors.firstChunk), std::end(tensors.firstChunk), INT32_MAX);
    int64_t chunks = 0;
    for (size_t i = 0; i < count; ++i) {
      tensors.parameter[i] = parameters[begin + i];
      tensors.firstChunk[i] = static_cast<int32_t>(chunks);
      chunks += chunksOf(parameters[begin + i]);
    }
    body(tensors, static_cast<unsigned>(chunks), before);
    before += chunks;
  }
}

}  // namespace

void CudaDevice::gradNorm(const std::vector<Parameter>& parameters, double* norm) {
  int64_t chunks = 0;
  for (const Parameter& parameter : parameters) chunks += chunksOf(parameter);
  auto* partial = static_cast<double*>(scratch(static_cast<size_t>(chunks) * sizeof(double)));
  overLaunches(parameters, [&](const Tensors& tensors, unsigned blocks, int64_t before) {
    queue_.launch("gradNorm", squaredNormKernel, blocks, chunkThreads, chunkThreads / warpThreads * sizeof(double), tensors,
                  partial + before);
  });
  queue_.launch("gradNorm", normKernel, 1, sumThreads, sumThreads / warpThreads * sizeof(double), partial, chunks, norm);
}

void CudaDevice::adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) {
  auto* factors = static_cast<Factors*>(scratch(sizeof(Factors)));
  // Once, apart: powers in float64 are slow on devices that have little of it.
  queue_.launch("adamw", adamwFactorsKernel, 1, 1, 0, step, norm, loss, factors);
  overLaunches(parameters, [&](const Tensors& tensors, unsigned blocks, int64_t) {
    queue_.launch("adamw", adamwKernel, blocks, chunkThreads, 0, tensors, factors);
  });
}

}  // namespace lora_da::cuda
