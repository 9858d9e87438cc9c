// Products of the device against plain float64 sums, on odd sizes and fresh numbers.
#include <doctest/doctest.h>

#include <tuple>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

HostTensor hostTensor(const TestMatrix& matrix, const char* name) {
  return {name, matrix.bits().data(), matrix.type(), matrix.rows(), matrix.cols(), nullptr, nullptr};
}

// With as much room behind the rows as the margin is wide.
Matrix withRoom(const TestMatrix& matrix) {
  Matrix view = matrix.view();
  view.room = view.stride - view.cols;
  return view;
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

DEVICE_TEST_CASE(
    "linear and linearInputGrad: stacked weights, bias, LoRA term, residual, from one row to depths beyond a block") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t rows, in, firstOut, secondOut, rank;
    bool bothAdapted = true;
  };
  for (const Shape shape : {Shape{1, 52, 33, 20, 6}, Shape{1, 131, 70, 9, 5}, Shape{1, 40, 50, 60, 4, false},
                            Shape{64, 52, 33, 20, 6}, Shape{192, 51, 37, 90, 5}, Shape{250, 96, 48, 144, 8},
                            Shape{250, 96, 130, 40, 8, false}, Shape{30, 4131, 21, 12, 3}, Shape{17, 20, 4101, 22, 2}}) {
    for (const DType type : {DType::f32, DType::bf16}) {
      for (const DType fileType : {type, DType::bf16}) {
        for (const WeightLayout layout : weightLayouts(tested)) {
          const auto [rows, in, firstOut, secondOut, rank, bothAdapted] = shape;
          const int64_t k = bothAdapted ? 2 * rank : rank;
          CAPTURE(nameOf(type));
          CAPTURE(rows);
          CAPTURE(in);
          const auto device = tested.make(type, layout);
          const int64_t out = firstOut + secondOut, room = device->lowRankRoom();
          TestMatrix first(*device, fileType, firstOut, in), second(*device, fileType, secondOut, in),
              x(*device, type, rows, in, room), down(*device, type, rows, k), factors(*device, type, rank, out),
              downGrad(*device, type, rows, k), a(*device, type, k, in), residual(*device, DType::f32, rows, out);
          TestMatrix y(*device, type, rows, out), wide(*device, DType::f32, rows, out), dy(*device, type, rows, out, room),
              dx(*device, DType::f32, rows, in);
          for (TestMatrix* matrix : {&first, &second, &x, &down, &factors, &downGrad, &a, &residual, &dy})
            matrix->randomize(random, 0.3);
          DeviceVector<float> bias(*device, static_cast<size_t>(out));
          for (float& value : bias.edit()) value = static_cast<float>(random() % 1000) / 500.0f - 1.0f;
          const auto weight =
              device->prepare({hostTensor(first, "first"), hostTensor(second, "second")}, {true, true, false, true});
          const auto w = [&](int64_t o, int64_t i) {
            return o < firstOut ? first.exactAt(o, i) : second.exactAt(o - firstOut, i);
          };

          UpProjection up{factors.view(), {{firstOut, secondOut}}};
          if (bothAdapted) up.blocks.insert(up.blocks.begin(), {0, firstOut});
          const auto term = [&, firstOut = firstOut, rank = rank, bothAdapted = bothAdapted](int64_t t, int64_t o) {
            double sum = 0;
            const int64_t column = bothAdapted && o >= firstOut ? rank : 0;
            for (int64_t r = 0; (bothAdapted || o >= firstOut) && r < rank; ++r) {
              sum += down.exactAt(t, column + r) * factors.exactAt(r, o);
            }
            return sum;
          };

          std::vector<double> plain, adapted;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t o = 0; o < out; ++o) {
              double sum = 0;
              for (int64_t i = 0; i < in; ++i) sum += x.exactAt(t, i) * w(o, i);
              plain.push_back(sum);
              adapted.push_back(sum + static_cast<double>(bias[static_cast<size_t>(o)]) + term(t, o));
            }
          }
          const auto at = [out = out](const std::vector<double>& values, int64_t t, int64_t o) {
            return values[static_cast<size_t>(t * out + o)];
          };
          const Matrix downView = down.view(), residualView = residual.view();
          const auto isPlain = [&](int64_t t, int64_t o) { return at(plain, t, o); };
          const auto isAdapted = [&](int64_t t, int64_t o) { return at(adapted, t, o); };
          const auto isWhole = [&](int64_t t, int64_t o) { return at(adapted, t, o) + residual.exactAt(t, o); };
          device->linear(x.view(), *weight, nullptr, nullptr, nullptr, nullptr, wide.view());
          CHECK(relativeError(wide, isPlain) < 3e-6);
          for (const Matrix& input : {x.view(), withRoom(x)}) {
            device->linear(input, *weight, bias.data(), &downView, &up, nullptr, y.view());
            CHECK(relativeError(y, isAdapted) < tolerance(type));
            device->linear(input, *weight, bias.data(), &downView, &up, &residualView, wide.view());
            CHECK(relativeError(wide, isWhole) < 3e-6);
          }

          std::vector<double> plainGrad;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < in; ++i) {
              double sum = 0;
              for (int64_t o = 0; o < out; ++o) sum += dy.exactAt(t, o) * w(o, i);
              plainGrad.push_back(sum);
            }
          }
          const auto inputGrad = [&, in = in](int64_t t, int64_t i) { return plainGrad[static_cast<size_t>(t * in + i)]; };
          device->linearInputGrad(dy.view(), *weight, nullptr, nullptr, dx.view());
          CHECK(relativeError(dx, inputGrad) < 3e-6);
          const Matrix downGradView = downGrad.view(), aView = a.view();
          for (const Matrix& gradient : {dy.view(), withRoom(dy)}) {
            device->linearInputGrad(gradient, *weight, &downGradView, &aView, dx.view());
            CHECK(relativeError(dx, [&](int64_t t, int64_t i) {
                    return inputGrad(t, i) + dot(downGrad, t, false, a, i, false, k);
                  }) < 3e-6);
          }
        }
      }
    }
  }
}

DEVICE_TEST_CASE("a product too large for a cache") {
  if (smallCasesOnly()) return;
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const int64_t rows = 97, in = 6, out = 88016;
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    TestMatrix w(*device, type, out, in), x(*device, type, rows, in), y(*device, DType::f32, rows, out);
    w.randomize(random);
    x.randomize(random);
    const auto weight = device->prepare({hostTensor(w, "w")}, {true, false, false});
    device->linear(x.view(), *weight, nullptr, nullptr, nullptr, nullptr, y.view());
    CHECK(relativeError(y, [&](int64_t t, int64_t o) { return dot(x, t, false, w, o, true, in); }) < 3e-6);
  }
}

TEST_CASE("products with weights have the same bits for any number of threads" * cpuOnly("no other device has threads")) {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    std::vector<std::vector<unsigned char>> results;
    for (const int threads : {1, 3}) {
      std::mt19937_64 random(seed);
      const auto device = cpuDevice(type, threads);
      TestMatrix w(*device, type, 150, 200), x(*device, type, 203, 200), y(*device, DType::f32, 203, 150);
      w.randomize(random);
      x.randomize(random);
      const auto weight = device->prepare({hostTensor(w, "w")}, {true, false, false});
      device->linear(x.view(), *weight, nullptr, nullptr, nullptr, nullptr, y.view());
      results.push_back(y.bits());
    }
    CHECK(results[0] == results[1]);
  }
}

DEVICE_TEST_CASE("products with weights laid out once have the same bits") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  const int64_t rows = 150, in = 131, firstOut = 97, out = 5100;
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const DType fileType : {DType::f32, DType::bf16}) {
      std::vector<std::vector<unsigned char>> results;
      for (const WeightLayout layout : {WeightLayout::copied, WeightLayout::prepacked}) {
        std::mt19937_64 random(seed);
        const auto device = tested.make(type, layout);
        TestMatrix first(*device, fileType, firstOut, in), second(*device, fileType, out - firstOut, in),
            x(*device, type, rows, in, device->lowRankRoom()), dy(*device, type, rows, out, device->lowRankRoom());
        TestMatrix y(*device, DType::f32, rows, out), dx(*device, DType::f32, rows, in);
        for (TestMatrix* matrix : {&first, &second, &x, &dy}) matrix->randomize(random);
        const auto weight =
            device->prepare({hostTensor(first, "first"), hostTensor(second, "second")}, {true, true, false, true});
        device->linear(x.view(), *weight, nullptr, nullptr, nullptr, nullptr, y.view());
        device->linearInputGrad(dy.view(), *weight, nullptr, nullptr, dx.view());
        results.push_back(y.bits());
        results.back().insert(results.back().end(), dx.bits().begin(), dx.bits().end());
      }
      CHECK((results[0] == results[1]));
    }
  }
}

DEVICE_TEST_CASE("the same products give the same bits") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const int64_t rows = 150, in = 96, out = 131, k = 6;
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    TestMatrix w(*device, type, out, in), x(*device, type, rows, in), down(*device, type, rows, k), up(*device, type, k, out),
        a(*device, type, k, in);
    TestMatrix y(*device, type, rows, out), dx(*device, DType::f32, rows, in), aGrad(*device, DType::f32, k, in);
    for (TestMatrix* matrix : {&w, &x, &down, &up, &a}) matrix->randomize(random);
    const auto weight = device->prepare({hostTensor(w, "w")}, {true, true, false, true});
    const auto run = [&] {
      const UpProjection upView{up.view(), {{0, out}}};
      const Matrix downView = down.view(), aView = a.view();
      const DeviceVector<double> z(*device, static_cast<size_t>(in * in));
      device->linear(x.view(), *weight, nullptr, &downView, &upView, nullptr, y.view());
      device->linearInputGrad(y.view(), *weight, &downView, &aView, dx.view());
      device->matmul(Transpose::yes, down.view(), Transpose::no, x.view(), 1.0f, false, aGrad.view());
      device->secondMoment(x.view(), MomentSum::exact, {z.data(), DType::f64, in, in, in});
      device->mirrorLower(z.data(), in);
      return std::make_tuple(y.bits(), dx.bits(), aGrad.bits(), z.host());
    };
    const auto first = run();
    CHECK((run() == first));
  }
}

DEVICE_TEST_CASE("a weight of another file type is converted") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const auto device = tested.make(DType::f32);
  TestMatrix stored(*device, DType::bf16, 24, 40), x(*device, DType::f32, 64, 40), y(*device, DType::f32, 64, 24);
  stored.randomize(random);
  x.randomize(random);
  const auto weight = device->prepare({hostTensor(stored, "stored")}, {true, true, false});
  device->linear(x.view(), *weight, nullptr, nullptr, nullptr, nullptr, y.view());
  CHECK(relativeError(y, [&](int64_t t, int64_t o) { return dot(x, t, false, stored, o, true, 40); }) < 3e-6);
}

DEVICE_TEST_CASE("matmul in every transposition, scaled and accumulated") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t m, n, k;
  };
  for (const auto [m, n, k] :
       {Shape{19, 37, 70}, Shape{24, 150, 301}, Shape{5, 16, 129}, Shape{7, 5, 61}, Shape{34, 8, 150}, Shape{1, 3, 33}})
    for (const DType type : {DType::f32, DType::bf16}) {
      const auto device = tested.make(type);
      for (const bool ta : {false, true}) {
        for (const bool tb : {false, true}) {
          for (const bool accumulate : {false, true}) {
            CAPTURE(nameOf(type));
            CAPTURE(ta);
            CAPTURE(tb);
            CAPTURE(accumulate);
            const float scale = accumulate && n == 16 ? 1.0f : 0.75f;
            TestMatrix a(*device, type, ta ? k : m, ta ? m : k), b(*device, type, tb ? n : k, tb ? k : n),
                c(*device, DType::f32, m, n, m % 2 == 0 ? 16 : 0);  // also as a slice of wider rows
            a.randomize(random);
            b.randomize(random);
            c.randomize(random);
            device->matmul(ta ? Transpose::yes : Transpose::no, a.view(), tb ? Transpose::yes : Transpose::no, b.view(), scale,
                           accumulate, c.view());
            CHECK(relativeError(c, [&](int64_t i, int64_t j) {
                    return static_cast<double>(scale) * dot(a, i, ta, b, j, tb, k) + (accumulate ? c.exactAt(i, j) : 0.0);
                  }) < 3e-6);
          }
        }
      }
    }
}

DEVICE_TEST_CASE("secondMoment adds the lower triangle of x^T x to a float64 sum, exact to its last digits") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t rows, cols;
  };
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const auto [rows, cols] : {Shape{300, 21}, Shape{1, 1}, Shape{1100, 77}, Shape{513, 48}}) {
      CAPTURE(rows);
      TestMatrix x(*device, type, rows, cols, 4);
      x.randomize(random, 50);
      const DeviceVector<double> z(*device, static_cast<size_t>(cols * cols), 0.5);
      device->secondMoment(x.view(), MomentSum::exact, {z.data(), DType::f64, cols, cols, cols});
      // Two orders of a float64 sum differ by a few roundings of its terms' magnitudes, here at most the root of two diagonal
      // entries' product (Higham 2002, sec. 4.2: at most `rows` of them); a float32 sum would miss by 1e-8 of it and more.
      double worst = 0;
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const double expected = 0.5 + dot(x, i, true, x, j, false, rows);
          const double magnitude = std::sqrt(dot(x, i, true, x, i, false, rows) * dot(x, j, true, x, j, false, rows));
          worst = std::max(worst, std::abs(z[static_cast<size_t>(i * cols + j)] - expected) / (0.5 + magnitude));
        }
      }
      CHECK(worst < 2e-14);
    }
  }
}

DEVICE_TEST_CASE("secondMoment by groups rounds each group to float32, but not what a massive row would hide") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  struct Shape {
    int64_t rows, cols;
  };
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const auto [rows, cols] : {Shape{300, 21}, Shape{1, 1}, Shape{1101, 77}, Shape{513, 97}}) {
      CAPTURE(rows);
      TestMatrix x(*device, type, rows, cols, 4);
      x.randomize(random);
      const int64_t massive = rows > 100 ? 70 : -1;
      for (int64_t j = 0; massive >= 0 && j < cols; ++j) x.set(massive * x.stride() + j, 3000 * x.exactAt(massive, j));
      const DeviceVector<double> z(*device, static_cast<size_t>(cols * cols), 0.5);
      device->secondMoment(x.view(), MomentSum::grouped, {z.data(), DType::f64, cols, cols, cols});
      // Of the ordinary rows' magnitudes momentGroupRows roundings of a group's partial sums are the most (Higham 2002,
      // sec. 4.2).
      const double bound = static_cast<double>(momentGroupRows) * std::pow(2.0, -24);
      const auto ordinary = [&](int64_t i) {
        const double all = dot(x, i, true, x, i, false, rows);
        return massive < 0 ? all : all - x.exactAt(massive, i) * x.exactAt(massive, i);
      };
      double worst = 0;
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const double exact = dot(x, i, true, x, j, false, rows);
          const double allowed = bound * std::sqrt(ordinary(i) * ordinary(j)) + 1e-14 * std::abs(exact) + 1e-14;
          worst = std::max(worst, std::abs(z[static_cast<size_t>(i * cols + j)] - 0.5 - exact) / allowed);
        }
      }
      CHECK(worst < 1);
    }
  }
}

TEST_CASE("a second moment has the same bits for any number of threads" * cpuOnly("no other device has threads")) {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    std::vector<std::vector<double>> results;
    for (const int threads : {1, 3}) {
      std::mt19937_64 random(seed);
      const auto device = cpuDevice(type, threads);
      TestMatrix x(*device, type, 603, 150);
      x.randomize(random);
      for (int64_t j = 0; j < 150; ++j) x.set(9 * x.stride() + j, 100.0);
      const DeviceVector<double> z(*device, 150 * 150);
      device->secondMoment(x.view(), MomentSum::grouped, {z.data(), DType::f64, 150, 150, 150});
      device->mirrorLower(z.data(), 150);
      results.push_back(z.host());
    }
    CHECK((results[0] == results[1]));
  }
}

namespace {

// Cross-entropies, their gradient and their sum beside a plain computation in double.
enum class Target { any, likeliest };
void checkHeadLoss(Device& device, DType type, std::mt19937_64& random, int64_t rows, int64_t hidden, int64_t vocabulary,
                   Target target = Target::any, double spread = 2.5) {
  CAPTURE(nameOf(type));
  CAPTURE(vocabulary);
  TestMatrix x(device, type, rows, hidden), head(device, type, vocabulary, hidden), dx(device, DType::f32, rows, hidden);
  x.randomize(random);
  head.randomize(random, spread / std::sqrt(static_cast<double>(hidden)));  // logits of one size
  const auto weight = device.prepare({hostTensor(head, "head")}, {true, true, false});
  DeviceVector<int32_t> targets(device, static_cast<size_t>(rows));
  DeviceVector<float> scale(device, targets.size());
  const DeviceVector<float> losses(device, targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    targets.edit()[i] = static_cast<int32_t>(random() % static_cast<uint64_t>(vocabulary));
    if (target == Target::likeliest) {
      std::vector<double> logits;
      for (int64_t v = 0; v < vocabulary; ++v) logits.push_back(dot(x, static_cast<int64_t>(i), false, head, v, true, hidden));
      targets.edit()[i] = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    scale.edit()[i] = static_cast<float>(i % 3) * 0.25f;
  }
  const Matrix dxView = dx.view();
  device.headLoss(x.view(), *weight, targets.data(), scale.data(), losses.data(), &dxView);

  std::vector<double> gradient(static_cast<size_t>(rows * hidden), 0.0);
  double worst = 0, total = 0, rounding = 0;  // float32's of the logits, which exponentials take over
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<double> logits;
    double largest = -1e300, sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) {
      logits.push_back(dot(x, t, false, head, v, true, hidden));
      largest = std::max(largest, logits.back());
    }
    for (const double logit : logits) sum += std::exp(logit - largest);
    rounding = std::max(rounding, std::ldexp(largest, -23));
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
  CHECK(worst < 1e-5 + rounding);
  CHECK(relativeError(dx, [&](int64_t t, int64_t h) { return gradient[static_cast<size_t>(t * hidden + h)]; }) <
        tolerance(type) + rounding);
  const DeviceVector<double> sum(device, {1.5});
  device.sumLosses(losses.data(), scale.data(), rows, sum.data());
  CHECK(sum[0] == doctest::Approx(total + 1.5).epsilon(1e-5));

  const std::vector<float> withGradient = losses.host();
  const std::vector<unsigned char> gradientBits = dx.bits();
  device.headLoss(x.view(), *weight, targets.data(), scale.data(), losses.data(), nullptr);
  CHECK(relativeDifference(losses.host(), withGradient) < 1e-6);
  device.headLoss(x.view(), *weight, targets.data(), scale.data(), losses.data(), &dxView);
  CHECK(losses.host() == withGradient);
  CHECK(dx.bits() == gradientBits);
}

}  // namespace

DEVICE_TEST_CASE("headLoss gives cross-entropies and their gradient over several chunks") {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const WeightLayout layout : weightLayouts(tested)) {
      const auto device = tested.make(type, layout);
      checkHeadLoss(*device, type, random, 192, 24, 157);
      checkHeadLoss(*device, type, random, 70, 9, 8301);                          // tiles of the vocabulary, the last one narrow
      checkHeadLoss(*device, type, random, 64, 24, 4500, Target::likeliest, 40);  // little is left beside the target
    }
  }
}

TEST_CASE("headLoss with more rows than one block" * cpuOnly("blocks of rows are the CPU device's")) {
  const uint64_t seed = freshSeed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  checkHeadLoss(*cpuDevice(DType::f32), DType::f32, random, 270, 4096, 41);
}

DEVICE_TEST_CASE("a NaN in a row makes its loss and its gradient NaN, and no other row's") {
  std::mt19937_64 random(freshSeed());
  const int64_t rows = 64, hidden = 24, vocabulary = 61;
  const auto device = tested.make(DType::f32);
  TestMatrix x(*device, DType::f32, rows, hidden), head(*device, DType::f32, vocabulary, hidden),
      dx(*device, DType::f32, rows, hidden);
  x.randomize(random);
  head.randomize(random);
  x.set(5 * hidden + 3, std::nan(""));
  const auto weight = device->prepare({hostTensor(head, "head")}, {true, true, false});
  const DeviceVector<int32_t> targets(*device, rows, 1);
  const DeviceVector<float> scale(*device, rows, 1.0f), losses(*device, rows);
  const Matrix dxView = dx.view();
  device->headLoss(x.view(), *weight, targets.data(), scale.data(), losses.data(), &dxView);
  for (int64_t i = 0; i < rows; ++i) {
    CHECK(std::isnan(losses[static_cast<size_t>(i)]) == (i == 5));
    CHECK(std::isnan(dx.at(i, 0)) == (i == 5));
  }
}

DEVICE_TEST_CASE("the room that the plans count grows with what is to be done") {
  const auto device = tested.make(DType::bf16);
  CHECK(device->momentWorkspaceBytes(64, 33) <= device->momentWorkspaceBytes(64, 576));
  CHECK(device->momentWorkspaceBytes(64, 576) <= device->momentWorkspaceBytes(1024, 576));
  CHECK(device->momentWorkspaceBytes(1024, 576) < size_t{1} << 30);
  const AttentionShape heads{9, 3, 64, 0.125f, 0};
  const auto bytes = [&](int64_t labels, int64_t vocabulary, int64_t rows, int64_t longest) {
    return device->workspaceBytes({labels, vocabulary, heads, rows, longest});
  };
  CHECK(bytes(64, 1000, 64, 64) > 0);
  CHECK(bytes(64, 1000, 64, 64) <= bytes(64, 49152, 64, 64));
  CHECK(bytes(64, 49152, 64, 64) <= bytes(1024, 49152, 64, 64));
  CHECK(bytes(64, 1000, 64, 64) < bytes(64, 1000, 1024, 1024));
  CHECK(bytes(64, 1000, 1024, 1024) < bytes(64, 1000, 8192, 8192));
  CHECK(bytes(64, 1000, 8192, 8192) < size_t{1} << 30);
  for (const AttentionShape& shape : {heads, AttentionShape{32, 8, 128, 0.088f, 0}}) {
    size_t before = 0;
    for (const int64_t rows : {64, 320, 1024, 2048, 8192}) {
      const size_t now = device->workspaceBytes({64, 1000, shape, rows, rows});
      CHECK(now >= before);
      before = now;
    }
  }
}
