// Float64 arrays on the device that the initializations share: each grows to its largest request and is then reused, so that
// hundreds of modules cost a handful of allocations.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "core/device.h"

namespace lora_da {

class DeviceArray {
 public:
  // At least `count` doubles; earlier contents are lost when it grows.
  double* reserve(Device& device, int64_t count, const std::string& purpose) {
    if (count > count_) {
      buffer_.reset();
      buffer_ = device.allocate(static_cast<size_t>(count) * sizeof(double), purpose);
      count_ = count;
    }
    return get();
  }
  double* get() const { return static_cast<double*>(buffer_.get()); }

 private:
  Buffer buffer_;
  int64_t count_ = 0;
};

// A whole device array as a view for Device::matmul.
inline Matrix denseView(const double* data, int64_t rows, int64_t cols) {
  return {const_cast<double*>(data), DType::f64, rows, cols, cols};
}

// Elementwise work is done on the host, a panel of rows at a time, whatever the device: it is n^2 beside n^3, and the host never
// holds a second copy of a large matrix.
class PanelCopier {
 public:
  explicit PanelCopier(Device& device) : device_(device) {}

  // fill(first, last, panel): panel [last - first, cols] = rows first .. last-1 of what array [rows, cols] is to hold.
  using Fill = std::function<void(int64_t first, int64_t last, double* panel)>;
  void write(double* array, int64_t rows, int64_t cols, const Fill& fill) {
    forPanels(rows, cols, [&](int64_t first, int64_t last) {
      double* panel = reserve(panel_, (last - first) * cols);
      fill(first, last, panel);
      device_.upload(array + first * cols, panel, bytes((last - first) * cols));
    });
  }

  // change(first, last, panel): panel [last - first, cols] holds rows first .. last-1 of the array, before and after.
  void transform(double* array, int64_t rows, int64_t cols, const Fill& change) {
    forPanels(rows, cols, [&](int64_t first, int64_t last) {
      const int64_t count = (last - first) * cols;
      double* panel = download(panel_, array + first * cols, count);
      change(first, last, panel);
      device_.upload(array + first * cols, panel, bytes(count));
    });
  }

  void copy(double* to, const double* from, int64_t rows, int64_t cols) {
    forPanels(rows, cols, [&](int64_t first, int64_t last) {
      double* panel = download(panel_, from + first * cols, (last - first) * cols);
      device_.upload(to + first * cols, panel, bytes((last - first) * cols));
    });
  }

  // a [rows, cols] = scaleA a + scaleB b.
  void blend(double* a, double scaleA, const double* b, double scaleB, int64_t rows, int64_t cols) {
    forPanels(rows, cols, [&](int64_t first, int64_t last) {
      const int64_t count = (last - first) * cols;
      double* panel = download(panel_, a + first * cols, count);
      const double* other = download(other_, b + first * cols, count);
      for (int64_t i = 0; i < count; ++i) panel[i] = scaleA * panel[i] + scaleB * other[i];
      device_.upload(a + first * cols, panel, bytes(count));
    });
  }

 private:
  // 2^16 doubles are 512 KB, which stays in the second-level cache between the two passes over a panel.
  static constexpr int64_t kPanelElements = int64_t{1} << 16;

  template <class Body>
  static void forPanels(int64_t rows, int64_t cols, Body body) {
    const int64_t step = std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, cols));
    for (int64_t first = 0; first < rows; first += step) body(first, std::min(rows, first + step));
  }
  static size_t bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(double); }
  static double* reserve(std::vector<double>& panel, int64_t count) {
    if (static_cast<int64_t>(panel.size()) < count) panel.resize(static_cast<size_t>(count));
    return panel.data();
  }
  double* download(std::vector<double>& panel, const double* from, int64_t count) {
    double* host = reserve(panel, count);
    device_.download(host, from, bytes(count));
    device_.synchronize();
    return host;
  }

  Device& device_;
  std::vector<double> panel_, other_;
};

// One per run of an initialization.
struct InitializationWorkspace {
  explicit InitializationWorkspace(Device& target) : device(target), panels(target) {}

  Device& device;
  PanelCopier panels;
  DeviceArray delta, gram, omega, values, vectors, projected, vectorIn, vectorOut;
};

}  // namespace lora_da
