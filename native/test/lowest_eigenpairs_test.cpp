// The search itself, on orders that a device reduces.
#include "core/lowest_eigenpairs.h"

#include <cmath>

#include "test/test_dense.h"
#include "test/test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

struct Search {
  bool certified = false;
  int steps = 0, inversions = 0;
  std::vector<double> values;
  Dense vectors{0, 0};  // a row each
};

Search search(Device& device, const Dense& matrix, int64_t count) {
  const int64_t n = matrix.rows;
  const DeviceVector<double> a(device, matrix.toDouble()), values(device, static_cast<size_t>(count)),
      vectors(device, static_cast<size_t>(count * n));
  LowestEigenpairs lowest(device, a.data(), n, count);
  Search result;
  result.certified = lowest.find(values.data(), vectors.data());
  result.steps = lowest.steps();
  result.inversions = lowest.inversions();
  if (result.certified) {
    result.values = values.host();
    result.vectors = Dense(count, n, vectors.host().data());
  }
  return result;
}

Search checkedSearch(Device& device, const Dense& matrix, int64_t count) {
  const Search found = search(device, matrix, count);
  INFO("steps ", found.steps, ", inversions ", found.inversions);
  REQUIRE(found.certified);
  Dense scaled = found.vectors;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < matrix.rows; ++j) scaled(i, j) *= found.values[static_cast<size_t>(i)];
  }
  CHECK(difference(product(found.vectors, matrix), scaled) < 1e-13 * std::sqrt(static_cast<double>(count)) * norm(matrix));
  CHECK(difference(product(found.vectors, transpose(found.vectors)), identity(count)) < 1e-11);
  CHECK(std::is_sorted(found.values.begin(), found.values.end()));
  return found;
}

constexpr int64_t order = 160, wanted = 9;

template <class Value>
Dense withSpectrum(Value value, std::mt19937_64& random) {
  const Dense q = orthonormalRows(randomMatrix(order, order, random));
  Dense scaled = q;
  for (int64_t i = 0; i < order; ++i) {
    for (int64_t j = 0; j < order; ++j) scaled(i, j) *= value(i);
  }
  const Dense matrix = product(transpose(q), scaled);
  return roundedToDouble(sum(0.5L, matrix, 0.5L, transpose(matrix)));
}

// The lowest eigenvalues by the definition of the spectrum, which rounding to float64 moves by epsilon times the norm at most.
template <class Value>
void checkSpectrum(const TestDevice& tested, Value value) {
  const auto device = tested.make(DType::f32);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const Dense matrix = withSpectrum(value, random);
  const Search found = checkedSearch(*device, matrix, wanted);
  std::vector<double> expected;
  for (int64_t i = 0; i < order; ++i) expected.push_back(static_cast<double>(value(i)));
  std::sort(expected.begin(), expected.end());
  for (size_t i = 0; i < wanted; ++i) CHECK(std::abs(found.values[i] - expected[i]) < 2e-13 * norm(matrix));
}

}  // namespace

DEVICE_TEST_CASE("lowest eigenpairs of an even spectrum") {
  checkSpectrum(tested, [](int64_t i) { return Real(i); });
}

DEVICE_TEST_CASE("lowest eigenpairs of a spectrum that thickens towards them") {
  checkSpectrum(tested, [](int64_t i) { return std::pow((Real(i) + 1) / order, Real(4)); });
}

DEVICE_TEST_CASE("lowest eigenpairs of clusters, and of one value") {
  checkSpectrum(tested, [](int64_t i) { return i < 20 ? 1 + Real(1e-6) * i : Real(1e4) * i; });
  checkSpectrum(tested, [](int64_t i) { return i < 30 ? Real(-1e-6) * (1 + Real(1e-4) * i) : Real(1e6) * i; });
  checkSpectrum(tested, [](int64_t) { return Real(3); });
}

// Rayleigh and Ritz see nothing of what the preconditioned residuals would take away: without inverse iteration the search goes
// on for all its steps and finds nothing.
DEVICE_TEST_CASE("lowest eigenpairs of a spectrum over twenty orders of magnitude") {
  checkSpectrum(tested, [](int64_t i) { return std::pow(Real(10), -16 + 20 * Real(i) / order); });
}

DEVICE_TEST_CASE("lowest eigenpairs of a spectrum that rises in stairs to another magnitude") {
  checkSpectrum(tested, [](int64_t i) { return i < 100 ? std::pow(Real(10), Real(i / 4 - 12)) : Real(1e14); });
}

DEVICE_TEST_CASE("displacements that dominate a start's matrix take no inversion") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  const Dense matrix = withSpectrum([](int64_t i) { return i < 60 ? -1 / (1 + Real(i)) : Real(1e-6) * i; }, random);
  CHECK(checkedSearch(*device, matrix, wanted).inversions == 0);
}

DEVICE_TEST_CASE("a search for lowest eigenpairs repeats bit for bit") {
  const auto device = tested.make(DType::f32);
  std::mt19937_64 random(freshSeed());
  const Dense matrix = withSpectrum([](int64_t i) { return std::pow(Real(10), -8 + 10 * Real(i) / order); }, random);
  const Search first = checkedSearch(*device, matrix, wanted), second = checkedSearch(*device, matrix, wanted);
  CHECK(first.values == second.values);
  CHECK(first.vectors.data == second.vectors.data);
}

DEVICE_TEST_CASE("a matrix with an element that is no number has no certified eigenpairs") {
  const auto device = tested.make(DType::f32);
  Dense matrix = identity(order);
  matrix(7, 3) = matrix(3, 7) = std::nan("");
  CHECK(!search(*device, matrix, wanted).certified);
}
