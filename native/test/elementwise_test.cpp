// Elementwise operations and their gradients against float64, in both compute types, on widths that are no multiple of a vector.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

constexpr DType types[] = {DType::f32, DType::bf16};
constexpr int64_t widths[] = {1, 3, 16, 37, 64, 130, 576};
// Margins of rows are a few elements times one of these: with the first, rows begin anywhere; with the second, where a device may
// read whole vectors.
constexpr int64_t grains[] = {1, 8};

std::vector<float> randomFloats(size_t count, std::mt19937_64& random, double mean = 0, double scale = 1) {
  std::normal_distribution<double> normal(mean, scale);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(normal(random));
  return values;
}

std::string describe(uint64_t seed, DType type, int64_t width) {
  return "seed " + std::to_string(seed) + ", " + nameOf(type) + ", width " + std::to_string(width);
}

// The last row and column beyond the view must not be touched.
bool marginUntouched(const TestMatrix& m) {
  for (int64_t i = 0; i < m.rows(); ++i) {
    for (int64_t j = m.cols(); j < m.stride(); ++j) {
      if (m.at(i, j) != m.exactAt(i, j)) return false;
    }
  }
  return true;
}

double meanSquare(const std::function<double(int64_t)>& x, int64_t width) {
  double sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += x(j) * x(j);
  return sum / static_cast<double>(width);
}

// The gradient of y = x rstd weight with respect to x, for one row.
std::vector<double> normGrad(const std::function<double(int64_t)>& x, const std::function<double(int64_t)>& weight,
                             const std::function<double(int64_t)>& dy, int64_t width, double epsilon) {
  const double rstd = 1 / std::sqrt(meanSquare(x, width) + epsilon);
  double mean = 0;
  for (int64_t j = 0; j < width; ++j) mean += dy(j) * weight(j) * x(j) * rstd / static_cast<double>(width);
  std::vector<double> dx(static_cast<size_t>(width));
  for (int64_t j = 0; j < width; ++j) dx[static_cast<size_t>(j)] = rstd * (dy(j) * weight(j) - x(j) * rstd * mean);
  return dx;
}

}  // namespace

DEVICE_TEST_CASE("rmsNorm normalizes and keeps its input and rstd, from which rmsNormApply makes the same again") {
  constexpr float epsilon = 1e-5f;
  for (DType type : types) {
    const auto device = tested.make(type);
    for (int64_t width : widths) {
      for (int64_t grain : grains) {
        const uint64_t seed = freshSeed();
        INFO(describe(seed, type, width));
        std::mt19937_64 random(seed);
        TestMatrix x(*device, DType::f32, 5, width, 2 * grain), y(*device, type, 5, width, 3 * grain),
            kept(*device, type, 5, width, grain);
        x.randomize(random);
        y.randomize(random);
        const DeviceVector<float> weight(*device, randomFloats(static_cast<size_t>(width), random, 1)), rstd(*device, 5);
        const auto rstdOf = [&](int64_t i) {
          return 1 / std::sqrt(meanSquare([&](int64_t j) { return x.exactAt(i, j); }, width) + static_cast<double>(epsilon));
        };
        const Matrix keptView = kept.view();
        device->rmsNorm(x.view(), weight.data(), epsilon, y.view(), rstd.data(), &keptView);
        const auto expected = [&](int64_t i, int64_t j) { return x.exactAt(i, j) * rstdOf(i) * weight[static_cast<size_t>(j)]; };
        CHECK(relativeError(y, expected) < tolerance(type));
        for (int64_t i = 0; i < 5; ++i) CHECK(rstd[static_cast<size_t>(i)] == doctest::Approx(rstdOf(i)).epsilon(1e-6));
        CHECK(marginUntouched(y));

        CHECK(relativeError(kept, [&](int64_t i, int64_t j) { return x.exactAt(i, j); }) <= (type == DType::bf16 ? 4e-3 : 0.0));

        TestMatrix again(*device, type, 5, width);
        device->rmsNormApply(kept.view(), rstd.data(), weight.data(), again.view());
        CHECK(relativeError(again, expected) < tolerance(type));
        TestMatrix alone(*device, type, 5, width);
        device->rmsNorm(x.view(), weight.data(), epsilon, alone.view(), rstd.data(), nullptr);
        CHECK(relativeError(alone, expected) < tolerance(type));
      }
    }
  }
}

DEVICE_TEST_CASE("rmsNormGrad accumulates the analytic gradient") {
  for (DType type : types) {
    const auto device = tested.make(type);
    for (int64_t width : widths) {
      for (int64_t grain : grains) {
        if (width == 1) continue;  // the gradient is 0 but for epsilon
        const uint64_t seed = freshSeed();
        INFO(describe(seed, type, width));
        std::mt19937_64 random(seed);
        TestMatrix x(*device, type, 4, width, grain), dy(*device, DType::f32, 4, width),
            dx(*device, DType::f32, 4, width, 2 * grain), rounded(*device, type, 4, width, grain);
        x.randomize(random, 3);
        dy.randomize(random);
        dx.randomize(random);
        const DeviceVector<float> weight(*device, randomFloats(static_cast<size_t>(width), random, 1));
        DeviceVector<float> rstd(*device, 4);
        for (int64_t i = 0; i < 4; ++i) {
          rstd.edit()[static_cast<size_t>(i)] =
              static_cast<float>(1 / std::sqrt(meanSquare([&](int64_t j) { return x.exactAt(i, j); }, width) + 1e-5));
        }
        const Matrix roundedView = rounded.view();
        device->rmsNormGrad(x.view(), rstd.data(), weight.data(), dy.view(), dx.view(), &roundedView);
        std::vector<std::vector<double>> expected;
        for (int64_t i = 0; i < 4; ++i) {
          expected.push_back(normGrad([&](int64_t j) { return x.exactAt(i, j); },
                                      [&](int64_t j) { return weight[static_cast<size_t>(j)]; },
                                      [&](int64_t j) { return dy.exactAt(i, j); }, width, 1e-5));
        }
        CHECK(relativeError(dx, [&](int64_t i, int64_t j) {
                return dx.exactAt(i, j) + expected[static_cast<size_t>(i)][static_cast<size_t>(j)];
              }) < tolerance(DType::f32));
        CHECK(relativeError(rounded, [&](int64_t i, int64_t j) { return dx.at(i, j); }) < (type == DType::bf16 ? 4e-3 : 1e-30));
      }
    }
  }
}

DEVICE_TEST_CASE("rope and its gradient, with and without a norm over each head") {
  struct Head {
    int32_t heads, headDim;
    int64_t pairs;
  };
  for (DType type : types) {
    const auto device = tested.make(type);
    for (const Head& head : {Head{3, 12, 6}, Head{2, 16, 8}, Head{2, 20, 10}, Head{9, 64, 32}, Head{2, 96, 48}, Head{1, 128, 64},
                             Head{2, 80, 16}, Head{1, 7, 2}}) {
      for (bool withNorm : {false, true}) {
        for (int64_t grain : grains) {
          const uint64_t seed = freshSeed();
          INFO(describe(seed, type, head.headDim), withNorm ? ", norm" : "");
          std::mt19937_64 random(seed);
          constexpr int64_t rows = 5;
          const int64_t cols = head.heads * head.headDim, pairs = head.pairs;
          TestMatrix in(*device, type, rows, cols, 7 * grain), out(*device, type, rows, cols, grain),
              d(*device, type, rows, cols, 2 * grain);
          in.randomize(random, 2);
          d.randomize(random);
          const DeviceVector<float> weight(*device, randomFloats(static_cast<size_t>(head.headDim), random, 1, 0.3));
          DeviceVector<float> cos(*device, static_cast<size_t>(10 * pairs)), sin(*device, cos.size());
          for (size_t i = 0; i < cos.size(); ++i) {
            const double angle = std::uniform_real_distribution<double>(0, 6.28)(random);
            cos.edit()[i] = static_cast<float>(std::cos(angle));
            sin.edit()[i] = static_cast<float>(std::sin(angle));
          }
          const DeviceVector<int32_t> positions(*device, {0, 9, 3, 0, 1});
          HeadNorm norm;
          if (withNorm) norm = {weight.data(), 1e-6f};
          const Rotary rotary{cos.data(), sin.data(), pairs};
          const DeviceVector<float> rstd(*device, static_cast<size_t>(rows * head.heads));

          const auto rstdOf = [&](int64_t i, int64_t h) {
            return 1 / std::sqrt(meanSquare([&](int64_t e) { return in.exactAt(i, h * head.headDim + e); }, head.headDim) + 1e-6);
          };
          const auto normalized = [&](int64_t i, int64_t h, int64_t e) {
            const double x = in.exactAt(i, h * head.headDim + e);
            return withNorm ? x * rstdOf(i, h) * weight[static_cast<size_t>(e)] : x;
          };
          // Element e of the pair's rotation; `direction` -1 turns back.
          const auto rotated = [&](const auto& x, int64_t i, int64_t e, double direction) {
            if (e >= 2 * pairs) return x(e);
            const size_t at = static_cast<size_t>(positions[static_cast<size_t>(i)] * pairs + e % pairs);
            return e < pairs ? x(e) * cos[at] - direction * sin[at] * x(e + pairs)
                             : x(e) * cos[at] + direction * sin[at] * x(e - pairs);
          };
          const auto expected = [&](int64_t i, int64_t col) {
            const int64_t h = col / head.headDim;
            return rotated([&](int64_t e) { return normalized(i, h, e); }, i, col % head.headDim, 1);
          };
          device->rope(in.view(), head.heads, head.headDim, norm, rotary, positions.data(), out.view(), rstd.data());
          CHECK(relativeError(out, expected) < tolerance(type));

          std::vector<std::vector<double>> gradient(static_cast<size_t>(rows * head.heads));
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t h = 0; h < head.heads; ++h) {
              std::vector<double> back(static_cast<size_t>(head.headDim));
              for (int64_t e = 0; e < head.headDim; ++e) {
                back[static_cast<size_t>(e)] = rotated([&](int64_t f) { return d.exactAt(i, h * head.headDim + f); }, i, e, -1);
              }
              if (withNorm) {
                back = normGrad([&](int64_t e) { return in.exactAt(i, h * head.headDim + e); },
                                [&](int64_t e) { return weight[static_cast<size_t>(e)]; },
                                [&](int64_t e) { return back[static_cast<size_t>(e)]; }, head.headDim, 1e-6);
                CHECK(rstd[static_cast<size_t>(i * head.heads + h)] == doctest::Approx(rstdOf(i, h)).epsilon(1e-6));
              }
              gradient[static_cast<size_t>(i * head.heads + h)] = back;
            }
          }
          device->ropeGrad(d.view(), in.view(), head.heads, head.headDim, norm, rotary, positions.data(), rstd.data());
          CHECK(relativeError(d, [&](int64_t i, int64_t col) {
                  return gradient[static_cast<size_t>(i * head.heads + col / head.headDim)]
                                 [static_cast<size_t>(col % head.headDim)];
                }) < tolerance(type));

          if (!withNorm) {
            device->rope(in.view(), head.heads, head.headDim, norm, rotary, positions.data(), in.view(), nullptr);
            CHECK(relativeError(in, [&](int64_t i, int64_t col) { return out.at(i, col); }) == 0);
          }
        }
      }
    }
  }
}

DEVICE_TEST_CASE("gated MLP and its gradient for each activation") {
  struct Function {
    Activation activation;
    double (*value)(double);
    double (*slope)(double);
  };
  constexpr double root = 0.79788456080286535588;  // sqrt(2/pi)
  const Function functions[] = {
      {Activation::silu, [](double x) { return x / (1 + std::exp(-x)); },
       [](double x) {
         const double s = 1 / (1 + std::exp(-x));
         return s * (1 + x * (1 - s));
       }},
      {Activation::geluTanh, [](double x) { return 0.5 * x * (1 + std::tanh(root * (x + 0.044715 * x * x * x))); },
       [](double x) {
         const double t = std::tanh(root * (x + 0.044715 * x * x * x));
         return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x);
       }},
      {Activation::gelu, [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); },
       [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-0.5 * x * x) * root / 2; }},
  };
  for (DType type : types) {
    const auto device = tested.make(type);
    for (const Function& function : functions) {
      for (int64_t width : widths) {
        // Wide values reach both tails; enough of them that not all lie in the lower one, where nothing is left.
        for (double scale : {1.0, 30.0}) {
          for (int64_t grain : grains) {
            if (scale > 1 && width < 37) continue;
            const uint64_t seed = freshSeed();
            INFO(describe(seed, type, width), ", activation ", static_cast<int>(function.activation), ", scale ", scale);
            std::mt19937_64 random(seed);
            TestMatrix gateUp(*device, type, 3, 2 * width, grain), h(*device, type, 3, width, 4 * grain),
                dh(*device, type, 3, width);
            gateUp.randomize(random, scale);
            dh.randomize(random);
            const auto gate = [&](int64_t i, int64_t j) { return gateUp.exactAt(i, j); };
            const auto up = [&](int64_t i, int64_t j) { return gateUp.exactAt(i, width + j); };
            device->gatedMlp(gateUp.view(), function.activation, h.view());
            CHECK(relativeError(h, [&](int64_t i, int64_t j) { return function.value(gate(i, j)) * up(i, j); }) <
                  tolerance(type));
            TestMatrix again(*device, type, 3, width, 2 * grain);
            device->gatedMlpGrad(gateUp.view(), function.activation, dh.view(), again.view());
            CHECK(relativeError(again, [&](int64_t i, int64_t j) { return h.at(i, j); }) == 0);
            CHECK(relativeError(gateUp, [&](int64_t i, int64_t j) {
                    return j < width ? dh.exactAt(i, j) * up(i, j) * function.slope(gate(i, j))
                                     : dh.exactAt(i, j - width) * function.value(gate(i, j - width));
                  }) < tolerance(type));
          }
        }
      }
    }
  }
}

DEVICE_TEST_CASE("activations of infinite and not-a-number inputs are not made finite") {
  const auto device = tested.make(DType::f32);
  for (Activation activation : {Activation::silu, Activation::geluTanh, Activation::gelu}) {
    TestMatrix gateUp(*device, DType::f32, 1, 6), h(*device, DType::f32, 1, 3);
    const double values[] = {std::nan(""), INFINITY, 1, 1, 1, std::nan("")};
    for (int64_t i = 0; i < 6; ++i) gateUp.set(i, values[i]);
    device->gatedMlp(gateUp.view(), activation, h.view());
    CHECK(std::isnan(h.at(0, 0)));
    CHECK(!std::isfinite(h.at(0, 1)));
    CHECK(std::isnan(h.at(0, 2)));
  }
}

DEVICE_TEST_CASE("squareSum adds the squares of each column, the same bits each time") {
  for (DType type : types) {
    const auto device = tested.make(type);
    for (int64_t width : widths) {
      for (int64_t rows : {1, 16, 65, 1000}) {
        for (int64_t grain : grains) {
          const uint64_t seed = freshSeed();
          INFO(describe(seed, type, width), ", rows ", rows);
          std::mt19937_64 random(seed);
          TestMatrix x(*device, type, rows, width, 5 * grain);
          x.randomize(random, 1e-4);
          const DeviceVector<double> sums(*device, static_cast<size_t>(width + 1), 0.25),
              again(*device, static_cast<size_t>(width + 1), 0.25);
          device->squareSum(x.view(), sums.data());
          device->squareSum(x.view(), again.data());
          CHECK(again.host() == sums.host());
          for (int64_t j = 0; j < width; ++j) {
            double expected = 0;
            for (int64_t i = 0; i < rows; ++i) expected += x.exactAt(i, j) * x.exactAt(i, j);
            CHECK(sums[static_cast<size_t>(j)] - 0.25 == doctest::Approx(expected).epsilon(1e-6));
          }
          CHECK(sums[static_cast<size_t>(width)] == 0.25);
        }
      }
    }
  }
}

DEVICE_TEST_CASE("embed looks rows up and scales them") {
  for (DType type : types) {
    const auto device = tested.make(type);
    const uint64_t seed = freshSeed();
    INFO(describe(seed, type, 37));
    std::mt19937_64 random(seed);
    TestMatrix table(*device, type, 11, 37);
    table.randomize(random);
    HostTensor tensor;
    tensor.name = "embed";
    tensor.data = table.bits().data();
    tensor.dtype = type;
    tensor.rows = 11;
    tensor.cols = 37;
    const auto weight = device->prepare({tensor}, {false, false, true});
    const DeviceVector<int32_t> ids(*device, {10, 0, 3, 3});
    for (float scale : {1.0f, 24.5f}) {
      TestMatrix x(*device, DType::f32, 4, 37, 3);
      device->embed(ids.data(), *weight, scale, x.view());
      CHECK(relativeError(x, [&](int64_t i, int64_t j) {
              return static_cast<double>(scale) * table.exactAt(ids[static_cast<size_t>(i)], j);
            }) < 1e-7);
    }
  }
}

DEVICE_TEST_CASE("rows are gathered and scattered by index, a negative one gives zeros and goes nowhere") {
  const auto device = tested.make(DType::bf16);
  const uint64_t seed = freshSeed();
  INFO(describe(seed, DType::f32, 37));
  std::mt19937_64 random(seed);
  TestMatrix x(*device, DType::f32, 9, 37, 1), y(*device, DType::f32, 6, 37, 2), back(*device, DType::f32, 9, 37, 3);
  x.randomize(random);
  y.randomize(random);
  back.randomize(random);
  const DeviceVector<int32_t> index(*device, {8, -1, 0, 5, -1, 2});
  const auto gatheredFrom = [&](const TestMatrix& from, int64_t i, int64_t j) {
    const int32_t row = index[static_cast<size_t>(i)];
    return row < 0 ? 0 : from.exactAt(row, j);
  };
  device->gatherRows(x.view(), index.data(), y.view());
  CHECK(relativeError(y, [&](int64_t i, int64_t j) { return gatheredFrom(x, i, j); }) == 0);
  CHECK(marginUntouched(y));
  TestMatrix narrow(*device, DType::bf16, x.rows(), x.cols(), 3), gathered(*device, DType::bf16, y.rows(), y.cols());
  narrow.randomize(random);
  gathered.randomize(random);
  device->gatherRows(narrow.view(), index.data(), gathered.view());
  CHECK(relativeError(gathered, [&](int64_t i, int64_t j) { return gatheredFrom(narrow, i, j); }) == 0);

  // What the rows that go nowhere hold is not read for the others.
  for (int64_t j = 0; j < y.cols(); ++j) y.set(y.stride() + j, std::nan(""));
  device->scatterAddRows(y.view(), index.data(), back.view());
  CHECK(relativeError(back, [&](int64_t i, int64_t j) {
          const bool hit = std::count(index.host().begin(), index.host().end(), static_cast<int32_t>(i)) > 0;
          return back.exactAt(i, j) + (hit ? x.exactAt(i, j) : 0);
        }) < 1e-7);
  CHECK(marginUntouched(back));
}

DEVICE_TEST_CASE("conversion to bfloat16 rounds to nearest even and keeps NaN and infinity") {
  const auto device = tested.make(DType::bf16);
  std::mt19937_64 random(freshSeed());
  const int64_t count = 3001;
  TestMatrix x(*device, DType::f32, 1, count), y(*device, DType::bf16, 1, count), z(*device, DType::f32, 1, count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());  // any float32 at all
    std::memcpy(x.edit<float>() + i, &bits, sizeof bits);
  }
  const uint32_t hard[] = {0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff800000u, 0x7f7fffffu,
                           0x3f808000u, 0x3f818000u, 0x00000001u, 0x80000000u};
  std::memcpy(x.edit<float>() + 100, hard, sizeof hard);
  device->convert(x.view(), y.view());
  device->convert(y.view(), z.view());
  bool same = true, back = true;
  for (int64_t i = 0; i < count; ++i) {
    const float from = x.host<float>()[i], widened = z.host<float>()[i];
    const uint16_t narrowed = y.host<uint16_t>()[i];
    // The processor's own conversion makes subnormal numbers 0.
    const bool subnormal = std::fpclassify(from) == FP_SUBNORMAL && (narrowed & 0x7fffu) == 0;
    same = same && (std::isnan(from) ? std::isnan(bf16ToFloat(narrowed)) : subnormal || narrowed == floatToBf16(from));
    back = back && (std::isnan(widened) ? std::isnan(from) : widened == bf16ToFloat(narrowed));
  }
  CHECK(same);
  CHECK(back);
}

DEVICE_TEST_CASE("conversion works on views") {
  for (DType type : types) {
    const auto device = tested.make(type);
    const uint64_t seed = freshSeed();
    INFO(describe(seed, type, 21));
    std::mt19937_64 random(seed);
    TestMatrix x(*device, DType::f32, 6, 30), y(*device, type, 6, 40);
    x.randomize(random);
    y.randomize(random);
    device->convert(x.view().columns(4, 21), y.view().columns(9, 21));
    CHECK(relativeError(y, [&](int64_t i, int64_t j) {
            const bool inside = j >= 9 && j < 30;
            if (!inside) return y.exactAt(i, j);
            const double from = x.exactAt(i, j - 5);
            return type == DType::bf16 ? static_cast<double>(bf16ToFloat(floatToBf16(static_cast<float>(from)))) : from;
          }) == 0);
  }
}

DEVICE_TEST_CASE("memory is aligned and a hopeless request is refused by purpose") {
  const auto device = tested.make(DType::f32);
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{100}, size_t{5} << 20}) {
    const Buffer buffer = device->allocate(bytes, "test");
    CHECK(reinterpret_cast<uintptr_t>(buffer.get()) % 64 == 0);
  }
#ifndef __SANITIZE_ADDRESS__  // its allocator ends the program instead
  std::string message;
  try {
    device->allocate(~size_t{0} / 2, "activations");
  } catch (const std::exception& error) {
    message = error.what();
  }
  CHECK(message.find("activations") != std::string::npos);
  if (tested.onCpu()) CHECK(message.find(std::to_string(~size_t{0} / 2)) != std::string::npos);
#endif
}

DEVICE_TEST_CASE("memory that is held counts, and what is left is known") {
  const auto device = tested.make(DType::f32);
  const DeviceMemory before = device->memory();
  CHECK(before.free > 0);
  constexpr size_t bytes = size_t{64} << 20;
  const Buffer buffer = device->allocate(bytes, "test");
  device->zero(buffer.get(), bytes);
  device->synchronize();
  // A process frees a little of its own meanwhile, and a device gives memory in large pieces.
  CHECK(device->memory().held > before.held + bytes / 10 * 9);
}
