// What the tests of operations share: the devices they run on, memory of a device with its values on the host, random matrices,
// and comparison with float64.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/device.h"

namespace lora_da::test {

// Where weights lie: as in the file, copied as the device likes it, or laid out for each product.
enum class WeightLayout { mapped, copied, prepacked };

// A device that the tests run on. LORA_DA_TEST_DEVICES lists them by name, separated by commas: cpu (the default), guarded-cpu
// (guarded_device.h), or what --device takes.
struct TestDevice {
  std::string name;

  // Computes on the CPU, where the number of threads and layouts of weights mean something.
  bool onCpu() const;
  // Replays what recorded() has seen before.
  bool replays() const { return name != "cpu"; }
  std::unique_ptr<Device> make(DType computeType, WeightLayout layout = WeightLayout::copied, int threads = 2) const;
};

const std::vector<TestDevice>& devices();

// Layouts that the device tells apart, from the one that takes the least memory on.
std::vector<WeightLayout> weightLayouts(const TestDevice& tested);

template <class Body>
void forEachDevice(Body body) {
  for (const TestDevice& tested : devices()) {
    INFO("device ", tested.name);
    body(tested);
  }
}

// A test case that runs on every device, called `tested` in its body.
#define DEVICE_TEST_CASE_OF(function, ...)        \
  static void function(const TestDevice& tested); \
  TEST_CASE(__VA_ARGS__) {                        \
    forEachDevice(function);                      \
  }                                               \
  static void function([[maybe_unused]] const TestDevice& tested)
#define DEVICE_TEST_CASE(...) DEVICE_TEST_CASE_OF(DOCTEST_ANONYMOUS(onEveryDevice), __VA_ARGS__)

// Decorates a test case of what only the CPU device has, or of no device; it is skipped where `cpu` is not listed, or not
// `possible`.
doctest::skip cpuOnly(const char* reason, bool possible = true);

// The device of such a test case.
inline std::unique_ptr<Device> cpuDevice(DType computeType, int threads = 2) {
  return TestDevice{"cpu"}.make(computeType, WeightLayout::copied, threads);
}

// Whether large cases are left out: where LORA_DA_TEST_SMALL is set, as it is for a simulated device, which takes its time.
bool smallCasesOnly();

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

// An array on the device, and its values on the host. data() is for the operations of a device, which may write there: the next
// host() fetches what they left. edit() is for the host, which may write: the next data() uploads it. Take pointers anew for each
// operation. `offset` elements before it make it as badly aligned as a part of a larger array may be.
template <class T>
class DeviceVector {
 public:
  DeviceVector(Device& device, std::vector<T> values, size_t offset = 0)
      : device_(device),
        host_(std::move(values)),
        offset_(offset),
        memory_(device.allocate((host_.size() + offset) * sizeof(T), "test")) {}
  DeviceVector(Device& device, size_t count, T value = T()) : DeviceVector(device, std::vector<T>(count, value)) {}
  DeviceVector(Device& device, std::initializer_list<T> values) : DeviceVector(device, std::vector<T>(values)) {}

  T* data() const {
    if (newer_ == Side::host) device_.upload(memory(), host_.data(), host_.size() * sizeof(T));
    newer_ = Side::device;
    return memory();
  }
  const std::vector<T>& host() const {
    if (newer_ == Side::device) {
      device_.download(host_.data(), memory(), host_.size() * sizeof(T));
      device_.synchronize();
      newer_ = Side::neither;
    }
    return host_;
  }
  std::vector<T>& edit() {
    host();
    newer_ = Side::host;
    return host_;
  }
  size_t size() const { return host_.size(); }
  const T& operator[](size_t i) const { return host()[i]; }

 private:
  enum class Side { host, device, neither };

  T* memory() const { return static_cast<T*>(memory_.get()) + offset_; }

  Device& device_;
  mutable std::vector<T> host_;
  size_t offset_;
  mutable Side newer_ = Side::host;
  Buffer memory_;
};

// A matrix on the device with the float64 copy of what set() gave it, rounded to its type first. Strides longer than the rows
// leave a margin behind them.
class TestMatrix {
 public:
  std::vector<double> exact;

  TestMatrix(Device& device, DType type, int64_t rows, int64_t cols, int64_t extraStride = 0)
      : exact(static_cast<size_t>(rows * (cols + extraStride)), 0.0),
        shape_{nullptr, type, rows, cols, cols + extraStride},
        bytes_(device, exact.size() * sizeOf(type)) {}
  TestMatrix(const TestMatrix&) = delete;

  DType type() const { return shape_.dtype; }
  int64_t rows() const { return shape_.rows; }
  int64_t cols() const { return shape_.cols; }
  int64_t stride() const { return shape_.stride; }

  // For the operations of a device; see DeviceVector.
  Matrix view() const {
    Matrix view = shape_;
    view.data = bytes_.data();
    return view;
  }
  // Its values on the host, margins included: float for float32, uint16_t for bfloat16.
  template <class T>
  const T* host() const {
    return reinterpret_cast<const T*>(bytes_.host().data());
  }
  template <class T>
  T* edit() {
    return reinterpret_cast<T*>(bytes_.edit().data());
  }
  const std::vector<unsigned char>& bits() const { return bytes_.host(); }

  void set(int64_t i, double value) {
    const auto rounded = static_cast<float>(value);
    const auto at = static_cast<size_t>(i);
    if (type() == DType::bf16) {
      edit<uint16_t>()[at] = floatToBf16(rounded);
      exact[at] = bf16ToFloat(floatToBf16(rounded));
    } else {
      edit<float>()[at] = rounded;
      exact[at] = rounded;
    }
  }
  void randomize(std::mt19937_64& random, double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (size_t i = 0; i < exact.size(); ++i) set(static_cast<int64_t>(i), normal(random));
  }
  // Element i of the memory, margins included.
  double flat(int64_t i) const { return type() == DType::bf16 ? bf16ToFloat(host<uint16_t>()[i]) : host<float>()[i]; }
  double at(int64_t row, int64_t col) const { return flat(row * stride() + col); }
  double exactAt(int64_t row, int64_t col) const { return exact[static_cast<size_t>(row * stride() + col)]; }

 private:
  Matrix shape_;
  DeviceVector<unsigned char> bytes_;
};

// ||actual - expected|| / ||expected|| over the view.
template <class Expected>
double relativeError(const TestMatrix& actual, Expected expected) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < actual.rows(); ++i) {
    for (int64_t j = 0; j < actual.cols(); ++j) {
      const double e = expected(i, j), d = actual.at(i, j) - e;
      difference += d * d;
      norm += e * e;
    }
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

// ||a - b|| / ||b||
inline double relativeDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

inline double tolerance(DType type) {
  return type == DType::bf16 ? 6e-3 : 3e-6;
}

}  // namespace lora_da::test
