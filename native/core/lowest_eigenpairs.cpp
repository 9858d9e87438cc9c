#include "core/lowest_eigenpairs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/dense_view.h"
#include "core/integers.h"
#include "core/symmetric_eigenpairs.h"

namespace lora_da {

namespace {

constexpr double epsilon = std::numeric_limits<double>::epsilon();
constexpr double unknown = std::numeric_limits<double>::infinity();

// Of |A|: what residuals are brought down to, and what they may be at most, where they come no further: within a cluster as
// narrow as this no shift tells one vector from another.
constexpr double tolerance = 2e-14, mostTolerance = 1e-13;
constexpr size_t stepsWithoutGain = 5;  // in which the largest residual is not halved
constexpr double orthogonality = 1e-12;

// In a block's Gram matrix: what one more orthonormalization leaves is rounding.
constexpr double nearlyOrthonormal = 0.01;

constexpr int mostSteps = 300;
constexpr int firstSteps = 5;   // on A alone, which show where its spectrum begins and how fast the residuals go down
constexpr int stepsOfPace = 4;  // that tell how fast they do
constexpr int mostInversions = 16;
constexpr int stepsBetweenInversions = 3;
// An inversion, n^3 multiplications and additions, takes as long as about this many steps, each of which reads A and perhaps the
// inverse once and waits for the host a few times; and some steps follow it.
double stepsWorthInversion(int64_t n) {
  return 6 + static_cast<double>(n) / 256;
}
// A new shift is worth an inversion when it brings the last wanted pair so many times nearer.
constexpr double worthwhile = 3;
// The shift stays below the lowest wanted Ritz value by this part of the wanted range, and by this multiple of the estimated
// error; after a failure the distance grows.
constexpr double rangeMargin = 0.1, errorMargin = 4, marginGrowth = 8;
constexpr int mostTries = 4;

// splitmix64's finalizer (Steele, Lea & Flood 2014): a start that is the same for every search, in (-1, 1).
std::vector<double> startVectors(int64_t count) {
  std::vector<double> x(static_cast<size_t>(count));
  uint64_t state = 0;
  for (double& value : x) {
    uint64_t bits = state += 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    value = (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-52 - 1.0;
  }
  return x;
}

int64_t widthFor(int64_t count) {
  return roundUp(count + std::max<int64_t>(8, count / 2), 8);
}

int64_t spaceFor(int64_t count) {
  return 4 * widthFor(count);
}

// From the Gram matrix [count, count] of some vectors a combination [rank, count] of them that is orthonormal, as well as the
// Gram matrix tells: a Cholesky factorization with pivoting of the vectors scaled to length 1. Vectors that are combinations of
// others to five digits are left out.
struct Combination {
  int64_t rank = 0;
  std::vector<double> weights;
};

Combination orthonormalCombination(const std::vector<double>& gram, int64_t count) {
  constexpr double smallestPivot = 1e-10;
  const auto at = [count](int64_t row, int64_t col) { return static_cast<size_t>(col * count + row); };
  std::vector<double> scale(static_cast<size_t>(count)), factor(gram.size(), 0.0), pivots(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double square = gram[at(i, i)];
    scale[i] = square > 0 && std::isfinite(square) ? 1 / std::sqrt(square) : 0;
    pivots[i] = scale[i] > 0 ? 1 : 0;
  }
  std::vector<int64_t> order;
  while (static_cast<int64_t>(order.size()) < count) {
    const auto found = std::max_element(pivots.begin(), pivots.end());
    if (!(*found > smallestPivot)) break;
    const int64_t pivot = found - pivots.begin(), step = static_cast<int64_t>(order.size());
    const double root = std::sqrt(*found);
    factor[at(pivot, step)] = root;
    *found = 0;
    order.push_back(pivot);
    for (int64_t i = 0; i < count; ++i) {
      if (!(pivots[i] > 0)) continue;
      double value = gram[at(i, pivot)] * scale[i] * scale[pivot];
      for (int64_t k = 0; k < step; ++k) value -= factor[at(i, k)] * factor[at(pivot, k)];
      factor[at(i, step)] = value / root;
      pivots[i] -= value / root * (value / root);
    }
  }

  // Columns of the inverse of the transposed factor, each element scaled back and put where its vector is in the block.
  Combination result;
  result.rank = static_cast<int64_t>(order.size());
  result.weights.assign(static_cast<size_t>(count * result.rank), 0.0);
  for (int64_t col = 0; col < result.rank; ++col) {
    std::vector<double> x(static_cast<size_t>(result.rank), 0.0);
    x[col] = 1 / factor[at(order[col], col)];
    for (int64_t row = col - 1; row >= 0; --row) {
      double sum = 0;
      for (int64_t k = row + 1; k <= col; ++k) sum += factor[at(order[k], row)] * x[k];
      x[row] = -sum / factor[at(order[row], row)];
    }
    for (int64_t row = 0; row <= col; ++row) result.weights[at(order[row], col)] = x[row] * scale[order[row]];
  }
  return result;
}

// The largest element of gram - I [count, count].
double differenceFromIdentity(const std::vector<double>& gram, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count * count; ++i) {
    const double difference = std::abs(gram[static_cast<size_t>(i)] - (i % (count + 1) == 0 ? 1 : 0));
    if (std::isnan(difference)) return difference;
    largest = std::max(largest, difference);
  }
  return largest;
}

// The orthonormal vectors `basis` [., length] and what those of `more` [., moreLength], zero from there on, have beside them.
std::vector<double> joined(std::vector<double> basis, int64_t length, const std::vector<double>& more, int64_t moreLength) {
  constexpr double smallest = 1e-5;
  const auto norm = [length](const double* x) { return std::sqrt(std::inner_product(x, x + length, x, 0.0)); };
  for (auto from = more.begin(); from != more.end(); from += moreLength) {
    std::vector<double> vector(static_cast<size_t>(length), 0.0);
    std::copy_n(from, moreLength, vector.begin());
    bool independent = true;
    for (int pass = 0; pass < 2 && independent; ++pass) {  // twice is enough
      for (const double* other = basis.data(); other < basis.data() + basis.size(); other += length) {
        const double overlap = std::inner_product(other, other + length, vector.begin(), 0.0);
        for (int64_t i = 0; i < length; ++i) vector[i] -= overlap * other[i];
      }
      const double left = norm(vector.data());
      independent = left > smallest;
      for (double& value : vector) value /= left;
    }
    if (independent) basis.insert(basis.end(), vector.begin(), vector.end());
  }
  return basis;
}

}  // namespace

LowestEigenpairs::LowestEigenpairs(Device& device, const double* a, int64_t n, int64_t count)
    : device_(device),
      a_(denseView(a, n, n)),
      n_(n),
      count_(count),
      width_(widthFor(count)),
      most_(spaceFor(count)),
      memory_(device.allocate(bytes(n, count), "the search for the lowest eigenpairs")),
      errors_(static_cast<size_t>(width_), unknown) {
  auto* next = static_cast<double*>(memory_.get());
  const auto take = [&](int64_t rows, int64_t cols) {
    double* data = next;
    next += rows * cols;
    return denseView(data, rows, cols);
  };
  inverse_ = take(n, n);
  space_ = take(most_, n);
  product_ = take(most_, n);
  vectors_ = take(width_, n);
  residuals_ = take(width_, n);
  block_ = take(2 * width_, n);
  other_ = take(width_, n);
  small_ = take(most_, most_).as<double>();
  weights_ = take(width_, width_).as<double>();
}

size_t LowestEigenpairs::bytes(int64_t n, int64_t count) {
  const int64_t width = widthFor(count), most = spaceFor(count);
  const int64_t vectors = 2 * most + 5 * width;
  return static_cast<size_t>(n * n + vectors * n + most * most + width * width) * sizeof(double);
}

// --- on the device -------------------------------------------------------------------------------------------------

void LowestEigenpairs::multiply(const Matrix& a, const Matrix& b, const Matrix& c) {
  device_.matmul(Transpose::no, a, Transpose::no, b, 1, false, c);
}

void LowestEigenpairs::copy(const Matrix& to, const Matrix& from) {
  device_.copy(to.data, from.data, static_cast<size_t>(from.rows * from.cols) * sizeof(double));
}

Matrix LowestEigenpairs::send(double* to, const std::vector<double>& from, int64_t rows, int64_t cols) {
  device_.upload(to, from.data(), from.size() * sizeof(double));
  return denseView(to, rows, cols);
}

// y x^T, on the host.
std::vector<double> LowestEigenpairs::gram(const Matrix& x, const Matrix& y) {
  device_.matmul(Transpose::no, y, Transpose::yes, x, 1, false, denseView(small_, y.rows, x.rows));
  std::vector<double> host(static_cast<size_t>(y.rows * x.rows));
  device_.download(host.data(), small_, host.size() * sizeof(double));
  device_.synchronize();
  return host;
}

// --- the iteration -------------------------------------------------------------------------------------------------

// Makes `block` orthonormal and orthogonal to `basis`, and puts it into the first rows of `target`; returns how many that are.
// Block and other are overwritten. Once through leaves errors of the rounding times the square of the block's condition, twice of
// the rounding; more are for what was nearly within the basis, whose vectors are not yet orthonormal the second time.
int64_t LowestEigenpairs::orthonormalize(const Matrix& basis, Matrix block, Matrix other, Matrix target) {
  constexpr int mostRounds = 4;
  for (int round = 0;; ++round) {
    if (basis.rows > 0) {
      const Matrix overlap = denseView(small_, block.rows, basis.rows);
      device_.matmul(Transpose::no, block, Transpose::yes, basis, 1, false, overlap);
      device_.matmul(Transpose::no, overlap, Transpose::no, basis, -1, true, block);
    }
    const std::vector<double> products = gram(block, block);
    const Combination combination = orthonormalCombination(products, block.rows);
    if (combination.rank == 0) return 0;
    const Matrix weights = send(weights_, combination.weights, combination.rank, block.rows);
    const bool last = round == mostRounds - 1 || (round > 0 && differenceFromIdentity(products, block.rows) < nearlyOrthonormal);
    const Matrix result = (last ? target : other).rowRange(0, combination.rank);
    multiply(weights, block, result);
    if (last) return result.rows;
    other = block;
    block = result;
  }
}

// Adds what the first `count` vectors of block_ have beside the space to it; returns how many vectors that are.
int64_t LowestEigenpairs::append(int64_t count) {
  const int64_t added =
      orthonormalize(space_.rowRange(0, size_), block_.rowRange(0, count), other_, space_.rowRange(size_, count));
  if (added > 0) multiply(space_.rowRange(size_, added), a_, product_.rowRange(size_, added));
  size_ += added;
  return added;
}

void LowestEigenpairs::start() {
  send(block_.as<double>(), startVectors(width_ * n_), width_, n_);
  append(width_);
}

// Subtracts values times vectors from `product`, vectors times A, and measures what is left.
std::vector<double> LowestEigenpairs::residualNorms(const Matrix& product, const std::vector<double>& values) {
  const int64_t count = product.rows;
  std::vector<double> diagonal(static_cast<size_t>(count * count), 0.0);
  for (int64_t i = 0; i < count; ++i) diagonal[static_cast<size_t>(i * count + i)] = values[static_cast<size_t>(i)];
  const Matrix factors = send(weights_, diagonal, count, count);
  device_.matmul(Transpose::no, factors, Transpose::no, vectors_.rowRange(0, count), -1, true, product);
  const std::vector<double> squares = gram(product, product);
  std::vector<double> norms;
  for (int64_t i = 0; i < count; ++i) norms.push_back(std::sqrt(squares[static_cast<size_t>(i * count + i)]));
  return norms;
}

// Rayleigh and Ritz: the lowest eigenpairs of Q A Q^T, their vectors in the whole space and their residuals. False where A has
// elements that are no numbers.
bool LowestEigenpairs::project(Ritz& ritz) {
  const Matrix q = space_.rowRange(0, size_), qa = product_.rowRange(0, size_);
  std::vector<double> projection = gram(q, qa);
  for (const double value : projection) {
    if (!std::isfinite(value)) return false;
  }
  SymmetricEigenpairs pairs = symmetricEigenpairs(std::move(projection), size_);
  ritz.values = std::move(pairs.values);
  norm_ = std::max({norm_, std::abs(ritz.values.front()), std::abs(ritz.values.back())});
  preceding_ = std::move(ritzVectors_);
  ritzVectors_ = std::move(pairs.vectors);
  ritzVectors_.resize(static_cast<size_t>(size_ * width_));

  const Matrix lowest = send(small_, ritzVectors_, width_, size_);
  multiply(lowest, q, vectors_);
  multiply(lowest, qa, residuals_);
  ritz.residuals = residualNorms(residuals_, ritz.values);
  largest_.push_back(*std::max_element(ritz.residuals.begin(), ritz.residuals.begin() + count_));
  return true;
}

bool LowestEigenpairs::comesNoFurther() const {
  return largest_.size() > stepsWithoutGain && largest_.back() > 0.5 * largest_[largest_.size() - 1 - stepsWithoutGain];
}

// Whether the wanted pairs hold with A itself; Q A, from which rounding errors grow, is made anew where they do not.
bool LowestEigenpairs::confirm(const Ritz& ritz) {
  const Matrix product = block_.rowRange(0, count_);
  multiply(vectors_.rowRange(0, count_), a_, product);
  const std::vector<double> norms = residualNorms(product, ritz.values);
  if (std::all_of(norms.begin(), norms.end(), [&](double norm) { return norm <= mostTolerance * norm_; })) return true;
  multiply(space_.rowRange(0, size_), a_, product_.rowRange(0, size_));
  return false;
}

// Q becomes the present Ritz vectors and what the preceding ones have beside them.
void LowestEigenpairs::shrink() {
  const std::vector<double> coordinates =
      joined(ritzVectors_, size_, preceding_, static_cast<int64_t>(preceding_.size()) / width_);
  const Matrix kept = send(small_, coordinates, static_cast<int64_t>(coordinates.size()) / size_, size_);
  for (const Matrix& rows : {space_, product_}) {
    const Matrix result = block_.rowRange(0, kept.rows);
    multiply(kept, rows.rowRange(0, size_), result);
    copy(rows, result);
  }
  size_ = kept.rows;
  ritzVectors_.assign(static_cast<size_t>(size_ * width_), 0.0);
  for (int64_t i = 0; i < width_; ++i) ritzVectors_[static_cast<size_t>(i * size_ + i)] = 1;
}

// inverse_ = A + c V^T V - shift I, in the lower triangle at least.
void LowestEigenpairs::formShifted(const Matrix& moved, double shift) {
  copy(inverse_, a_);
  if (moved.rows > 0) {
    const Matrix scaled = other_.rowRange(0, moved.rows);
    copy(scaled, moved);
    device_.scale(scaled, std::sqrt(2 * norm_));
    device_.matmul(Transpose::yes, scaled, Transpose::no, scaled, 1, true, inverse_);
  }
  device_.addToDiagonal(inverse_.as<double>(), n_, -shift);
}

bool LowestEigenpairs::invertShifted(double shift, int64_t first) {
  formShifted(vectors_.rowRange(0, first), shift);
  ++inversions_;
  lastInversion_ = steps_;
  inverted_ = device_.choleskyFactor(inverse_.as<double>(), n_) == 0;
  if (inverted_) {
    device_.choleskyInverse(inverse_.as<double>(), n_);
    shift_ = shift;
    moved_ = first;
  }
  return inverted_;
}

// To the goal, at the pace of the last few steps with the same inverse; infinite where the residuals stand still.
double LowestEigenpairs::stepsLeft() const {
  const int steps = std::min(stepsOfPace, steps_ - std::max(lastInversion_, 1));
  if (steps < 1) return 0;
  const double now = largest_.back(), before = largest_[largest_.size() - 1 - static_cast<size_t>(steps)];
  const double gain = std::log(before / now) / steps;
  return gain > 0 ? std::log(now / (tolerance * norm_)) / gain : unknown;
}

// `first`: the lowest pair that has not converged.
void LowestEigenpairs::moveShift(const Ritz& ritz, int64_t first) {
  if (steps_ <= firstSteps || (inverted_ && steps_ - lastInversion_ < stepsBetweenInversions)) return;
  if (stepsLeft() < stepsWorthInversion(n_)) return;
  const double lowest = ritz.values[first], last = ritz.values[count_ - 1];
  const double error = std::min(ritz.residuals[first], errorMargin * errors_[first]);
  double margin = std::max({error, rangeMargin * (last - lowest), 16 * static_cast<double>(n_) * epsilon * norm_});
  if (inverted_ && !(last - shift_ > worthwhile * (last - lowest + margin))) return;
  for (int tries = 0; tries < mostTries && inversions_ < mostInversions; ++tries, margin *= marginGrowth) {
    if (invertShifted(lowest - margin, first)) return;
  }
}

// Rayleigh and Ritz tell vectors apart by v^T A v, which rounding blurs by epsilon |A|. A Ritz vector with a residual below
// sqrt(epsilon) |A| may hold less than that of directions with large eigenvalues, so that nothing tells how much of its
// preconditioned residual, which lies mostly in directions of small ones, takes them away. The residuals then stand still.
bool LowestEigenpairs::drownsInRounding() const {
  constexpr int steps = 3;
  return inverted_ && steps_ - std::max(lastInversion_, lastRestart_) >= steps && largest_.back() < std::sqrt(epsilon) * norm_ &&
         largest_.back() > 0.5 * largest_[largest_.size() - 1 - steps];
}

// A step of inverse iteration, which takes those directions away whatever Rayleigh and Ritz see of them: the space begins anew
// with the inverse times the Ritz vectors. Those that were moved out of the inverse's way stay as they are.
bool LowestEigenpairs::restart() {
  lastRestart_ = steps_;
  ritzVectors_.clear();
  if (moved_ > 0) copy(block_, vectors_.rowRange(0, moved_));
  multiply(vectors_.rowRange(moved_, width_ - moved_), inverse_, block_.rowRange(moved_, width_ - moved_));
  size_ = 0;
  return append(width_) == width_;
}

// Adds the preconditioned residuals of the pairs from `first` on to the space.
bool LowestEigenpairs::expand(int64_t first) {
  const int64_t count = width_ - first;
  const Matrix residuals = residuals_.rowRange(first, count), block = block_.rowRange(0, count);
  std::fill(errors_.begin(), errors_.end(), unknown);
  if (inverted_) {
    multiply(residuals, inverse_, block);
    // A Ritz vector's error is about the inverse times its residual, and the error of its value their product.
    const std::vector<double> products = gram(residuals, block);
    for (int64_t i = 0; i < count; ++i) errors_[first + i] = std::abs(products[static_cast<size_t>(i * count + i)]);
  } else {
    copy(block, residuals);
  }
  return append(count) > 0;
}

bool LowestEigenpairs::nothingMissed(const Ritz& ritz) {
  const Matrix wanted = vectors_.rowRange(0, count_);
  if (!(differenceFromIdentity(gram(wanted, wanted), count_) <= orthogonality)) return false;
  formShifted(wanted, ritz.values[count_ - 1] - static_cast<double>(n_) * epsilon * norm_);
  return device_.choleskyFactor(inverse_.as<double>(), n_) == 0;
}

bool LowestEigenpairs::find(double* values, double* vectors) {
  start();
  Ritz ritz;
  for (steps_ = 1; steps_ <= mostSteps && size_ >= width_; ++steps_) {
    if (!project(ritz)) return false;
    const double goal = (comesNoFurther() ? mostTolerance : tolerance) * norm_;
    const auto wanted = ritz.residuals.begin() + count_;
    const auto lowest = std::find_if_not(ritz.residuals.begin(), wanted, [&](double residual) { return residual <= goal; });
    if (lowest == wanted && confirm(ritz)) {
      if (!nothingMissed(ritz)) return false;
      device_.upload(values, ritz.values.data(), static_cast<size_t>(count_) * sizeof(double));
      device_.copy(vectors, vectors_.data, static_cast<size_t>(count_ * n_) * sizeof(double));
      return true;
    }
    const int64_t first = std::min<int64_t>(lowest - ritz.residuals.begin(), count_ - 1);
    moveShift(ritz, first);
    if (drownsInRounding()) {
      if (!restart()) return false;
      continue;
    }
    if (size_ + width_ > most_) shrink();
    if (!expand(first)) return false;
  }
  return false;
}

}  // namespace lora_da
