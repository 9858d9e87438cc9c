// All eigenpairs of a small symmetric matrix, on the host: Householder's reduction to tridiagonal form and implicit QL with
// Wilkinson's shift (Golub & Van Loan, Matrix Computations, 2013, sec. 8.3). For the projected problems of lowest_eigenpairs.h,
// of order 100 or so, for which a library on the device takes longer than for the whole step around them: hundreds of tiny
// kernels, each of which waits for the one before.
#pragma once

#include <cstdint>
#include <vector>

namespace lora_da {

struct SymmetricEigenpairs {
  std::vector<double> values;   // [n], ascending
  std::vector<double> vectors;  // [n, n], one after another in the order of the values, orthonormal
};

// `matrix` [n, n], finite: its lower triangle is read, the elements (row, column), row >= column, that lie at column * n + row.
// Errors are those of rounding times its norm. Throws Error(internal) where the iteration does not converge, which no matrix is
// known to bring about.
SymmetricEigenpairs symmetricEigenpairs(std::vector<double> matrix, int64_t n);

}  // namespace lora_da
