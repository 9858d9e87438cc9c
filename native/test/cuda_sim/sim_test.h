// What the simulator's own tests share.
#pragma once

#include <cuda_runtime.h>
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda_sim_api.h"

namespace cuda_sim {

// Each test begins with nothing queued, allocated or reported.
struct Fresh {
  Fresh() {
    resetForTest();
    setInterleaving(Interleaving::lazy);
  }
  ~Fresh() { resetForTest(); }
};

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t count;

  explicit DeviceArray(size_t n) : count(n) { REQUIRE(cudaMalloc(&data, n * sizeof(T)) == cudaSuccess); }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    REQUIRE(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }

  std::vector<T> host() const {
    std::vector<T> result(count);
    cudaDeviceSynchronize();
    cudaMemcpy(result.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost);
    return result;
  }
};

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { REQUIRE(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking) == cudaSuccess); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(handle); }
  operator cudaStream_t() const { return handle; }
};

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// The misuse that was reported, and the error that every call returns after it.
inline void checkReported(cudaError_t error, const std::string& part) {
  INFO("reported: " << lastReport());
  CHECK(contains(lastReport(), part));
  CHECK(cudaDeviceSynchronize() == error);
}

// Whether something goes wrong with every one of a number of seeds.
inline bool wrongWithEverySeed(const std::function<bool()>& right) {
  for (uint64_t each = 1; each <= 20; ++each) {
    const Fresh fresh;
    setSeed(each);
    if (right()) return false;
  }
  return true;
}

// Under AddressSanitizer the process ends at a bad access, elsewhere the simulator reports it: `expected` is what either says.
inline void checkCaught(const std::function<void()>& misuse, const std::string& sanitizer, const std::string& reported) {
#if defined(__SANITIZE_ADDRESS__)
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    misuse();
    _exit(0);
  }
  close(ends[1]);
  std::string output;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) output.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  INFO(output);
  CHECK(status != 0);
  CHECK(contains(output, sanitizer));
#else
  misuse();
  INFO("reported: " << lastReport());
  CHECK(contains(lastReport(), reported));
#endif
}

}  // namespace cuda_sim
