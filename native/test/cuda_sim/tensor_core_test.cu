// Matrix products, tile loads and asynchronous copies.
#include <cmath>
#include <random>

#include "cuda/tensor_core.h"
#include "sim_test.h"

using namespace lora_da::cuda;

namespace {

using namespace cuda_sim;

uint32_t pairOf(float first, float second) {
  const auto bits = [](float value) { return uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(value))}; };
  return bits(first) | bits(second) << 16;
}

// d [16, 8] = c + a [16, 16] b [16, 8], all float in memory, products in bf16.
__global__ void product(const float* a, const float* b, const float* c, float* d) {
  const unsigned g = threadIdx.x / 4;
  const unsigned t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (unsigned i = 0; i < 4; ++i) {
    const float* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fa[i] = pairOf(at[0], at[1]);
    fd[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (unsigned i = 0; i < 2; ++i) fb[i] = pairOf(b[(2 * t + i * 8) * 8 + g], b[(2 * t + i * 8 + 1) * 8 + g]);
  mma16816(fd, fa, fb);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

// x is four 8 x 8 tiles one after the other, as they lie in shared memory; out [32, 4] is what each lane receives.
template <bool transposed>
__global__ void tiles(const uint16_t* x, uint32_t* out) {
  auto* shared = sharedMemory<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    loadTilesTransposed(r, shared + threadIdx.x * 8);
  } else {
    loadTiles(r, shared + threadIdx.x * 8);
  }
  for (unsigned i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void misalignedTile(uint32_t* out) {
  uint32_t r[4];
  loadTiles(r, sharedMemory<uint16_t>() + threadIdx.x * 8 + 1);
  out[threadIdx.x] = r[0];
}

// Each thread copies four floats of x [stages, 4 blockDim.x] a stage, one stage ahead of the sums, and adds its neighbour's.
template <bool wait, bool barrier>
__global__ void pipelinedSum(const float* x, float* out, int stages, int lastValid) {
  auto* shared = sharedMemory<float>();
  const unsigned width = blockDim.x * 4;
  const auto fetch = [&](int stage) {
    const bool inside = stage < stages && static_cast<int>(threadIdx.x) <= lastValid;
    copyAsync16(shared + stage % 2 * width + threadIdx.x * 4, x + stage * width + threadIdx.x * 4, inside);
    commitCopies();
  };
  float sum = 0;
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    if (wait) waitCopies<1>();
    if (barrier) __syncthreads();
    const float* mine = shared + stage % 2 * width + (threadIdx.x + 1) % blockDim.x * 4;
    for (int i = 0; i < 4; ++i) sum += mine[i];
    if (barrier) __syncthreads();
  }
  waitCopies<0>();
  out[threadIdx.x] = sum;
}

__global__ void copyFrom(const float* x, float* out) {
  auto* shared = sharedMemory<float>();
  copyAsync16(shared, x, true);
  commitCopies();
  waitCopies<0>();
  out[0] = shared[0];
}

__global__ void copyAndExit(const float* x) {
  copyAsync16(sharedMemory<float>() + threadIdx.x * 4, x, threadIdx.x != 5);
  commitCopies();
  if (threadIdx.x < 3) waitCopies<0>();
}

constexpr int stages = 5, threads = 64;

bool sumsRight(void (*kernel)(const float*, float*, int, int), int lastValid = threads - 1) {
  std::vector<float> x(stages * threads * 4);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 101);
  const DeviceArray<float> in(x), out(threads);
  REQUIRE(launchKernel(kernel, 1, threads, 2 * threads * 16, nullptr, in.data, out.data, stages, lastValid) == cudaSuccess);
  const auto got = out.host();
  CHECK(lastReport().empty());
  bool right = true;
  for (int thread = 0; thread < threads; ++thread) {
    const int neighbour = (thread + 1) % threads;
    float sum = 0;
    for (int stage = 0; stage < stages && neighbour <= lastValid; ++stage) {
      for (int i = 0; i < 4; ++i) sum += x[(stage * threads + neighbour) * 4 + i];
    }
    right = right && got[thread] == sum;
  }
  return right;
}

}  // namespace

TEST_CASE("a warp's matrix product agrees with double precision") {
  const Fresh fresh;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  const auto rounded = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = __bfloat162float(__float2bfloat16_rn(normal(generator)));
    return values;
  };
  const auto a = rounded(16 * 16), b = rounded(16 * 8), c = rounded(16 * 8);
  const DeviceArray<float> da(a), db(b), dc(c), dd(16 * 8);
  REQUIRE(launchKernel(product, 1, 32, 0, nullptr, da.data, db.data, dc.data, dd.data) == cudaSuccess);
  const auto d = dd.host();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column];
      double size = std::abs(sum);
      for (int k = 0; k < 16; ++k) {
        const double term = static_cast<double>(a[row * 16 + k]) * b[k * 8 + column];
        sum += term;
        size += std::abs(term);
      }
      CHECK(std::abs(d[row * 8 + column] - sum) <= 16 * 6e-8 * size);
    }
  }
}

TEST_CASE("tiles load as the formula says, transposed too") {
  const Fresh fresh;
  std::vector<uint16_t> x(256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i * 7 + 1);
  const DeviceArray<uint16_t> in(x);
  const DeviceArray<uint32_t> straight(128), turned(128);
  REQUIRE(launchKernel(tiles<false>, 1, 32, 512, nullptr, in.data, straight.data) == cudaSuccess);
  REQUIRE(launchKernel(tiles<true>, 1, 32, 512, nullptr, in.data, turned.data) == cudaSuccess);
  const auto s = straight.host(), t = turned.host();
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned tile = 0; tile < 4; ++tile) {
      const auto element = [&](unsigned row, unsigned column) { return uint32_t{x[tile * 64 + row * 8 + column]}; };
      const unsigned line = lane / 4, first = 2 * (lane % 4);
      CHECK(s[lane * 4 + tile] == (element(line, first) | element(line, first + 1) << 16));
      CHECK(t[lane * 4 + tile] == (element(first, line) | element(first + 1, line) << 16));
    }
  }
}

TEST_CASE("a tile's row that is not aligned is reported") {
  const Fresh fresh;
  const DeviceArray<uint32_t> out(32);
  REQUIRE(launchKernel(misalignedTile, 1, 32, 1024, nullptr, out.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorMisalignedAddress, "not aligned to 16 bytes");
}

TEST_CASE("asynchronous copies, a stage ahead, with rows outside as zeros") {
  const Fresh fresh;
  CHECK(sumsRight(pipelinedSum<true, true>));
  CHECK(sumsRight(pipelinedSum<true, true>, 40));
}

TEST_CASE("a missing wait for asynchronous copies gives wrong results") {
  const Fresh fresh;
  CHECK(wrongWithEverySeed([] { return sumsRight(pipelinedSum<false, true>); }));
}

TEST_CASE("a missing barrier after the wait gives wrong results") {
  const Fresh fresh;
  CHECK(wrongWithEverySeed([] { return sumsRight(pipelinedSum<true, false>); }));
}

TEST_CASE("an asynchronous copy that reads past the end of device memory is reported") {
  const Fresh fresh;
  const DeviceArray<float> in(std::vector<float>(6)), out(1);
  REQUIRE(launchKernel(copyFrom, 1, 1, 16, nullptr, in.data + 4, out.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorIllegalAddress, "not wholly, device memory");
}

TEST_CASE("a thread that exits while its copies are under way is reported") {
  const Fresh fresh;
  const DeviceArray<float> in(4);
  REQUIRE(launchKernel(copyAndExit, 1, 3, 48, nullptr, in.data) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  REQUIRE(launchKernel(copyAndExit, 1, 4, 64, nullptr, in.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorLaunchFailure, "thread (3, 0, 0): exited while its asynchronous copies");
}
