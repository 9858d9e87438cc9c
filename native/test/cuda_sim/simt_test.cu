// Threads, warps and barriers: that right kernels give right results, and that wrong ones do not.
#include <cmath>
#include <numeric>

#include "cuda/launch.h"
#include "sim_test.h"

using namespace lora_da::cuda;

namespace {

using namespace cuda_sim;

// Sums each row of x [gridDim.x, width].
__global__ void __launch_bounds__(128) sumRows(const float* __restrict__ x, float* out, int width) {
  auto* partial = sharedMemory<float>();
  float sum = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[blockIdx.x * width + i];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += partial[i];
    out[blockIdx.x] = total;
  }
}

// Reverses each block's elements through shared memory, twice with the same memory.
template <bool firstBarrier, bool secondBarrier>
__global__ void reverseTwice(const int* x, int* y, int* z) {
  auto* shared = sharedMemory<int>();
  const unsigned i = threadIdx.x;
  const unsigned other = blockDim.x - 1 - i;
  const unsigned offset = blockIdx.x * blockDim.x;
  shared[i] = x[offset + i];
  if (firstBarrier) __syncthreads();
  y[offset + i] = shared[other];
  if (secondBarrier) __syncthreads();
  shared[i] = x[offset + i] + 1;
  __syncthreads();
  z[offset + i] = shared[other];
}

bool reversesRightly(void (*kernel)(const int*, int*, int*)) {
  constexpr int blocks = 4, threads = 64;
  std::vector<int> x(blocks * threads);
  std::iota(x.begin(), x.end(), 0);
  const DeviceArray<int> in(x), once(x.size()), twice(x.size());
  REQUIRE(launchKernel(kernel, blocks, threads, threads * sizeof(int), nullptr, in.data, once.data, twice.data) == cudaSuccess);
  const auto y = once.host(), z = twice.host();
  bool right = true;
  for (int i = 0; i < blocks * threads; ++i) {
    const int mirrored = i / threads * threads + threads - 1 - i % threads;
    right = right && y[i] == mirrored && z[i] == mirrored + 1;
  }
  return right;
}

template <bool barrier>
__global__ void neighbourInWarp(const int* x, int* y) {
  auto* shared = sharedMemory<int>();
  const unsigned i = threadIdx.x;
  shared[i] = x[i];
  if (barrier) __syncwarp();
  y[i] = shared[i ^ 1u];
}

bool neighboursRight(void (*kernel)(const int*, int*)) {
  std::vector<int> x(64);
  std::iota(x.begin(), x.end(), 0);
  const DeviceArray<int> in(x), out(x.size());
  REQUIRE(launchKernel(kernel, 1, 64, 64 * sizeof(int), nullptr, in.data, out.data) == cudaSuccess);
  const auto y = out.host();
  bool right = true;
  for (int i = 0; i < 64; ++i) right = right && y[i] == (i ^ 1);
  return right;
}

// One warp; out [4, 32] of each kind of shuffle.
template <class T>
__global__ void shuffles(T* out, int by, int width) {
  const unsigned lane = threadIdx.x;
  const T value = static_cast<T>(100 + lane);
  out[lane] = __shfl_sync(0xffffffffu, value, by, width);
  out[32 + lane] = __shfl_up_sync(0xffffffffu, value, by, width);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, value, by, width);
  out[96 + lane] = __shfl_xor_sync(0xffffffffu, value, by, width);
}

template <class T>
void checkShuffles() {
  for (int width : {2, 8, 16, 32}) {
    for (int by : {0, 1, 3, 7, 16, 31}) {
      const Fresh fresh;
      const DeviceArray<T> out(4 * 32);
      REQUIRE(launchKernel(shuffles<T>, 1, 32, 0, nullptr, out.data, by, width) == cudaSuccess);
      const auto got = out.host();
      for (int lane = 0; lane < 32; ++lane) {
        const int first = lane / width * width;
        const int end = first + width;
        CHECK(got[lane] == static_cast<T>(100 + first + by % width));
        CHECK(got[32 + lane] == static_cast<T>(100 + (lane - by >= first ? lane - by : lane)));
        CHECK(got[64 + lane] == static_cast<T>(100 + (lane + by < end ? lane + by : lane)));
        CHECK(got[96 + lane] == static_cast<T>(100 + ((lane ^ by) < end ? lane ^ by : lane)));
      }
    }
  }
}

// The halves of each warp go different ways, meet among themselves, and together afterwards.
__global__ void divergentHalves(int* out) {
  const unsigned lane = threadIdx.x % 32;
  int value = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) value = __shfl_sync(0x0000ffffu, value, static_cast<int>((lane + 1) % 16));
  } else {
    value = __shfl_sync(0xffff0000u, value, 31);
  }
  __syncwarp();
  value += __shfl_xor_sync(0xffffffffu, value, 16);
  out[threadIdx.x] = value;
}

// Every third thread leaves before the barrier, which the others pass without it.
__global__ void earlyExit(int* out) {
  auto* shared = sharedMemory<int>();
  shared[threadIdx.x] = -1;
  __syncthreads();
  if (threadIdx.x % 3 == 0) return;
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  int sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  out[threadIdx.x] = sum;
}

__global__ void votes(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  int* mine = out + i * 9;
  mine[0] = __syncthreads_or(i == 37);
  mine[1] = __syncthreads_and(i != 37);
  mine[2] = __syncthreads_count(i < 37);
  mine[3] = static_cast<int>(__ballot_sync(0xffffffffu, i % 32 == 5));
  mine[4] = __any_sync(0xffffffffu, i >= 32);
  mine[5] = __all_sync(0xffffffffu, i >= 32);
  mine[6] = static_cast<int>(__activemask());
  mine[7] = __reduce_add_sync(0xffffffffu, i);
  mine[8] = __reduce_max_sync(0xffffffffu, i);
}

__global__ void countAtoms(unsigned* counter, float* sum, double* wide, int* largest, unsigned* last) {
  atomicAdd(counter, 1u);
  atomicAdd(sum, 0.5f);
  atomicAdd(wide, 0.25);
  atomicMax(largest, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  __threadfence();
  if (threadIdx.x == 0 && atomicInc(last, gridDim.x - 1) == gridDim.x - 1) atomicAdd(counter, 1000u);
}

__global__ void markIndices(unsigned* seen) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  atomicAdd(&seen[block * threads + thread], 1u);
}

__global__ void copyShared(float* out) {
  out[threadIdx.x] = sharedMemory<float>()[threadIdx.x];
}
__global__ void copy(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = x[i];
}
struct Buffers {
  const float* x;
  float* y;
};
__global__ void copyOf(Buffers buffers) {
  buffers.y[threadIdx.x] = buffers.x[threadIdx.x];
}

__global__ void divergentBarrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrierInLoop() {
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __syncthreads();
  __syncthreads_or(0);
}
__global__ void shuffleWithExited(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}
__global__ void shuffleAcrossBarrier(int* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
    __syncthreads();
  }
}
__global__ void shuffleOutsideMask(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}
__global__ void shuffleFromOutside(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}
__global__ void overrunShared() {
  sharedMemory<float>()[threadIdx.x] = 0;
}

}  // namespace

TEST_CASE("rows are summed through shuffles and shared memory") {
  const Fresh fresh;
  constexpr int rows = 64, width = 1000;
  std::vector<float> x(rows * width);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13);
  const DeviceArray<float> in(x), out(rows);
  REQUIRE(launchKernel(sumRows, rows, 128, 4 * sizeof(float), nullptr, in.data, out.data, width) == cudaSuccess);
  const auto sums = out.host();
  for (int row = 0; row < rows; ++row) {
    CHECK(sums[row] == std::accumulate(x.begin() + row * width, x.begin() + (row + 1) * width, 0.0f));
  }
  CHECK(lastReport().empty());
}

TEST_CASE("shuffles take from the lane that CUDA says, for each type and width") {
  checkShuffles<int>();
  checkShuffles<unsigned>();
  checkShuffles<float>();
  checkShuffles<double>();
  checkShuffles<long long>();
}

TEST_CASE("a shuffle waits for the lanes of its mask only") {
  const Fresh fresh;
  const DeviceArray<int> out(64);
  REQUIRE(launchKernel(divergentHalves, 1, 64, 0, nullptr, out.data) == cudaSuccess);
  const auto got = out.host();
  for (int i = 0; i < 64; ++i) {
    const int first = i / 32 * 32;
    CHECK(got[i] == first + (i % 16 + 3) % 16 + first + 31);
  }
}

TEST_CASE("a barrier waits for the threads that have not exited") {
  const Fresh fresh;
  const DeviceArray<int> out(70);
  REQUIRE(launchKernel(earlyExit, 1, 70, 70 * sizeof(int), nullptr, out.data) == cudaSuccess);
  const auto got = out.host();
  int sum = 0;
  for (int i = 0; i < 70; ++i) sum += i % 3 == 0 ? -1 : i;
  for (int i = 0; i < 70; ++i) {
    if (i % 3 != 0) CHECK(got[i] == sum);
  }
}

TEST_CASE("votes of warps and blocks") {
  const Fresh fresh;
  const DeviceArray<int> out(64 * 9);
  REQUIRE(launchKernel(votes, 1, 64, 0, nullptr, out.data) == cudaSuccess);
  const auto got = out.host();
  for (int i = 0; i < 64; ++i) {
    const int* mine = got.data() + i * 9;
    CHECK(mine[0] != 0);
    CHECK(mine[1] == 0);
    CHECK(mine[2] == 37);
    CHECK(mine[3] == 32);
    CHECK((mine[4] != 0) == (i >= 32));
    CHECK((mine[5] != 0) == (i >= 32));
    CHECK((mine[6] >> i % 32 & 1) == 1);
    CHECK(mine[7] == i / 32 * 32 * 32 + 31 * 16);
    CHECK(mine[8] == i / 32 * 32 + 31);
  }
}

TEST_CASE("atomics, and the last block of a grid") {
  const Fresh fresh;
  const DeviceArray<unsigned> counter(std::vector<unsigned>{0}), last(std::vector<unsigned>{0});
  const DeviceArray<float> sum(std::vector<float>{0});
  const DeviceArray<double> wide(std::vector<double>{0});
  const DeviceArray<int> largest(std::vector<int>{-1});
  REQUIRE(launchKernel(countAtoms, 7, 96, 0, nullptr, counter.data, sum.data, wide.data, largest.data, last.data) == cudaSuccess);
  CHECK(counter.host()[0] == 7 * 96 + 1000);
  CHECK(sum.host()[0] == 7 * 96 * 0.5f);
  CHECK(wide.host()[0] == 7 * 96 * 0.25);
  CHECK(largest.host()[0] == 7 * 96 - 1);
}

TEST_CASE("every thread of every block runs once") {
  const Fresh fresh;
  const dim3 grid(3, 4, 5), block(6, 7, 2);
  const DeviceArray<unsigned> seen(std::vector<unsigned>(3 * 4 * 5 * 6 * 7 * 2));
  REQUIRE(launchKernel(markIndices, grid, block, 0, nullptr, seen.data) == cudaSuccess);
  for (unsigned times : seen.host()) CHECK(times == 1);
}

TEST_CASE("a missing barrier gives wrong results") {
  const Fresh fresh;
  CHECK(reversesRightly(reverseTwice<true, true>));
  CHECK(wrongWithEverySeed([] { return reversesRightly(reverseTwice<false, true>); }));
  CHECK(wrongWithEverySeed([] { return reversesRightly(reverseTwice<true, false>); }));
}

TEST_CASE("a missing barrier within a warp gives wrong results") {
  const Fresh fresh;
  CHECK(neighboursRight(neighbourInWarp<true>));
  CHECK(wrongWithEverySeed([] { return neighboursRight(neighbourInWarp<false>); }));
}

TEST_CASE("memory that nothing wrote reads as NaN") {
  const Fresh fresh;
  const DeviceArray<float> in(32), out(std::vector<float>(32));
  REQUIRE(launchKernel(copy, 1, 32, 0, nullptr, in.data, out.data, 32) == cudaSuccess);
  for (float value : out.host()) CHECK(std::isnan(value));
  REQUIRE(launchKernel(copyShared, 1, 32, 32 * sizeof(float), nullptr, out.data) == cudaSuccess);
  for (float value : out.host()) CHECK(std::isnan(value));
}

TEST_CASE("threads that wait at different barriers are reported with where they wait") {
  const Fresh fresh;
  REQUIRE(launchKernel(divergentBarrier, 2, 64, 0, nullptr) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  checkReported(cudaErrorLaunchFailure, "wait at different barriers");
  CHECK(contains(lastReport(), "divergentBarrier"));
  CHECK(contains(lastReport(), "simt_test.cu:"));
}

TEST_CASE("threads that pass a barrier a different number of times are reported") {
  const Fresh fresh;
  REQUIRE(launchKernel(barrierInLoop, 1, 64, 0, nullptr) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorLaunchFailure, "__syncthreads_or");
}

TEST_CASE("a shuffle that counts on a lane which exited is reported") {
  const Fresh fresh;
  const DeviceArray<int> out(32);
  REQUIRE(launchKernel(shuffleWithExited, 1, 32, 0, nullptr, out.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorLaunchFailure, "thread 5 exited");
}

TEST_CASE("a shuffle that counts on a lane which waits at a barrier is reported") {
  const Fresh fresh;
  const DeviceArray<int> out(64);
  REQUIRE(launchKernel(shuffleAcrossBarrier, 1, 64, 0, nullptr, out.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorLaunchFailure, "thread 5 at __syncthreads");
}

TEST_CASE("a lane outside the mask that it gives is reported") {
  const Fresh fresh;
  const DeviceArray<int> out(32);
  REQUIRE(launchKernel(shuffleOutsideMask, 1, 32, 0, nullptr, out.data) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorLaunchFailure, "not in the mask");
}

TEST_CASE("a value from a lane outside the mask is NaN") {
  const Fresh fresh;
  const DeviceArray<float> out(16);
  REQUIRE(launchKernel(shuffleFromOutside, 1, 32, 0, nullptr, out.data) == cudaSuccess);
  for (float value : out.host()) CHECK(std::isnan(value));
}

TEST_CASE("a write past the end of device memory is caught") {
  const Fresh fresh;
  checkCaught(
      [] {
        const DeviceArray<float> in(std::vector<float>(33)), out(32);
        launchKernel(copy, 1, 64, 0, nullptr, in.data, out.data, 33);
        cudaDeviceSynchronize();
      },
      "heap-buffer-overflow", "wrote beside one of its buffers, of 128 bytes");
}

#if defined(__SANITIZE_ADDRESS__)
TEST_CASE("a read past the end of device memory is caught") {
  const Fresh fresh;
  checkCaught(
      [] {
        const DeviceArray<float> in(std::vector<float>(32)), out(33);
        launchKernel(copy, 1, 64, 0, nullptr, in.data, out.data, 33);
        cudaDeviceSynchronize();
      },
      "heap-buffer-overflow", "");
}

TEST_CASE("device memory that the host reads directly is caught") {
  const Fresh fresh;
  checkCaught(
      [] {
        const DeviceArray<float> in(std::vector<float>(32));
        std::printf("%f\n", static_cast<double>(in.data[3]));
      },
      "use-after-poison", "");
}
#endif

TEST_CASE("a write past the end of shared memory is caught") {
  const Fresh fresh;
  checkCaught(
      [] {
        launchKernel(overrunShared, 1, 33, 32 * sizeof(float), nullptr);
        cudaDeviceSynchronize();
      },
      "heap-buffer-overflow", "past the end of its 128 bytes of shared memory");
}

TEST_CASE("a kernel that gets host memory is reported") {
  const Fresh fresh;
  std::vector<float> host(32);
  const DeviceArray<float> out(32);
  REQUIRE(launchKernel(copy, 1, 32, 0, nullptr, host.data(), out.data, 32) == cudaSuccess);
  cudaDeviceSynchronize();
  checkReported(cudaErrorIllegalAddress, "pointer parameter 1 of 2 is not memory of its device");
}

TEST_CASE("parameters that are structures keep their memory in use") {
  const Fresh fresh;
  const DeviceArray<float> in(std::vector<float>(32, 2.0f));
  float* out = nullptr;
  REQUIRE(cudaMalloc(&out, 128) == cudaSuccess);
  REQUIRE(launchKernel(copyOf, 1, 32, 0, nullptr, Buffers{in.data, out}) == cudaSuccess);
  cudaFree(out);
  checkReported(cudaErrorIllegalAddress, "freed while queued work still uses it: (anonymous namespace)::copyOf");
}

TEST_CASE("the order of threads follows from the seed") {
  const auto firstOf = [](uint64_t with) {
    const Fresh fresh;
    setSeed(with);
    std::vector<int> x(64);
    std::iota(x.begin(), x.end(), 0);
    const DeviceArray<int> in(x), out(64);
    launchKernel(neighbourInWarp<false>, 1, 64, 64 * sizeof(int), nullptr, in.data, out.data);
    return out.host();
  };
  CHECK(firstOf(7) == firstOf(7));
  CHECK(firstOf(7) != firstOf(8));
}
