// What the operation tests share: a device per compute type, random matrices, and comparison with float64.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "core/device.h"

namespace lora_da::test {

inline std::unique_ptr<Device> cpuDevice(DType computeType, int threads = 2, size_t packBudget = size_t{1} << 30) {
  DeviceOptions options;
  options.device = "cpu";
  options.computeType = computeType;
  options.threads = threads;
  options.packBudget = packBudget;
  return makeDevice(options);
}

// False where AddressSanitizer has an operator new and a heap of its own: freed memory rests before it is used again, and the
// process grows meanwhile.
#ifdef __SANITIZE_ADDRESS__
inline constexpr bool ownHeap = false;
#else
inline constexpr bool ownHeap = true;
#endif

// Fresh numbers each run, so that no test passes for one lucky draw; doctest prints the seed on failure through INFO.
inline uint64_t freshSeed() {
  return std::random_device{}();
}

// A matrix on the device (host memory on the CPU) with its float64 copy, rounded to the device's type first.
struct TestMatrix {
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  std::vector<double> exact;
  Matrix view;

  TestMatrix(DType type, int64_t rows, int64_t cols, int64_t extraStride = 0) {
    const int64_t stride = cols + extraStride;
    exact.assign(static_cast<size_t>(rows * stride), 0.0);
    if (type == DType::bf16)
      bf16.assign(static_cast<size_t>(rows * stride), 0);
    else
      f32.assign(static_cast<size_t>(rows * stride), 0.0f);
    view =
        Matrix{type == DType::bf16 ? static_cast<void*>(bf16.data()) : static_cast<void*>(f32.data()), type, rows, cols, stride};
  }
  TestMatrix(const TestMatrix&) = delete;

  void set(int64_t i, double value) {
    if (view.dtype == DType::bf16) {
      bf16[static_cast<size_t>(i)] = floatToBf16(static_cast<float>(value));
      exact[static_cast<size_t>(i)] = bf16ToFloat(bf16[static_cast<size_t>(i)]);
    } else {
      f32[static_cast<size_t>(i)] = static_cast<float>(value);
      exact[static_cast<size_t>(i)] = f32[static_cast<size_t>(i)];
    }
  }
  void randomize(std::mt19937_64& random, double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (size_t i = 0; i < exact.size(); ++i) set(static_cast<int64_t>(i), normal(random));
  }
  double at(int64_t row, int64_t col) const {
    const size_t i = static_cast<size_t>(row * view.stride + col);
    return view.dtype == DType::bf16 ? bf16ToFloat(bf16[i]) : f32[i];
  }
  double exactAt(int64_t row, int64_t col) const { return exact[static_cast<size_t>(row * view.stride + col)]; }
};

// ||actual - expected|| / ||expected|| over the view.
template <class Expected>
double relativeError(const TestMatrix& actual, Expected expected) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < actual.view.rows; ++i) {
    for (int64_t j = 0; j < actual.view.cols; ++j) {
      const double e = expected(i, j), d = actual.at(i, j) - e;
      difference += d * d;
      norm += e * e;
    }
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

inline double tolerance(DType type) {
  return type == DType::bf16 ? 6e-3 : 3e-6;
}

}  // namespace lora_da::test
