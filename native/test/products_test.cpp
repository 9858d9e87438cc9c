// Products of the device against plain float64 sums, on odd sizes and fresh numbers.
#include <doctest/doctest.h>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

HostTensor hostTensor(const TestMatrix& matrix, const char* name) {
  return {name, matrix.view.data, matrix.view.dtype, matrix.view.rows, matrix.view.cols, nullptr, nullptr};
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

TEST_CASE("linear and linearInputGrad: stacked weights, bias, LoRA term, residual, from one row to depths beyond a block") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t rows, in, firstOut, secondOut, k;
  };
  for (const Shape shape : {Shape{1, 52, 33, 20, 6}, Shape{1, 131, 70, 9, 5}, Shape{64, 52, 33, 20, 6}, Shape{192, 51, 37, 90, 5},
                            Shape{250, 96, 48, 144, 8}, Shape{30, 4131, 21, 12, 3}, Shape{17, 20, 4101, 22, 2}}) {
    for (const DType type : {DType::f32, DType::bf16}) {
      for (const DType fileType : {type, DType::bf16}) {
        for (const size_t packBudget : {size_t{0}, size_t{1} << 30}) {
          const auto [rows, in, firstOut, secondOut, k] = shape;
          CAPTURE(nameOf(type));
          CAPTURE(rows);
          CAPTURE(in);
          const auto device = cpuDevice(type, 2, packBudget);
          const int64_t out = firstOut + secondOut;
          TestMatrix first(fileType, firstOut, in), second(fileType, secondOut, in), x(type, rows, in), down(type, rows, k),
              up(type, k, out), downGrad(type, rows, k), a(type, k, in), residual(DType::f32, rows, out);
          TestMatrix y(type, rows, out), wide(DType::f32, rows, out), dy(type, rows, out), dx(DType::f32, rows, in);
          for (TestMatrix* matrix : {&first, &second, &x, &down, &up, &downGrad, &a, &residual, &dy})
            matrix->randomize(random, 0.3);
          std::vector<float> bias(static_cast<size_t>(out));
          for (float& value : bias) value = static_cast<float>(random() % 1000) / 500.0f - 1.0f;
          const auto weight = device->prepare({hostTensor(first, "first"), hostTensor(second, "second")}, {true, true, false});
          const auto w = [&](int64_t o, int64_t i) {
            return o < firstOut ? first.exactAt(o, i) : second.exactAt(o - firstOut, i);
          };

          std::vector<double> plain, adapted;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t o = 0; o < out; ++o) {
              double sum = 0;
              for (int64_t i = 0; i < in; ++i) sum += x.exactAt(t, i) * w(o, i);
              plain.push_back(sum);
              adapted.push_back(sum + static_cast<double>(bias[static_cast<size_t>(o)]) + dot(down, t, false, up, o, false, k));
            }
          }
          const auto at = [out = out](const std::vector<double>& values, int64_t t, int64_t o) {
            return values[static_cast<size_t>(t * out + o)];
          };
          device->linear(x.view, *weight, bias.data(), &down.view, &up.view, nullptr, y.view);
          CHECK(relativeError(y, [&](int64_t t, int64_t o) { return at(adapted, t, o); }) < tolerance(type));
          device->linear(x.view, *weight, nullptr, nullptr, nullptr, nullptr, wide.view);
          CHECK(relativeError(wide, [&](int64_t t, int64_t o) { return at(plain, t, o); }) < 3e-6);
          device->linear(x.view, *weight, bias.data(), &down.view, &up.view, &residual.view, wide.view);
          CHECK(relativeError(wide, [&](int64_t t, int64_t o) { return at(adapted, t, o) + residual.exactAt(t, o); }) < 3e-6);

          std::vector<double> plainGrad;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < in; ++i) {
              double sum = 0;
              for (int64_t o = 0; o < out; ++o) sum += dy.exactAt(t, o) * w(o, i);
              plainGrad.push_back(sum);
            }
          }
          const auto inputGrad = [&, in = in](int64_t t, int64_t i) { return plainGrad[static_cast<size_t>(t * in + i)]; };
          device->linearInputGrad(dy.view, *weight, nullptr, nullptr, dx.view);
          CHECK(relativeError(dx, inputGrad) < 3e-6);
          device->linearInputGrad(dy.view, *weight, &downGrad.view, &a.view, dx.view);
          CHECK(relativeError(dx, [&, k = k](int64_t t, int64_t i) {
                  return inputGrad(t, i) + dot(downGrad, t, false, a, i, false, k);
                }) < 3e-6);
        }
      }
    }
  }
}

TEST_CASE("products with weights have the same bits for any number of threads") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    TestMatrix w(type, 150, 200), x(type, 203, 200), first(DType::f32, 203, 150), second(DType::f32, 203, 150);
    w.randomize(random);
    x.randomize(random);
    for (const auto& [threads, y] : {std::pair<int, TestMatrix*>{1, &first}, {3, &second}}) {
      const auto device = cpuDevice(type, threads);
      const auto weight = device->prepare({hostTensor(w, "w")}, {true, false, false});
      device->linear(x.view, *weight, nullptr, nullptr, nullptr, nullptr, y->view);
    }
    CHECK(first.f32 == second.f32);
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
  device->linear(x.view, *weight, nullptr, nullptr, nullptr, nullptr, y.view);
  CHECK(relativeError(y, [&](int64_t t, int64_t o) { return dot(x, t, false, stored, o, true, 40); }) < 3e-6);
}

TEST_CASE("matmul in every transposition, scaled and accumulated") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t m, n, k;
  };
  for (const auto [m, n, k] : {Shape{19, 37, 70}, Shape{24, 150, 301}, Shape{5, 16, 129}})
    for (const DType type : {DType::f32, DType::bf16}) {
      const auto device = cpuDevice(type);
      for (const bool ta : {false, true}) {
        for (const bool tb : {false, true}) {
          for (const bool accumulate : {false, true}) {
            CAPTURE(nameOf(type));
            CAPTURE(ta);
            CAPTURE(tb);
            CAPTURE(accumulate);
            const float scale = accumulate && n == 16 ? 1.0f : 0.75f;
            TestMatrix a(type, ta ? k : m, ta ? m : k), b(type, tb ? n : k, tb ? k : n), c(DType::f32, m, n);
            a.randomize(random);
            b.randomize(random);
            c.randomize(random);
            device->matmul(ta ? Transpose::yes : Transpose::no, a.view, tb ? Transpose::yes : Transpose::no, b.view, scale,
                           accumulate, c.view);
            CHECK(relativeError(c, [&](int64_t i, int64_t j) {
                    return static_cast<double>(scale) * dot(a, i, ta, b, j, tb, k) + (accumulate ? c.exactAt(i, j) : 0.0);
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
  struct Shape {
    int64_t rows, cols;
  };
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = cpuDevice(type);
    for (const auto [rows, cols] : {Shape{300, 21}, Shape{1, 1}, Shape{1100, 77}, Shape{513, 48}}) {
      CAPTURE(rows);
      TestMatrix x(type, rows, cols, 4);
      x.randomize(random, 50);
      std::vector<double> z(static_cast<size_t>(cols * cols), 0.5);
      device->secondMoment(x.view, {z.data(), DType::f64, cols, cols, cols});
      double worst = 0;
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const double expected = 0.5 + dot(x, i, true, x, j, false, rows);
          worst = std::max(worst, std::abs(z[static_cast<size_t>(i * cols + j)] - expected));
        }
      }
      CHECK(worst < 1e-8);
    }
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
