// Elementwise passes over the initializations' matrices, and products with one column.
#include <doctest/doctest.h>

#include <limits>

#include "test_dense.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

template <class T>
Matrix view(const DeviceVector<T>& values, int64_t rows, int64_t cols) {
  return {values.data(), std::is_same_v<T, float> ? DType::f32 : DType::f64, rows, cols, cols};
}

template <class T>
std::vector<T> randomValues(int64_t count, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(normal(random));
  return values;
}

std::vector<double> undefined(int64_t count) {
  return std::vector<double>(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
}

// Odd and even, within one block of threads and over several, with and without a whole number of tiles.
const std::vector<std::pair<int64_t, int64_t>> shapes = {{1, 1}, {3, 5}, {64, 64}, {66, 36}, {37, 131}, {130, 68}, {211, 333}};

template <class T>
void checkScale(Device& device, std::mt19937_64& random) {
  for (const auto& [rows, cols] : shapes) {
    for (const size_t offset : {0, 1}) {
      const std::vector<T> before = randomValues<T>(rows * cols, random);
      const double factor = 1.0 / 37;
      const DeviceVector<T> x(device, before, offset);
      device.scale(view(x, rows, cols), factor);
      std::vector<T> expected = before;
      for (T& value : expected) value = static_cast<T>(static_cast<double>(value) * factor);
      CHECK(x.host() == expected);
    }
  }
}

template <class T>
void checkCount(Device& device, std::mt19937_64& random) {
  const T infinity = std::numeric_limits<T>::infinity(), notANumber = std::numeric_limits<T>::quiet_NaN();
  for (const auto& [rows, cols] : shapes) {
    for (const size_t offset : {0, 1}) {
      std::vector<T> values = randomValues<T>(rows * cols, random);
      values.front() = std::numeric_limits<T>::max();
      CHECK(device.countNonFinite(view(DeviceVector<T>(device, values, offset), rows, cols)) == 0);
      int64_t expected = 0;
      for (const T bad : {infinity, -infinity, notANumber}) {
        T& value = values[random() % values.size()];
        expected += std::isfinite(value);
        value = bad;
      }
      CHECK(device.countNonFinite(view(DeviceVector<T>(device, values, offset), rows, cols)) == expected);
      std::fill(values.begin(), values.end(), notANumber);
      CHECK(device.countNonFinite(view(DeviceVector<T>(device, values, offset), rows, cols)) == rows * cols);
    }
  }
}

}  // namespace

DEVICE_TEST_CASE("copies are whole, and of nothing nothing") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  const std::vector<double> values = randomValues<double>(1031, random);
  const DeviceVector<double> from(*device, values), to(*device, undefined(1031));
  device->copy(to.data(), from.data(), 0);
  CHECK(std::isnan(to.host().front()));
  device->copy(to.data(), from.data(), values.size() * sizeof(double));
  CHECK(to.host() == values);
}

DEVICE_TEST_CASE("scaling multiplies in float64 and rounds once") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  checkScale<float>(*device, random);
  checkScale<double>(*device, random);
}

DEVICE_TEST_CASE("a blend is the weighted sum of both arrays") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{511}, int64_t{512}, int64_t{40001}}) {
    for (const size_t offset : {0, 1}) {
      const std::vector<double> a = randomValues<double>(count, random), b = randomValues<double>(count, random);
      const DeviceVector<double> onDevice(*device, a, offset), other(*device, b);
      device->blend(onDevice.data(), -0.75, other.data(), 1e3, count);
      const std::vector<double> result = onDevice.host();
      double worst = 0;
      for (size_t i = 0; i < result.size(); ++i) {
        const Real first = -0.75L * static_cast<Real>(a[i]), second = 1e3L * static_cast<Real>(b[i]);
        worst =
            std::max(worst, static_cast<double>(std::abs(result[i] - (first + second)) / (std::abs(first) + std::abs(second))));
      }
      CHECK(worst < 3e-16);
      CHECK(other.host() == b);
    }
  }
}

DEVICE_TEST_CASE("a value is added to the diagonal and nowhere else") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  for (const int64_t n : {1, 7, 300}) {
    std::vector<double> expected = randomValues<double>(n * n, random);
    const DeviceVector<double> a(*device, expected);
    device->addToDiagonal(a.data(), n, 1e-6);
    for (int64_t i = 0; i < n; ++i) expected[static_cast<size_t>(i * n + i)] += 1e-6;
    CHECK(a.host() == expected);
  }
}

DEVICE_TEST_CASE("a scaled transpose overwrites, from rows of any alignment") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [rows, cols] : shapes) {
    for (const size_t offset : {0, 1}) {
      const std::vector<float> x = randomValues<float>(rows * cols, random);
      const std::vector<double> scale = randomValues<double>(rows, random);
      const DeviceVector<float> from(*device, x, offset);
      const DeviceVector<double> scales(*device, scale), to(*device, undefined(rows * cols), offset);
      device->scaledTranspose(from.data(), rows, cols, scales.data(), to.data());
      std::vector<double> expected(x.size());
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          expected[static_cast<size_t>(j * rows + i)] =
              scale[static_cast<size_t>(i)] * static_cast<double>(x[static_cast<size_t>(i * cols + j)]);
        }
      }
      CHECK(to.host() == expected);
    }
  }
}

DEVICE_TEST_CASE("infinities and what is not a number are counted") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  checkCount<float>(*device, random);
  checkCount<double>(*device, random);
}

DEVICE_TEST_CASE("a float64 product with one column overwrites or adds, for any strides") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [rows, cols] : shapes) {
    for (const Transpose side : {Transpose::no, Transpose::yes}) {
      for (const int64_t extra : {0, 3}) {
        const int64_t inner = side == Transpose::no ? cols : rows, outer = side == Transpose::no ? rows : cols;
        const std::vector<double> a = randomValues<double>(rows * (cols + extra), random),
                                  x = randomValues<double>(inner * (1 + extra), random);
        const DeviceVector<double> matrix(*device, a), column(*device, x), y(*device, undefined(outer * (1 + extra)));
        const Matrix left{matrix.data(), DType::f64, rows, cols, cols + extra},
            right{column.data(), DType::f64, inner, 1, 1 + extra}, result{y.data(), DType::f64, outer, 1, 1 + extra};
        device->matmul(side, left, Transpose::no, right, 1.0f, false, result);
        device->matmul(side, left, Transpose::no, right, -3.0f, true, result);
        const std::vector<double> found = y.host();
        double worst = 0;
        for (int64_t i = 0; i < outer; ++i) {
          Real sum = 0, size = 0;
          for (int64_t k = 0; k < inner; ++k) {
            const int64_t element = side == Transpose::no ? i * (cols + extra) + k : k * (cols + extra) + i;
            const Real term = static_cast<Real>(a[static_cast<size_t>(element)]) * x[static_cast<size_t>(k * (1 + extra))];
            sum += term, size += std::abs(term);
          }
          worst = std::max(worst, static_cast<double>(std::abs(found[static_cast<size_t>(i * (1 + extra))] + 2 * sum) / size));
        }
        CHECK(worst < 1e-14);
      }
    }
  }
}
