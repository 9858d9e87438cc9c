#include "core/symmetric_eigenpairs.h"

#include <doctest/doctest.h>

#include <cmath>

#include "test/test_dense.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

// Only the lower triangle is given; what lies above it must not matter.
SymmetricEigenpairs pairsOf(const Dense& matrix) {
  const int64_t n = matrix.rows;
  std::vector<double> lower(static_cast<size_t>(n * n), std::nan(""));
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t row = column; row < n; ++row) {
      lower[static_cast<size_t>(column * n + row)] = static_cast<double>(matrix(row, column));
    }
  }
  return symmetricEigenpairs(lower, n);
}

void checkPairs(const Dense& matrix) {
  const int64_t n = matrix.rows;
  INFO("order ", n);
  const SymmetricEigenpairs pairs = pairsOf(matrix);
  REQUIRE(static_cast<int64_t>(pairs.values.size()) == n);
  const Dense vectors(n, n, pairs.vectors.data());  // a row each
  Dense scaled = vectors;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) scaled(i, j) *= pairs.values[static_cast<size_t>(i)];
  }
  CHECK(difference(product(vectors, matrix), scaled) <= 2e-14 * norm(matrix));
  CHECK(difference(product(vectors, transpose(vectors)), identity(n)) < 1e-13);
  CHECK(std::is_sorted(pairs.values.begin(), pairs.values.end()));
}

Dense randomSymmetric(int64_t n, std::mt19937_64& random) {
  const Dense x = randomMatrix(n, n, random);
  return roundedToDouble(sum(0.5L, x, 0.5L, transpose(x)));
}

}  // namespace

TEST_CASE("eigenpairs of small symmetric matrices satisfy their equations") {
  const uint64_t seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t n : {1, 2, 3, 7, 24, 61, 96, 128}) checkPairs(randomSymmetric(n, random));
}

TEST_CASE("eigenvalues of small symmetric matrices agree with Jacobi's") {
  const uint64_t seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  const Dense matrix = randomSymmetric(33, random);
  const Eigenpairs expected = eigenpairs(matrix);
  const SymmetricEigenpairs pairs = pairsOf(matrix);
  for (size_t i = 0; i < 33; ++i) {
    CHECK(std::abs(pairs.values[i] - static_cast<double>(expected.values[i])) < 1e-14 * norm(matrix));
  }
}

TEST_CASE("small matrices that are zero, diagonal, tight clusters or graded have eigenpairs too") {
  checkPairs(Dense(9, 9));
  checkPairs(identity(9));
  Dense diagonal(12, 12), wilkinson(84, 84), graded(40, 40);
  for (int64_t i = 0; i < 12; ++i) diagonal(i, i) = static_cast<Real>((i * 5) % 12);
  for (int64_t i = 0; i < 84; ++i) {
    wilkinson(i, i) = static_cast<Real>(std::abs(i % 21 - 10));
    if (i > 0) wilkinson(i, i - 1) = wilkinson(i - 1, i) = i % 21 == 0 ? 1e-12 : 1.0;
  }
  for (int64_t i = 0; i < 40; ++i) {
    for (int64_t j = 0; j < 40; ++j) graded(i, j) = static_cast<double>(std::pow(Real(10), -Real(i + j)) * (i == j ? 2 : 1));
  }
  for (const Dense& matrix : {diagonal, wilkinson, graded}) checkPairs(matrix);
}

// Large elements first, where QL begins with the small ones: their rounding errors exceed what is small beside the others.
TEST_CASE("small matrices with clusters far below their largest eigenvalue have eigenpairs") {
  const uint64_t seed = std::random_device{}();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (int repeat = 0; repeat < 5; ++repeat) {
    const Dense q = orthonormalRows(randomMatrix(72, 72, random));
    Dense scaled = q;
    for (int64_t i = 0; i < 72; ++i) {
      for (int64_t j = 0; j < 72; ++j) scaled(i, j) *= i < 24 ? 1 + 1e-10L * i : std::pow(Real(10), Real(i) / 6);
    }
    const Dense matrix = product(transpose(q), scaled);
    checkPairs(roundedToDouble(sum(0.5L, matrix, 0.5L, transpose(matrix))));
  }
}

TEST_CASE("eigenvalues at the ends of float64's range are found") {
  for (const Real scale : {1e-290L, 1e290L}) {
    const Dense matrix = roundedToDouble(sum(scale, identity(5), scale / 3, [] {
      Dense ones(5, 5);
      for (Real& value : ones.data) value = 1;
      return ones;
    }()));
    const SymmetricEigenpairs pairs = pairsOf(matrix);
    CHECK(std::abs(pairs.values.front() / static_cast<double>(scale) - 1) < 1e-14);
    CHECK(std::abs(pairs.values.back() / static_cast<double>(scale) - (1 + 5.0 / 3)) < 1e-14);
  }
}
