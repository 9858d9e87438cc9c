#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "test_dense.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

// Q^T diag(values) Q with a random orthogonal Q.
Dense withSpectrum(const std::vector<double>& values, std::mt19937_64& random) {
  const int64_t n = static_cast<int64_t>(values.size());
  const Dense q = orthonormalRows(randomMatrix(n, n, random));
  Dense scaled = q;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) scaled(i, j) *= values[i];
  }
  return product(transpose(q), scaled);
}

Dense positiveDefinite(int64_t n, std::mt19937_64& random) {
  const Dense x = randomMatrix(n, n + 3, random);
  return sum(1, product(x, transpose(x)), 0.1L, identity(n));
}

struct Lowest {
  std::vector<double> values;
  Dense vectors;
};

Lowest lowest(Device& device, const Dense& matrix, int64_t count) {
  const DeviceVector<double> a(device, matrix.toDouble()), values(device, static_cast<size_t>(count)),
      vectors(device, static_cast<size_t>(count * matrix.rows));
  device.lowestEigenpairs(a.data(), matrix.rows, count, values.data(), vectors.data());
  return {values.host(), Dense(count, matrix.rows, vectors.host().data())};
}

double orthogonalityError(const Dense& vectors) {
  return difference(product(vectors, transpose(vectors)), identity(vectors.rows));
}

double residual(const Dense& matrix, const Lowest& pairs) {
  Dense scaled = pairs.vectors;
  for (int64_t i = 0; i < scaled.rows; ++i) {
    for (int64_t j = 0; j < scaled.cols; ++j) scaled(i, j) *= pairs.values[i];
  }
  return difference(product(pairs.vectors, matrix), scaled) / std::max(norm(matrix), 1e-300);
}

}  // namespace

DEVICE_TEST_CASE("a Cholesky factor multiplies back to its matrix") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t n : {1, 7, 64, 65, 131}) {
    const Dense matrix = positiveDefinite(n, random);
    const DeviceVector<double> a(*device, matrix.toDouble());
    REQUIRE(device->choleskyFactor(a.data(), n) == 0);
    Dense factor(n, n, a.host().data());
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) factor(i, j) = 0;
    }
    CHECK(difference(product(factor, transpose(factor)), matrix) < 1e-13 * norm(matrix));
  }
}

DEVICE_TEST_CASE("a factorization that fails returns the order of the minor") {
  const auto device = tested.make(DType::f32);
  DeviceVector<double> a(*device, identity(9).toDouble());
  a.edit()[4 * 9 + 4] = -1;
  CHECK(device->choleskyFactor(a.data(), 9) == 5);
}

DEVICE_TEST_CASE("a solution by Cholesky factor satisfies its equations") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [n, m] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 3}, {65, 1}, {65, 130}, {131, 17}}) {
    const Dense matrix = positiveDefinite(n, random), rightSide = randomMatrix(n, m, random);
    const DeviceVector<double> factor(*device, matrix.toDouble()), x(*device, rightSide.toDouble());
    REQUIRE(device->choleskyFactor(factor.data(), n) == 0);
    device->choleskySolve(factor.data(), n, x.data(), m);
    const Dense solution(n, m, x.host().data());
    CHECK(difference(product(matrix, solution), rightSide) < 1e-13 * norm(matrix) * norm(solution));
  }
}

DEVICE_TEST_CASE("an inverse is full and symmetric") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t n : {1, 7, 64, 65, 131}) {
    const Dense matrix = positiveDefinite(n, random);
    const DeviceVector<double> a(*device, matrix.toDouble());
    REQUIRE(device->choleskyFactor(a.data(), n) == 0);
    device->choleskyInverse(a.data(), n);
    const Dense result(n, n, a.host().data());
    CHECK(difference(result, transpose(result)) == 0);
    CHECK(difference(product(matrix, result), identity(n)) < 1e-12 * norm(matrix) * norm(result));
  }
}

DEVICE_TEST_CASE("a symmetric product fills both triangles and adds to what was there") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [n, m] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 3}, {65, 130}, {131, 17}}) {
    const Dense a = randomMatrix(n, m, random), before = positiveDefinite(n, random);
    const DeviceVector<double> input(*device, a.toDouble()), c(*device, before.toDouble());
    device->symmetricProduct(input.data(), n, m, -0.5, 2, c.data());
    const Dense expected = sum(-0.5L, product(a, transpose(a)), 2, before), result(n, n, c.host().data());
    CHECK(difference(result, expected) < 1e-13 * norm(expected));
    CHECK(difference(result, transpose(result)) == 0);
  }
}

DEVICE_TEST_CASE("a symmetric product that overwrites does not read what was there") {
  const auto device = tested.make(DType::f32);
  const DeviceVector<double> a(*device, {1, 2, 3}), c(*device, 9, std::nan(""));
  device->symmetricProduct(a.data(), 3, 1, 1, 0, c.data());
  CHECK(c.host() == std::vector<double>{1, 2, 3, 2, 4, 6, 3, 6, 9});
}

DEVICE_TEST_CASE("the lowest eigenpairs agree with Jacobi's") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [n, count] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {2, 1}, {2, 2}, {7, 7}, {33, 5}, {65, 9}}) {
    const Dense x = randomMatrix(n, n, random), matrix = sum(0.5L, x, 0.5L, transpose(x));
    const Eigenpairs expected = eigenpairs(matrix);
    const Lowest pairs = lowest(*device, matrix, count);
    for (int64_t i = 0; i < count; ++i)
      CHECK(std::abs(pairs.values[i] - static_cast<double>(expected.values[i])) < 1e-13 * norm(matrix));
    CHECK(orthogonalityError(pairs.vectors) < 1e-12);
    CHECK(residual(matrix, pairs) < 1e-13);
  }
}

// An order from which devices search for the lowest pairs. The first device loads what the libraries load once.
DEVICE_TEST_CASE("dense algebra takes no more memory than a device says") {
  if (tested.onCpu()) return;                   // its memory is the process', the test's own included
  constexpr size_t rounding = size_t{4} << 20;  // a driver hands memory out in pages of megabytes
  const int64_t n = 1030, count = 9;
  std::vector<double> diagonal(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) diagonal[static_cast<size_t>(i * n + i)] = 1 + static_cast<double>(i);
  for (const bool loaded : {false, true}) {
    const auto device = tested.make(DType::f32);
    const DeviceVector<double> a(*device, diagonal), values(*device, static_cast<size_t>(count)),
        vectors(*device, static_cast<size_t>(count * n));
    double* matrix = a.data();
    device->synchronize();
    const size_t planned = device->denseWorkspaceBytes(n, count), before = device->memory().held;
    REQUIRE(device->choleskyFactor(matrix, n) == 0);
    device->choleskyInverse(matrix, n);
    device->lowestEigenpairs(matrix, n, count, values.data(), vectors.data());
    device->synchronize();
    const size_t taken = device->memory().held - before;
    if (loaded) CHECK(taken <= planned + rounding);
    CHECK(device->denseWorkspaceBytes(n, 0) <= planned);
  }
}

DEVICE_TEST_CASE("eigenvectors of tight clusters are orthonormal") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  std::vector<double> equal(61, 1.0), twoClusters, spaced, tiny;
  for (int i = 0; i < 61; ++i) {
    twoClusters.push_back(i < 20 ? -1 + 1e-15 * i : 2);
    spaced.push_back(1 + 1e-13 * i);
    tiny.push_back(i < 10 ? -1e-9 * (1 + 1e-12 * i) : i < 40 ? 0 : 1e3 * i);
  }
  for (const std::vector<double>& values : {equal, twoClusters, spaced, tiny}) {
    const Dense matrix = withSpectrum(values, random);
    const Lowest pairs = lowest(*device, matrix, 17);
    CHECK(orthogonalityError(pairs.vectors) < 1e-12);
    CHECK(residual(matrix, pairs) < 1e-13);
    CHECK(std::is_sorted(pairs.values.begin(), pairs.values.end()));
  }
}

DEVICE_TEST_CASE("eigenpairs of glued Wilkinson matrices, whose clusters are the tightest there are") {
  const auto device = tested.make(DType::f32);
  for (const int64_t n : {63, 145, 298}) {
    Dense matrix(n, n);
    for (int64_t i = 0; i < n; ++i) {
      matrix(i, i) = static_cast<Real>(std::abs(i % 21 - 10));
      if (i > 0) matrix(i, i - 1) = matrix(i - 1, i) = i % 21 == 0 ? 1e-12 : 1.0;
    }
    const Lowest pairs = lowest(*device, matrix, 17);
    CHECK(orthogonalityError(pairs.vectors) < 1e-12);
    CHECK(residual(matrix, pairs) < 1e-13);
  }
}

DEVICE_TEST_CASE("eigenpairs of diagonal matrices, zero included") {
  const auto device = tested.make(DType::f32);
  Dense diagonal(9, 9);
  for (int64_t i = 0; i < 9; ++i) diagonal(i, i) = static_cast<Real>((i * 4) % 9);
  const Lowest pairs = lowest(*device, diagonal, 3);
  CHECK(pairs.values == std::vector<double>{0, 1, 2});
  CHECK(orthogonalityError(lowest(*device, Dense(9, 9), 4).vectors) < 1e-14);
}

DEVICE_TEST_CASE("an order above the blocked code's crossover, with the spectrum of a harsh omega") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const int64_t n = 601, count = 9;
  Dense matrix(n, n), directions = randomMatrix(n, 40, random);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < 40; ++k) directions(i, k) *= std::pow(10.0, -0.15 * static_cast<double>(k));
  }
  const Dense displaced = product(directions, transpose(directions));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) matrix(i, j) = static_cast<double>(-1e-3L * displaced(i, j));
    matrix(i, i) += std::pow(10.0, 2 - 8.0 * static_cast<double>(i) / n);
  }
  const Lowest pairs = lowest(*device, matrix, count);
  CHECK(orthogonalityError(pairs.vectors) < 1e-12);
  CHECK(residual(matrix, pairs) < 1e-13);
  CHECK(std::is_sorted(pairs.values.begin(), pairs.values.end()));
}

// Orders from which devices search: a spectrum that they find at once, and one whose lowest eigenvalues are a cluster.
DEVICE_TEST_CASE("eigenpairs of large orders are those of the spectrum") {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const int64_t n = tested.onCpu() ? 2053 : 1027, count = 9;
  for (const bool clustered : {false, true}) {
    Dense diagonal(n, n);
    std::vector<Real> values;
    for (int64_t i = 0; i < n; ++i) {
      const Real x = i;
      values.push_back(clustered ? (i < 12 ? 1 + Real(1e-9) * x : 3 + x) : (i < 60 ? -1 / (1 + x) : Real(1e-6) * x));
      diagonal(i, i) = values.back();
    }
    // H diagonal H with the reflection H = I - 2 v v^T.
    const Dense v = orthonormalRows(randomMatrix(1, n, random));
    const Dense turned = product(transpose(v), product(v, diagonal));
    const Real middle = product(v, product(diagonal, transpose(v)))(0, 0);
    const Dense outer = product(transpose(v), v);
    Dense matrix = sum(1, diagonal, -2, sum(1, turned, 1, transpose(turned)));
    matrix = roundedToDouble(sum(1, matrix, 4 * middle, outer));
    const Lowest pairs = lowest(*device, matrix, count);
    CHECK(orthogonalityError(pairs.vectors) < 1e-12);
    CHECK(residual(matrix, pairs) < 1e-12);
    std::sort(values.begin(), values.end());
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      CHECK(std::abs(pairs.values[i] - static_cast<double>(values[i])) < 1e-12 * norm(matrix));
    }
  }
}

DEVICE_TEST_CASE("the upper triangle becomes the mirror image of the lower one") {
  const auto device = tested.make(DType::f32);
  const DeviceVector<double> a(*device, {1, std::nan(""), 7, 2, 3, std::nan(""), 4, 5, 6});
  device->mirrorLower(a.data(), 3);
  CHECK(a.host() == std::vector<double>{1, 2, 4, 2, 3, 5, 4, 5, 6});
}

DEVICE_TEST_CASE("pieces of work at once are all done, each by one worker at a time") {
  const auto device = tested.make(DType::f32);
  const int64_t n = 40, items = 13;
  const auto workers = static_cast<size_t>(device->concurrency(n));
  REQUIRE(workers > 0);
  std::mt19937_64 random(freshSeed());
  std::vector<Dense> matrices;
  for (int64_t item = 0; item < items; ++item) matrices.push_back(positiveDefinite(n, random));
  std::vector<Buffer> memory(workers);
  for (Buffer& buffer : memory) buffer = device->allocate(n * n * sizeof(double), "test");
  std::vector<std::atomic<bool>> busy(workers);
  std::vector<std::vector<double>> inverses(items, std::vector<double>(n * n));
  std::atomic<bool> shared{false};
  device->concurrently(n, items, [&](int64_t item, int worker) {
    const auto index = static_cast<size_t>(worker);
    if (busy.at(index).exchange(true)) shared = true;
    auto* a = static_cast<double*>(memory[index].get());
    device->upload(a, matrices[item].toDouble().data(), n * n * sizeof(double));
    device->choleskyFactor(a, n);
    device->choleskyInverse(a, n);
    device->download(inverses[item].data(), a, n * n * sizeof(double));
    device->synchronize();
    busy[index] = false;
  });
  CHECK(!shared);
  for (int64_t item = 0; item < items; ++item) {
    CHECK(difference(product(matrices[item], Dense(n, n, inverses[item].data())), identity(n)) < 1e-9);
  }
}

DEVICE_TEST_CASE("of pieces of work at once the first failure is rethrown") {
  const auto device = tested.make(DType::f32);
  std::string message;
  try {
    device->concurrently(40, 9, [](int64_t item, int) {
      if (item >= 3) throw std::runtime_error("item " + std::to_string(item));
    });
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message == "item 3");
}

DEVICE_TEST_CASE("the same matrix gives the same bits") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  const Dense matrix = positiveDefinite(131, random);
  const Lowest first = lowest(*device, matrix, 9), second = lowest(*device, matrix, 9);
  CHECK(first.values == second.values);
  CHECK(first.vectors.data == second.vectors.data);
}
