// Attention forward, backward and cached, against the definition in float64: every score of every query is formed.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

struct Case {
  AttentionShape shape;
  std::vector<int32_t> starts;
  int64_t padding;
};

// Columns behind the rows of each matrix. Behind `whole` ones the next row begins at a multiple of 16 bytes, as in the model, so
// that a device may move it in vectors.
struct Margins {
  int64_t qkv, out, grad;
};
constexpr Margins odd{3, 5, 1}, whole{8, 16, 8};

// q, k and v are column slices of one matrix, as the model's fused projection leaves them; their gradients of another.
struct Problem {
  Case c;
  int64_t rows, qCols, kvCols;
  TestMatrix qkv, out, dout, dqkv;
  DeviceVector<float> lse;
  DeviceVector<int32_t> rowFirst, rowEnd;

  Problem(Device& device, const Case& chosen, DType type, std::mt19937_64& random, const Margins& margins = whole)
      : c(chosen),
        rows(chosen.starts.back() + chosen.padding),
        qCols(int64_t{chosen.shape.heads} * chosen.shape.headDim),
        kvCols(int64_t{chosen.shape.kvHeads} * chosen.shape.headDim),
        qkv(device, type, rows, qCols + 2 * kvCols, margins.qkv),
        out(device, type, rows, qCols, margins.out),
        dout(device, type, rows, qCols),
        dqkv(device, type, rows, qCols + 2 * kvCols, margins.grad),
        lse(device, static_cast<size_t>(rows * chosen.shape.heads), -1.0f),
        rowFirst(device, static_cast<size_t>(rows)),
        rowEnd(device, static_cast<size_t>(rows)) {
    qkv.randomize(random);
    dout.randomize(random);
    out.randomize(random);  // must be overwritten
    dqkv.randomize(random);
    for (int32_t t = 0; t < rows; ++t) {
      const auto after = std::upper_bound(c.starts.begin(), c.starts.end(), t);
      rowFirst.edit()[static_cast<size_t>(t)] = after == c.starts.end() ? t : *(after - 1);
      rowEnd.edit()[static_cast<size_t>(t)] = after == c.starts.end() ? t : *after;
    }
  }
  Matrix q() const { return qkv.view().columns(0, qCols); }
  Matrix k() const { return qkv.view().columns(qCols, kvCols); }
  Matrix v() const { return qkv.view().columns(qCols + kvCols, kvCols); }
  Sequences sequences() const { return {c.starts, rowFirst.data(), rowEnd.data()}; }

  void forward(Device& device) { device.attention(q(), k(), v(), sequences(), c.shape, out.view(), lse.data()); }
  void backward(Device& device) {
    const Matrix grad = dqkv.view();
    device.attentionGrad(q(), k(), v(), out.view(), lse.data(), dout.view(), sequences(), c.shape, grad.columns(0, qCols),
                         grad.columns(qCols, kvCols), grad.columns(qCols + kvCols, kvCols));
  }
};

// out, lse and the gradients by the definition. Padding rows stay 0.
struct Reference {
  std::vector<double> out, lse, dqkv;

  explicit Reference(const Problem& p) {
    const AttentionShape& shape = p.c.shape;
    const int64_t d = shape.headDim, cols = p.qCols + 2 * p.kvCols, group = shape.heads / shape.kvHeads;
    out.assign(static_cast<size_t>(p.rows * p.qCols), 0.0);
    lse.assign(static_cast<size_t>(p.rows * shape.heads), 0.0);
    dqkv.assign(static_cast<size_t>(p.rows * cols), 0.0);
    const auto x = [&](int64_t row, int64_t col) { return p.qkv.exactAt(row, col); };
    for (size_t s = 0; s + 1 < p.c.starts.size(); ++s) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t qCol = h * d, kCol = p.qCols + h / group * d, vCol = kCol + p.kvCols;
        for (int64_t i = p.c.starts[s]; i < p.c.starts[s + 1]; ++i) {
          const int64_t from = shape.window > 0 ? std::max<int64_t>(p.c.starts[s], i - shape.window + 1) : p.c.starts[s];
          std::vector<double> probability(static_cast<size_t>(i - from + 1));
          double sum = 0, mean = 0;
          for (int64_t j = from; j <= i; ++j) {
            double score = 0;
            for (int64_t e = 0; e < d; ++e) score += x(i, qCol + e) * x(j, kCol + e);
            probability[static_cast<size_t>(j - from)] = std::exp(static_cast<double>(shape.scale) * score);
            sum += probability[static_cast<size_t>(j - from)];
          }
          lse[static_cast<size_t>(i * shape.heads + h)] = std::log(sum);
          std::vector<double> slope(probability.size());  // dout . v_j
          for (int64_t j = from; j <= i; ++j) {
            double& p_ij = probability[static_cast<size_t>(j - from)];
            p_ij /= sum;
            for (int64_t e = 0; e < d; ++e) {
              out[static_cast<size_t>(i * p.qCols + qCol + e)] += p_ij * x(j, vCol + e);
              slope[static_cast<size_t>(j - from)] += p.dout.exactAt(i, qCol + e) * x(j, vCol + e);
            }
            mean += p_ij * slope[static_cast<size_t>(j - from)];
          }
          for (int64_t j = from; j <= i; ++j) {
            const double p_ij = probability[static_cast<size_t>(j - from)];
            const double ds = static_cast<double>(shape.scale) * p_ij * (slope[static_cast<size_t>(j - from)] - mean);
            for (int64_t e = 0; e < d; ++e) {
              dqkv[static_cast<size_t>(i * cols + qCol + e)] += ds * x(j, kCol + e);
              dqkv[static_cast<size_t>(j * cols + kCol + e)] += ds * x(i, qCol + e);
              dqkv[static_cast<size_t>(j * cols + vCol + e)] += p_ij * p.dout.exactAt(i, qCol + e);
            }
          }
        }
      }
    }
  }
};

AttentionShape shapeOf(int32_t heads, int32_t kvHeads, int32_t headDim, int32_t window = 0) {
  AttentionShape shape;
  shape.heads = heads;
  shape.kvHeads = kvHeads;
  shape.headDim = headDim;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(headDim));
  shape.window = window;
  return shape;
}

std::vector<Case> allCases() {
  return {
      {shapeOf(3, 1, 12), {0, 1, 8, 9, 74}, 54},
      {shapeOf(4, 2, 16), {0, 5, 70}, 58},
      {shapeOf(2, 2, 20, 7), {0, 100, 129}, 63},
      {shapeOf(9, 3, 64), {0, 37, 38, 166}, 26},
      {shapeOf(2, 1, 64, 1), {0, 130}, 62},
      {shapeOf(2, 1, 64, 65), {0, 257, 300}, 20},
      {shapeOf(2, 1, 96), {0, 64, 128, 256}, 0},
      {shapeOf(3, 3, 80, 64), {0, 191}, 1},
      {shapeOf(2, 1, 128), {0, 49, 200}, 56},
      {shapeOf(1, 1, 7), {0, 3}, 61},
      {shapeOf(2, 1, 64), {0, 3}, 253},  // tiles with nothing but padding
      {shapeOf(1, 1, 256, 100), {0, 150}, 42},
      {shapeOf(4, 1, 32), {0, 1, 3, 50, 145, 146}, 46},
      {shapeOf(8, 1, 32, 50), {0, 200}, 56},
      {shapeOf(8, 2, 64), {0, 97, 290}, 30},
      {shapeOf(4, 1, 256), {0, 101}, 27},
      // As long as the tiles and spans of the kernels, one less and one more.
      {shapeOf(3, 1, 32), {0, 47, 95, 144}, 48},
      {shapeOf(2, 2, 64), {0, 95, 191, 288, 481}, 31},
      {shapeOf(1, 1, 16, 96), {0, 289, 578}, 62},
      // Longer than a chunk of queries.
      {shapeOf(2, 1, 16), {0, 1100, 1101}, 51},
      {shapeOf(2, 1, 16, 130), {0, 2100}, 12},
      {shapeOf(8, 1, 32), {0, 400}, 48},
      {shapeOf(8, 1, 16, 33), {0, 350}, 34},
  };
}

const std::vector<Case>& cases() {
  static const std::vector<Case> chosen = [] {
    std::vector<Case> result = allCases();
    const auto large = [](const Case& c) { return c.starts.back() * c.shape.heads > 600; };
    if (smallCasesOnly()) result.erase(std::remove_if(result.begin(), result.end(), large), result.end());
    return result;
  }();
  return chosen;
}

std::string nameOf(const Case& c) {
  return std::to_string(c.shape.heads) + "/" + std::to_string(c.shape.kvHeads) + " heads of " + std::to_string(c.shape.headDim) +
         ", window " + std::to_string(c.shape.window) + ", " + std::to_string(c.starts.back()) + " tokens";
}

}  // namespace

DEVICE_TEST_CASE("attention and its gradient equal the definition") {
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const Case& c : cases()) {
      for (const Margins& margins : {odd, whole}) {
        const uint64_t seed = freshSeed();
        INFO("seed ", seed, ", ", lora_da::nameOf(type), ", ", nameOf(c), ", margin ", margins.qkv);
        std::mt19937_64 random(seed);
        Problem p(*device, c, type, random, margins);
        const Reference reference(p);
        const int64_t cols = p.qCols + 2 * p.kvCols;

        p.forward(*device);
        CHECK(relativeError(p.out, [&](int64_t i, int64_t j) { return reference.out[static_cast<size_t>(i * p.qCols + j)]; }) <
              tolerance(type));
        double worstLse = 0;
        for (size_t i = 0; i < p.lse.size(); ++i) worstLse = std::max(worstLse, std::abs(p.lse[i] - reference.lse[i]));
        CHECK(worstLse < 1e-5);

        p.backward(*device);
        const auto expected = [&](int64_t i, int64_t j) { return reference.dqkv[static_cast<size_t>(i * cols + j)]; };
        // With a window of one every probability is 1 and dq and dk are exactly 0: only rounding of `out` is left of them.
        const bool trivial = c.shape.window == 1;
        CHECK(relativeError(p.dqkv, expected) < (trivial ? 2 : 1.5) * tolerance(type));
        bool zeroPadding = true;
        for (int64_t i = c.starts.back(); i < p.rows; ++i) {
          for (int64_t j = 0; j < cols; ++j) zeroPadding = zeroPadding && p.dqkv.at(i, j) == 0.0;
          for (int64_t j = 0; j < p.qCols; ++j) zeroPadding = zeroPadding && p.out.at(i, j) == 0.0;
        }
        CHECK(zeroPadding);
      }
    }
  }
}

DEVICE_TEST_CASE("each of dq, dk and dv equals the definition") {
  const auto device = tested.make(DType::f32);
  for (const Case& c : cases()) {
    if (c.shape.window == 1) continue;
    const uint64_t seed = freshSeed();
    INFO("seed ", seed, ", ", nameOf(c));
    std::mt19937_64 random(seed);
    Problem p(*device, c, DType::f32, random);
    const Reference reference(p);
    p.forward(*device);
    p.backward(*device);
    const int64_t cols = p.qCols + 2 * p.kvCols, columns[] = {0, p.qCols, p.qCols + p.kvCols, cols};
    for (int part = 0; part < 3; ++part) {
      double difference = 0, norm = 0;
      for (int64_t i = 0; i < p.rows; ++i) {
        for (int64_t j = columns[part]; j < columns[part + 1]; ++j) {
          const double e = reference.dqkv[static_cast<size_t>(i * cols + j)];
          difference += (p.dqkv.at(i, j) - e) * (p.dqkv.at(i, j) - e);
          norm += e * e;
        }
      }
      CHECK(std::sqrt(difference / norm) < tolerance(DType::f32));
    }
  }
}

DEVICE_TEST_CASE("attention equals the definition for every length up to more than a tile") {
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    const auto step = [](int32_t length) { return length < 60 && !smallCasesOnly() ? 1 : 7; };
    for (int32_t length = 1; length <= 110; length += step(length)) {
      const uint64_t seed = freshSeed();
      const Case c{shapeOf(3, 1, 16, length % 3 == 0 ? 11 : 0), {0, length, 2 * length}, 3};
      INFO("seed ", seed, ", ", lora_da::nameOf(type), ", ", nameOf(c));
      std::mt19937_64 random(seed);
      Problem p(*device, c, type, random);
      const Reference reference(p);
      p.forward(*device);
      p.backward(*device);
      const int64_t cols = p.qCols + 2 * p.kvCols;
      CHECK(relativeError(p.out, [&](int64_t i, int64_t j) { return reference.out[static_cast<size_t>(i * p.qCols + j)]; }) <
            tolerance(type));
      CHECK(relativeError(p.dqkv, [&](int64_t i, int64_t j) { return reference.dqkv[static_cast<size_t>(i * cols + j)]; }) <
            1.5 * tolerance(type));
    }
  }
}

// The running maximum is raised only by scores well above it.
DEVICE_TEST_CASE("attention equals the definition where scores grow along the keys") {
  for (DType type : {DType::f32, DType::bf16}) {
    for (double slope : {0.01, 0.05, -0.05}) {
      const auto device = tested.make(type);
      const uint64_t seed = freshSeed();
      INFO("seed ", seed, ", ", lora_da::nameOf(type), ", slope ", slope);
      std::mt19937_64 random(seed);
      const int32_t length = smallCasesOnly() ? 250 : 700;
      Problem p(*device, {shapeOf(2, 1, 32), {0, length}, 4}, type, random);
      // Element 0 of every query is 1 and that of every key its position times the slope.
      for (int64_t i = 0; i < length; ++i) {
        const int64_t row = i * p.qkv.stride();
        for (int64_t h = 0; h < 2; ++h) p.qkv.set(row + h * 32, 1.0);
        p.qkv.set(row + p.qCols, slope * static_cast<double>(i) / static_cast<double>(p.c.shape.scale));
      }
      const Reference reference(p);
      p.forward(*device);
      CHECK(relativeError(p.out, [&](int64_t i, int64_t j) { return reference.out[static_cast<size_t>(i * p.qCols + j)]; }) <
            tolerance(type));
      double worstLse = 0;
      for (size_t i = 0; i < p.lse.size(); ++i) {
        worstLse = std::max(worstLse, std::abs(p.lse[i] - reference.lse[i]) / (1 + std::abs(reference.lse[i])));
      }
      CHECK(worstLse < 1e-5);
    }
  }
}

DEVICE_TEST_CASE("attention survives scores far from zero") {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const auto device = tested.make(DType::f32);
  Problem p(*device, {shapeOf(1, 1, 16), {0, 150}, 42}, DType::f32, random);
  p.c.shape.scale = 20.0f;  // scores of several hundred; rows nearly one-hot
  p.forward(*device);
  p.backward(*device);
  bool finite = true;
  for (int64_t i = 0; i < 150; ++i) {
    for (int64_t j = 0; j < 16; ++j) finite = finite && std::isfinite(p.out.at(i, j));
    for (int64_t j = 0; j < 48; ++j) finite = finite && std::isfinite(p.dqkv.at(i, j));
  }
  CHECK(finite);
}

DEVICE_TEST_CASE("a NaN in a key reaches the queries that see it and no other sequence") {
  for (DType type : {DType::f32, DType::bf16}) {
    const uint64_t seed = freshSeed();
    INFO("seed ", seed, ", ", lora_da::nameOf(type));
    std::mt19937_64 random(seed);
    const auto device = tested.make(type);
    Problem p(*device, {shapeOf(1, 1, 16), {0, 70, 140}, 52}, type, random);
    p.qkv.set(30 * p.qkv.stride() + p.qCols, std::nan(""));
    p.forward(*device);
    CHECK(std::isfinite(p.out.at(29, 0)));
    CHECK(std::isnan(p.out.at(30, 0)));
    CHECK(std::isnan(p.out.at(69, 0)));
    CHECK(std::isfinite(p.out.at(70, 0)));
    p.backward(*device);
    CHECK(std::isnan(p.dqkv.at(69, 0)));
    bool finite = true;
    for (int64_t i = 70; i < p.rows; ++i) {
      for (int64_t j = 0; j < p.dqkv.cols(); ++j) finite = finite && std::isfinite(p.dqkv.at(i, j));
    }
    CHECK(finite);
  }
}

// The bits of what attention and its gradient write.
std::vector<std::vector<unsigned char>> results(Problem& p, Device& device) {
  p.forward(device);
  p.backward(device);
  const auto* lse = reinterpret_cast<const unsigned char*>(p.lse.host().data());
  return {p.out.bits(), p.dqkv.bits(), {lse, lse + p.lse.size() * sizeof(float)}};
}

TEST_CASE("attention has the same bits whatever the number of threads" * cpuOnly("no other device has threads")) {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  for (DType type : {DType::f32, DType::bf16}) {
    std::vector<std::vector<std::vector<unsigned char>>> runs;
    for (int threads : {1, 2, 3, 2}) {
      std::mt19937_64 random(seed);
      const auto device = cpuDevice(type, threads);
      Problem p(*device, {shapeOf(4, 2, 32), {0, 300, 301, 1500, 1700}, 28}, type, random);
      runs.push_back(results(p, *device));
      TestMatrix cached(*device, type, 1, p.qCols);
      device->attentionCached(p.q().rowRange(0, 1), p.k(), p.v(), p.c.shape, cached.view());
      runs.back().push_back(cached.bits());
      CHECK(runs.back() == runs.front());
    }
  }
}

DEVICE_TEST_CASE("the same attention gives the same bits") {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    std::mt19937_64 random(seed);
    Problem p(*device, {shapeOf(4, 2, 32), {0, 90, 91, 170}, 22}, type, random);
    const auto first = results(p, *device);
    CHECK(results(p, *device) == first);
  }
}

DEVICE_TEST_CASE("attention over no sequence is zero") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  Problem p(*device, {shapeOf(2, 1, 16), {0}, 64}, DType::f32, random);
  p.forward(*device);
  p.backward(*device);
  for (int64_t i = 0; i < 64; ++i) {
    CHECK(p.out.at(i, 0) == 0.0);
    CHECK(p.dqkv.at(i, 0) == 0.0);
  }
}

// One query over a cache, in float64.
std::vector<double> cachedReference(const TestMatrix& q, const TestMatrix& keys, const TestMatrix& values,
                                    const AttentionShape& shape) {
  const int64_t length = keys.rows(), first = shape.window > 0 ? std::max<int64_t>(length - shape.window, 0) : 0;
  std::vector<double> out(static_cast<size_t>(shape.heads * shape.headDim), 0.0);
  for (int32_t head = 0; head < shape.heads; ++head) {
    const int64_t column = int64_t{head} * shape.headDim,
                  kvColumn = int64_t{head / (shape.heads / shape.kvHeads)} * shape.headDim;
    std::vector<double> scores;
    for (int64_t i = first; i < length; ++i) {
      double score = 0;
      for (int64_t d = 0; d < shape.headDim; ++d) score += q.at(0, column + d) * keys.at(i, kvColumn + d);
      scores.push_back(score * static_cast<double>(shape.scale));
    }
    const double peak = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - peak);
    for (int64_t i = first; i < length; ++i) {
      const double weight = scores[static_cast<size_t>(i - first)] / total;
      for (int64_t d = 0; d < shape.headDim; ++d) out[static_cast<size_t>(column + d)] += weight * values.at(i, kvColumn + d);
    }
  }
  return out;
}

// Lengths around those of a vector, a tile and a part of the rows, and more than as many parts as there are at most.
DEVICE_TEST_CASE("cached attention equals the definition for short and long caches") {
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const int64_t length : {1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 200, 1023, 4096, 4123, 9001}) {
      if (length > 200 && smallCasesOnly()) continue;
      const uint64_t seed = freshSeed();
      std::mt19937_64 random(seed);
      for (const AttentionShape& shape : {shapeOf(3, 1, 64), shapeOf(10, 2, 40), shapeOf(2, 2, 128)}) {
        INFO("seed ", seed, ", ", lora_da::nameOf(type), ", ", length, " rows, heads of ", shape.headDim);
        const int64_t width = int64_t{shape.kvHeads} * shape.headDim;
        TestMatrix q(*device, type, 1, int64_t{shape.heads} * shape.headDim), keys(*device, type, length, width, 8),
            values(*device, type, length, width, 8), out(*device, type, 1, q.cols());
        for (TestMatrix* m : {&q, &keys, &values}) m->randomize(random);
        const std::vector<double> expected = cachedReference(q, keys, values, shape);
        device->attentionCached(q.view(), keys.view(), values.view(), shape, out.view());
        CHECK(relativeError(out, [&](int64_t, int64_t j) { return expected[static_cast<size_t>(j)]; }) < tolerance(type));
      }
    }
  }
}

// Sums of steps and parts are scaled to those of others, up and down.
DEVICE_TEST_CASE("cached attention equals the definition where scores grow or fall along the keys") {
  const AttentionShape shape = shapeOf(3, 1, 32);
  const int64_t length = 500;
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const double slope : {0.05, -0.05, 2.0, -2.0}) {
      const uint64_t seed = freshSeed();
      INFO("seed ", seed, ", ", lora_da::nameOf(type), ", slope ", slope);
      std::mt19937_64 random(seed);
      TestMatrix q(*device, type, 1, 3 * 32), keys(*device, type, length, 32), values(*device, type, length, 32),
          out(*device, type, 1, 3 * 32);
      for (TestMatrix* m : {&q, &keys, &values}) m->randomize(random);
      for (int64_t head = 0; head < 3; ++head) q.set(head * 32, 1.0);
      for (int64_t i = 0; i < length; ++i) keys.set(i * 32, slope * static_cast<double>(i) / static_cast<double>(shape.scale));
      const std::vector<double> expected = cachedReference(q, keys, values, shape);
      device->attentionCached(q.view(), keys.view(), values.view(), shape, out.view());
      // Float32's of the scores, which exponentials take over: the product, its scaling and log2(e), half a unit each.
      const double rounding = 3 * std::ldexp(std::abs(slope) * length, -24);
      CHECK(relativeError(out, [&](int64_t, int64_t j) { return expected[static_cast<size_t>(j)]; }) <
            tolerance(type) + rounding);
    }
  }
}

DEVICE_TEST_CASE("a NaN in a cached key reaches the query heads that read it") {
  const AttentionShape shape = shapeOf(4, 2, 16);
  for (const int64_t row : {0, 70, 299}) {
    const auto device = tested.make(DType::f32);
    std::mt19937_64 random(freshSeed());
    TestMatrix q(*device, DType::f32, 1, 64), keys(*device, DType::f32, 300, 32), values(*device, DType::f32, 300, 32),
        out(*device, DType::f32, 1, 64);
    for (TestMatrix* m : {&q, &keys, &values}) m->randomize(random);
    keys.set(row * 32 + 3, std::nan(""));
    device->attentionCached(q.view(), keys.view(), values.view(), shape, out.view());
    for (int64_t j = 0; j < 64; ++j) CHECK(std::isnan(out.at(0, j)) == (j < 32));
  }
}

DEVICE_TEST_CASE("cached attention equals the last row of attention") {
  for (DType type : {DType::f32, DType::bf16}) {
    const auto device = tested.make(type);
    for (const Case& c : cases()) {
      for (const Margins& margins : {odd, whole}) {
        const uint64_t seed = freshSeed();
        INFO("seed ", seed, ", ", lora_da::nameOf(type), ", ", nameOf(c), ", margin ", margins.qkv);
        std::mt19937_64 random(seed);
        Case last = c;
        last.starts = {0, c.starts.back()};
        Problem p(*device, last, type, random, margins);
        const Reference reference(p);
        const int64_t length = c.starts.back();
        TestMatrix out(*device, type, 1, p.qCols);
        device->attentionCached(p.q().rowRange(length - 1, 1), p.k().rowRange(0, length), p.v().rowRange(0, length), c.shape,
                                out.view());
        CHECK(relativeError(out, [&](int64_t, int64_t j) {
                return reference.out[static_cast<size_t>((length - 1) * p.qCols + j)];
              }) < tolerance(type));
      }
    }
  }
}
