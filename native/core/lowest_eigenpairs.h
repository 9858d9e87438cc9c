// The few lowest eigenpairs of a large symmetric matrix, without reducing all of it: a block Davidson iteration (Crouzeix,
// Philippe & Sadkane 1994). It begins on A alone, which is all that a spectrum with a few outstanding low eigenvalues needs, such
// as a displacement gives to LoRA-DA's omega. Where the residuals go down too slowly for that, their preconditioner is a true
// inverse, (A + c V V^T - shift I)^-1. The shift lies just below the lowest eigenvalue that is still wanted, the pairs found
// before it, V, are moved out of the way: so the matrix is positive definite, a Cholesky factor makes the inverse, and its
// failure tells that the shift was too high. As pairs converge the shift follows, which takes spectra that grow over many orders
// of magnitude a few inversions. An inversion is made only where it saves more steps than it costs.
//
// The search space is kept orthonormal in full. When it is full it shrinks to the present and the preceding Ritz vectors (as
// much as a conjugate gradient iteration keeps; Stathopoulos & Saad 1998). Where rounding hides from Rayleigh and Ritz what the
// preconditioned residuals improve, the space begins anew with a step of inverse iteration.
//
// Written for any device, on its float64 products, copies and Cholesky operations. What is small lies on the host, the projected
// eigenproblem too: a step enqueues some 25 pieces of work and waits four times.
//
// The answer is certified, or there is none:
// - each pair has a true residual |A v - theta v| of at most 1e-13 |A|, and the vectors are orthonormal to 1e-12, so that there
//   are `count` eigenvalues within that residual of the thetas;
// - none was missed below: A + c V V^T - s I with s = theta_count - n epsilon |A| has a Cholesky factor. If A had count + 1
//   eigenvalues below s, their eigenvectors would span a vector x orthogonal to all of V, with x^T A x < s x^T x, and the matrix
//   were not positive definite.
#pragma once

#include <vector>

#include "core/device.h"

namespace lora_da {

class LowestEigenpairs {
 public:
  // Below this order, and for more pairs than a small part of them, reducing the matrix costs less.
  static bool suits(int64_t n, int64_t count) { return n >= 1024 && count <= n / 16; }
  // Of device memory that a search holds, beside what the device's Cholesky operations work in.
  static size_t bytes(int64_t n, int64_t count);

  // `a` [n, n], both triangles, is read only.
  LowestEigenpairs(Device& device, const double* a, int64_t n, int64_t count);

  // False where no certified answer was found; values [count] and vectors [count, n], a row each, are undefined then.
  bool find(double* values, double* vectors);

  // What the search took, for tests and for tuning.
  int steps() const { return steps_; }
  int inversions() const { return inversions_; }

 private:
  struct Ritz {
    std::vector<double> values;     // of the whole space, ascending
    std::vector<double> residuals;  // of the first `width_` pairs
  };

  int64_t append(int64_t count);
  void start();
  bool project(Ritz& ritz);
  std::vector<double> residualNorms(const Matrix& product, const std::vector<double>& values);
  bool comesNoFurther() const;
  bool confirm(const Ritz& ritz);
  void shrink();
  double stepsLeft() const;
  void moveShift(const Ritz& ritz, int64_t first);
  bool invertShifted(double shift, int64_t first);
  bool drownsInRounding() const;
  bool restart();
  bool expand(int64_t first);
  bool nothingMissed(const Ritz& ritz);

  void formShifted(const Matrix& moved, double shift);
  int64_t orthonormalize(const Matrix& basis, Matrix block, Matrix other, Matrix target);
  void multiply(const Matrix& a, const Matrix& b, const Matrix& c);
  void copy(const Matrix& to, const Matrix& from);
  Matrix send(double* to, const std::vector<double>& from, int64_t rows, int64_t cols);
  std::vector<double> gram(const Matrix& x, const Matrix& y);

  Device& device_;
  const Matrix a_;
  const int64_t n_, count_;
  const int64_t width_;  // Ritz pairs that the search works on: the wanted ones and some that help them
  const int64_t most_;   // vectors that the space holds at most

  // A row for each vector.
  Buffer memory_;
  Matrix inverse_;              // [n, n]
  Matrix space_, product_;      // Q, Q A [most_, n], of which size_ rows are in use
  Matrix vectors_, residuals_;  // [width_, n]
  Matrix block_, other_;        // [2 width_, n], [width_, n]
  double* small_ = nullptr;     // [most_, most_]: one after another, the small matrices that products make or take
  double* weights_ = nullptr;   // [width_, width_]

  // Coordinates in Q of the Ritz vectors and of those of the step before; as many as the space had vectors then.
  std::vector<double> ritzVectors_, preceding_;  // [width_, .]

  int64_t size_ = 0;
  bool inverted_ = false;
  double norm_ = 0;              // |A|, from below
  double shift_ = 0;             // of inverse_
  int64_t moved_ = 0;            // lowest vectors that are out of its way
  std::vector<double> errors_;   // estimates of how far each Ritz value is above its eigenvalue; infinite where unknown
  std::vector<double> largest_;  // residual of a wanted pair in each step
  int steps_ = 0, inversions_ = 0, lastInversion_ = 0, lastRestart_ = 0;
};

}  // namespace lora_da
