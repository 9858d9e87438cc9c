// The limits of a launch.
#include <cxxabi.h>

#include <fstream>

#include "cuda/launch.h"
#include "sim_test.h"
#include "symbols.h"

using namespace lora_da::cuda;

namespace {

using namespace cuda_sim;

__global__ void nothing() {}
__global__ void heavy() {}
__global__ void one(int* out) {
  out[0] = sharedMemory<char>() != nullptr;
}

cudaError_t tryLaunch(dim3 grid, dim3 block, size_t shared = 0) {
  return launchKernel(nothing, grid, block, shared, nullptr);
}

}  // namespace

TEST_CASE("a launch beyond the device's limits gets the error that CUDA gives") {
  const Fresh fresh;
  CHECK(tryLaunch(1, 1024) == cudaSuccess);
  CHECK(tryLaunch(1, 1025) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(1, dim3(32, 33)) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(1, dim3(1, 1, 65)) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(1, 0) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(0, 1) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(dim3(1, 65535), 1) == cudaSuccess);
  CHECK(tryLaunch(dim3(1, 65536), 1) == cudaErrorInvalidConfiguration);
  CHECK(tryLaunch(dim3(1, 1, 65536), 1) == cudaErrorInvalidConfiguration);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("more than 48 KB of shared memory must be asked for") {
  const Fresh fresh;
  const auto* kernel = reinterpret_cast<const void*>(nothing);
  CHECK(tryLaunch(1, 1, 48 << 10) == cudaSuccess);
  CHECK(tryLaunch(1, 1, (48 << 10) + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10) == cudaSuccess);
  CHECK(tryLaunch(1, 1, 227 << 10) == cudaSuccess);
  CHECK(tryLaunch(1, 1, (227 << 10) + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) == cudaErrorInvalidValue);
  CHECK(launchKernel(heavy, 1, 1, 49 << 10, nullptr) == cudaErrorInvalidValue);
}

TEST_CASE("registers come from a table, by the kernel's name") {
  const char* path = "cuda_sim_registers.txt";
  setenv("CUDA_SIM_REGISTERS", path, 1);
  const std::string kernel = "_ZN47_GLOBAL__N__00000000_14_launch_test_cu_abcdefgh5heavyEv";
  const std::string asTable = "_Z9somethingv 12\n" + kernel + " 80\n";
  const std::string asPrinted = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function '" + kernel +
                                "' for 'sm_90'\nptxas info    : Used 80 registers, used 1 barriers\n";
  for (const std::string& text : {asTable, asPrinted}) {
    std::ofstream(path) << text;
    const Fresh fresh;
    CHECK(launchKernel(heavy, 1, 768, 0, nullptr) == cudaSuccess);
    CHECK(launchKernel(heavy, 1, 896, 0, nullptr) == cudaErrorLaunchOutOfResources);
    CHECK(launchKernel(nothing, 1, 1024, 0, nullptr) == cudaSuccess);
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, heavy) == cudaSuccess);
    CHECK(attributes.numRegs == 80);
    CHECK(attributes.maxThreadsPerBlock == 768);
    int blocks = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, heavy, 256, 0) == cudaSuccess);
    CHECK(blocks == 3);
  }
  unsetenv("CUDA_SIM_REGISTERS");
  std::remove(path);
}

TEST_CASE("occupancy is limited by threads, blocks and shared memory") {
  const Fresh fresh;
  int blocks = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 32, 0) == cudaSuccess);
  CHECK(blocks == 32);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 1024, 0);
  CHECK(blocks == 2);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 128, 40 << 10);
  CHECK(blocks == 5);
}

TEST_CASE("the device's properties are of one piece") {
  const Fresh fresh;
  cudaDeviceProp properties;
  REQUIRE(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  CHECK(std::string(properties.name) == "CUDA simulator");
  CHECK(properties.major * 10 + properties.minor == 90);
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess);
  CHECK(value == properties.multiProcessorCount);
  CHECK(cudaGetDeviceProperties(&properties, 1) == cudaErrorInvalidDevice);
}

TEST_CASE("kernels are called by their names, internal ones too") {
  CHECK(functionName(reinterpret_cast<const void*>(nothing)) == "(anonymous namespace)::nothing()");
  CHECK(contains(functionName(reinterpret_cast<const void*>(one)), "::one(int*)"));
}
