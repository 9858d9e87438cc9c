// Products of the device against plain float64 sums, on odd sizes and fresh numbers.
#include <doctest/doctest.h>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

HostTensor hostTensor(const TestMatrix& matrix, const char* name) {
  return {name, matrix.view.data, matrix.view.dtype, matrix.view.rows, matrix.view.cols, nullptr};
}

double dot(const TestMatrix& a, int64_t aRow, bool aTransposed, const TestMatrix& b, int64_t bCol, bool bTransposed,
           int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += (aTransposed ? a.exactAt(k, aRow) : a.exactAt(aRow, k)) * (bTransposed ? b.exactAt(bCol, k) : b.exactAt(k, bCol));
  }
  return sum;
}

}  // namespace

TEST_CASE("linear and linearInputGrad, packed or not, stacked or not, with bias and LoRA term") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const bool packed : {true, false}) {
      for (const int64_t rows : {int64_t{1}, int64_t{64}, int64_t{192}}) {
        CAPTURE(nameOf(type));
        CAPTURE(packed);
        CAPTURE(rows);
        const auto device = cpuDevice(type, 2, packed ? size_t{1} << 30 : 0);
        const int64_t in = 52, firstOut = 33, secondOut = 20, out = firstOut + secondOut, k = 6;
        TestMatrix first(type, firstOut, in), second(type, secondOut, in), x(type, rows, in), down(type, rows, k),
            up(type, k, out);
        TestMatrix y(type, rows, out), wide(DType::f32, rows, out), dy(type, rows, out), dx(DType::f32, rows, in);
        for (TestMatrix* matrix : {&first, &second, &x, &down, &up, &dy, &dx}) matrix->randomize(random, 0.3);
        std::vector<float> bias(static_cast<size_t>(out));
        for (float& value : bias) value = static_cast<float>(random() % 1000) / 500.0f - 1.0f;
        const auto weight = device->prepare({hostTensor(first, "first"), hostTensor(second, "second")}, {true, true, false});
        const auto w = [&](int64_t o, int64_t i) { return o < firstOut ? first.exactAt(o, i) : second.exactAt(o - firstOut, i); };

        const auto expected = [&](bool adapted, bool biased) {
          return [&, adapted, biased](int64_t t, int64_t o) {
            double sum = biased ? static_cast<double>(bias[static_cast<size_t>(o)]) : 0.0;
            for (int64_t i = 0; i < in; ++i) sum += x.exactAt(t, i) * w(o, i);
            return adapted ? sum + dot(down, t, false, up, o, false, k) : sum;
          };
        };
        device->linear(x.view, *weight, bias.data(), &down.view, &up.view, y.view);
        CHECK(relativeError(y, expected(true, true)) < tolerance(type));
        device->linear(x.view, *weight, nullptr, nullptr, nullptr, wide.view);
        CHECK(relativeError(wide, expected(false, false)) < 3e-6);

        const auto inputGrad = [&](int64_t t, int64_t i) {
          double sum = 0;
          for (int64_t o = 0; o < out; ++o) sum += dy.exactAt(t, o) * w(o, i);
          return sum;
        };
        device->linearInputGrad(dy.view, *weight, true, dx.view);
        CHECK(relativeError(dx, [&](int64_t t, int64_t i) { return inputGrad(t, i) + dx.exactAt(t, i); }) < 3e-6);
        device->linearInputGrad(dy.view, *weight, false, dx.view);
        CHECK(relativeError(dx, inputGrad) < 3e-6);
      }
    }
  }
}

TEST_CASE("a weight of another file type is converted") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  TestMatrix stored(DType::bf16, 24, 40), x(DType::f32, 64, 40), y(DType::f32, 64, 24);
  stored.randomize(random);
  x.randomize(random);
  const auto device = cpuDevice(DType::f32);
  const auto weight = device->prepare({hostTensor(stored, "stored")}, {true, true, false});
  device->linear(x.view, *weight, nullptr, nullptr, nullptr, y.view);
  CHECK(relativeError(y, [&](int64_t t, int64_t o) { return dot(x, t, false, stored, o, true, 40); }) < 3e-6);
}

TEST_CASE("matmul in every transposition, scaled and accumulated") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const int64_t m = 19, n = 37, k = 70;
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = cpuDevice(type);
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        for (const bool accumulate : {false, true}) {
          CAPTURE(nameOf(type));
          CAPTURE(ta);
          CAPTURE(tb);
          CAPTURE(accumulate);
          TestMatrix a(type, ta ? k : m, ta ? m : k), b(type, tb ? n : k, tb ? k : n), c(DType::f32, m, n);
          a.randomize(random);
          b.randomize(random);
          c.randomize(random);
          device->matmul(ta ? Transpose::yes : Transpose::no, a.view, tb ? Transpose::yes : Transpose::no, b.view, 0.75f,
                         accumulate, c.view);
          CHECK(relativeError(c, [&](int64_t i, int64_t j) {
                  return 0.75 * dot(a, i, ta, b, j, tb, k) + (accumulate ? c.exactAt(i, j) : 0.0);
                }) < 3e-6);
        }
      }
    }
  }
}

TEST_CASE("secondMoment adds the lower triangle of x^T x to a float64 sum, exact to its last digits") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = cpuDevice(type);
    TestMatrix x(type, 300, 21, 4);
    x.randomize(random, 50);
    std::vector<double> z(21 * 21, 0.5);
    device->secondMoment(x.view, {z.data(), DType::f64, 21, 21, 21});
    double worst = 0;
    for (int64_t i = 0; i < 21; ++i) {
      for (int64_t j = 0; j < 21; ++j) {
        const double expected = 0.5 + (j <= i ? dot(x, i, true, x, j, false, 300) : 0.0);
        worst = std::max(worst, std::abs(z[static_cast<size_t>(i * 21 + j)] - expected));
      }
    }
    CHECK(worst < 1e-8);
  }
}

TEST_CASE("headLoss gives cross-entropies and their gradient over several chunks") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const int64_t rows = 192, hidden = 24, vocabulary = 157;
  for (const DType type : {DType::f32, DType::bf16}) {
    CAPTURE(nameOf(type));
    const auto device = cpuDevice(type);
    TestMatrix x(type, rows, hidden), head(type, vocabulary, hidden), dx(DType::f32, rows, hidden);
    x.randomize(random);
    head.randomize(random, 0.5);
    const auto weight = device->prepare({hostTensor(head, "head")}, {true, true, false});
    std::vector<int32_t> targets;
    std::vector<float> scale, losses(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      targets.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(vocabulary)));
      scale.push_back(static_cast<float>(i % 3) * 0.25f);
    }
    device->headLoss(x.view, *weight, targets.data(), scale.data(), losses.data(), &dx.view);

    std::vector<double> gradient(static_cast<size_t>(rows * hidden), 0.0);
    double worst = 0, total = 0;
    for (int64_t t = 0; t < rows; ++t) {
      std::vector<double> logits;
      double largest = -1e300, sum = 0;
      for (int64_t v = 0; v < vocabulary; ++v) {
        logits.push_back(dot(x, t, false, head, v, true, hidden));
        largest = std::max(largest, logits.back());
      }
      for (const double logit : logits) sum += std::exp(logit - largest);
      const auto row = static_cast<size_t>(t);
      const double loss = largest + std::log(sum) - logits[static_cast<size_t>(targets[row])];
      worst = std::max(worst, std::abs(loss - static_cast<double>(losses[row])) / std::max(1.0, loss));
      total += loss * static_cast<double>(scale[row]);
      for (int64_t v = 0; v < vocabulary; ++v) {
        const double d = static_cast<double>(scale[row]) *
                         (std::exp(logits[static_cast<size_t>(v)] - largest) / sum - (v == targets[row] ? 1.0 : 0.0));
        for (int64_t h = 0; h < hidden; ++h) gradient[static_cast<size_t>(t * hidden + h)] += d * head.exactAt(v, h);
      }
    }
    CHECK(worst < 1e-5);
    CHECK(relativeError(dx, [&](int64_t t, int64_t h) { return gradient[static_cast<size_t>(t * hidden + h)]; }) <
          tolerance(type));
    double sum = 1.5;
    device->sumLosses(losses.data(), scale.data(), rows, &sum);
    CHECK(sum == doctest::Approx(total + 1.5).epsilon(1e-5));
  }
}
