#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "cuda/dense_elementwise.h"
#include "cuda/lowest_eigenpairs.h"
#include "cuda/symmetric_eigenpairs.h"

namespace lora_da::cuda {

namespace {

constexpr int threads = 256;
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
__global__ void __launch_bounds__(threads) startKernel(double* x, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= count) return;
  uint64_t bits = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  bits ^= bits >> 31;
  x[i] = (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-52 - 1.0;
}

// Column j of r [n, columns] -= values[j] * column j of v; both contiguous.
__global__ void __launch_bounds__(threads) residualKernel(double* r, const double* v, const double* values, int64_t n) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (row >= n) return;
  const int64_t i = blockIdx.y * n + row;
  r[i] -= values[blockIdx.y] * v[i];
}

unsigned blocksFor(int64_t count) {
  return static_cast<unsigned>((count + threads - 1) / threads);
}

int64_t roundUp(int64_t value, int64_t grain) {
  return (value + grain - 1) / grain * grain;
}

// From the Gram matrix [count, count] of some columns a combination [count, rank] of them that is orthonormal, as well as the
// Gram matrix tells: a Cholesky factorization with pivoting of the columns scaled to length 1. Columns that are combinations of
// others to five digits are left out.
struct Combination {
  int64_t rank = 0;
  std::vector<double> weights;  // column-major
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

  // Columns of the inverse of the transposed factor, each row scaled back and put where its column of the block is.
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

// The orthonormal columns `basis` [rows, .] and what those of `more` [moreRows, .], zero in the rows after moreRows, have beside
// them.
std::vector<double> joined(std::vector<double> basis, int64_t rows, const std::vector<double>& more, int64_t moreRows) {
  constexpr double smallest = 1e-5;
  const auto length = [rows](const double* x) { return std::sqrt(std::inner_product(x, x + rows, x, 0.0)); };
  for (auto from = more.begin(); from != more.end(); from += moreRows) {
    std::vector<double> column(static_cast<size_t>(rows), 0.0);
    std::copy_n(from, moreRows, column.begin());
    bool independent = true;
    for (int pass = 0; pass < 2 && independent; ++pass) {  // twice is enough
      for (const double* other = basis.data(); other < basis.data() + basis.size(); other += rows) {
        const double overlap = std::inner_product(other, other + rows, column.begin(), 0.0);
        for (int64_t i = 0; i < rows; ++i) column[i] -= overlap * other[i];
      }
      const double left = length(column.data());
      independent = left > smallest;
      for (double& value : column) value /= left;
    }
    if (independent) basis.insert(basis.end(), column.begin(), column.end());
  }
  return basis;
}

}  // namespace

LowestEigenpairs::LowestEigenpairs(Dense& dense, double* a, int64_t n, int64_t count)
    : dense_(dense),
      queue_(dense.queue()),
      a_{a, n, n, n},
      n_(n),
      count_(count),
      width_(roundUp(count + std::max<int64_t>(8, count / 2), 8)),
      most_(4 * width_),
      errors_(static_cast<size_t>(width_), unknown) {}

// --- memory --------------------------------------------------------------------------------------------------------

// Gives each array its place after `memory`; null to learn only how much there is to place.
void LowestEigenpairs::layOut(char* memory) {
  constexpr size_t alignment = 256;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* place = memory + used;
    used += (bytes + alignment - 1) / alignment * alignment;
    return place;
  };
  const auto columns = [&](int64_t rows, int64_t cols) {
    auto* data = reinterpret_cast<double*>(take(static_cast<size_t>(rows * cols) * sizeof(double)));
    return Columns{data, rows, cols, rows};
  };
  inverse_ = columns(n_, n_);
  space_ = columns(n_, most_);
  product_ = columns(n_, most_);
  vectors_ = columns(n_, width_);
  residuals_ = columns(n_, width_);
  block_ = columns(n_, 2 * width_);
  other_ = columns(n_, width_);
  values_ = columns(width_, 1).data;
  small_ = columns(most_, most_).data;
  weights_ = columns(width_, width_).data;
  workspace_ = take(workspaceBytes_);
  total_ = used;
}

size_t LowestEigenpairs::bytes() {
  workspaceBytes_ = std::max(dense_.factorBytes(a_.data, n_), dense_.inverseBytes(a_.data, n_));
  layOut(nullptr);
  return total_;
}

std::vector<double> LowestEigenpairs::read(const double* from, int64_t count) {
  std::vector<double> host(static_cast<size_t>(count));
  check(cudaMemcpyAsync(host.data(), from, host.size() * sizeof(double), cudaMemcpyDeviceToHost, queue_.stream()),
        "reading a small matrix back");
  queue_.synchronize();
  return host;
}

// Pageable memory has been read when the call returns.
void LowestEigenpairs::send(double* to, const std::vector<double>& from) {
  check(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(double), cudaMemcpyHostToDevice, queue_.stream()),
        "sending a small matrix");
}

// x^T y, column-major, on the host.
std::vector<double> LowestEigenpairs::gram(const Columns& x, const Columns& y) {
  dense_.multiply(CUBLAS_OP_T, x, y, 1, 0, {small_, x.cols, y.cols, x.cols});
  return read(small_, x.cols * y.cols);
}

// --- the iteration -------------------------------------------------------------------------------------------------

// Makes `block` orthonormal and orthogonal to `basis`, and appends it; returns how many columns that added. Both buffers are
// overwritten. Once through leaves errors of the rounding times the square of the block's condition, twice of the rounding; more
// are for what was nearly within the basis, whose columns are not yet orthonormal the second time.
int64_t LowestEigenpairs::orthonormalize(const Columns& basis, Columns block, Columns other) {
  constexpr int mostRounds = 4;
  for (int round = 0;; ++round) {
    if (basis.cols > 0) {
      const Columns overlap{small_, basis.cols, block.cols, basis.cols};
      dense_.multiply(CUBLAS_OP_T, basis, block, 1, 0, overlap);
      dense_.multiply(CUBLAS_OP_N, basis, overlap, -1, 1, block);
    }
    const std::vector<double> products = gram(block, block);
    const Combination combination = orthonormalCombination(products, block.cols);
    if (combination.rank == 0) return 0;
    const Columns weights{weights_, block.cols, combination.rank, block.cols};
    send(weights_, combination.weights);
    const bool last = round == mostRounds - 1 || (round > 0 && differenceFromIdentity(products, block.cols) < nearlyOrthonormal);
    Columns target = last ? Columns{basis.data + basis.cols * basis.leading, basis.rows, 0, basis.leading} : other;
    target.cols = combination.rank;
    dense_.multiply(CUBLAS_OP_N, block, weights, 1, 0, target);
    if (last) return target.cols;
    other = block;
    block = target;
  }
}

// Adds what the first `count` columns of block_ have beside the space to it; returns how many columns that are.
int64_t LowestEigenpairs::append(int64_t count) {
  const int64_t added = orthonormalize(space_.range(0, size_), block_.range(0, count), other_);
  dense_.multiply(CUBLAS_OP_N, a_, space_.range(size_, added), 1, 0, product_.range(size_, added));
  size_ += added;
  return added;
}

void LowestEigenpairs::start() {
  queue_.launch("lowestEigenpairs", startKernel, dim3(blocksFor(n_ * width_)), dim3(threads), 0, block_.data, n_ * width_);
  append(width_);
}

// Subtracts values times vectors from `product`, A times vectors, and measures what is left.
std::vector<double> LowestEigenpairs::residualNorms(const Columns& product, int64_t count) {
  queue_.launch("lowestEigenpairs", residualKernel, dim3(blocksFor(n_), static_cast<unsigned>(count)), dim3(threads), 0,
                product.data, vectors_.data, values_, n_);
  const std::vector<double> squares = gram(product.range(0, count), product.range(0, count));
  std::vector<double> norms;
  for (int64_t i = 0; i < count; ++i) norms.push_back(std::sqrt(squares[static_cast<size_t>(i * count + i)]));
  return norms;
}

// Rayleigh and Ritz: the lowest eigenpairs of Q^T A Q, their vectors in the whole space and their residuals. False where A has
// elements that are no numbers.
bool LowestEigenpairs::project(Ritz& ritz) {
  const Columns q = space_.range(0, size_), aq = product_.range(0, size_);
  std::vector<double> projection = gram(q, aq);
  for (const double value : projection) {
    if (!std::isfinite(value)) return false;
  }
  SymmetricEigenpairs pairs = symmetricEigenpairs(std::move(projection), size_);
  ritz.values = std::move(pairs.values);
  norm_ = std::max({norm_, std::abs(ritz.values.front()), std::abs(ritz.values.back())});
  preceding_ = std::move(ritzVectors_);
  ritzVectors_ = std::move(pairs.vectors);
  ritzVectors_.resize(static_cast<size_t>(size_ * width_));

  send(values_, {ritz.values.begin(), ritz.values.begin() + width_});
  send(small_, ritzVectors_);
  const Columns lowest{small_, size_, width_, size_};
  dense_.multiply(CUBLAS_OP_N, q, lowest, 1, 0, vectors_);
  dense_.multiply(CUBLAS_OP_N, aq, lowest, 1, 0, residuals_);
  ritz.residuals = residualNorms(residuals_, width_);
  largest_.push_back(*std::max_element(ritz.residuals.begin(), ritz.residuals.begin() + count_));
  return true;
}

bool LowestEigenpairs::comesNoFurther() const {
  return largest_.size() > stepsWithoutGain && largest_.back() > 0.5 * largest_[largest_.size() - 1 - stepsWithoutGain];
}

// Whether the wanted pairs hold with A itself; A Q, from which rounding errors grow, is made anew where they do not.
bool LowestEigenpairs::confirm() {
  dense_.multiply(CUBLAS_OP_N, a_, vectors_.range(0, count_), 1, 0, block_.range(0, count_));
  const std::vector<double> norms = residualNorms(block_, count_);
  if (std::all_of(norms.begin(), norms.end(), [&](double norm) { return norm <= mostTolerance * norm_; })) return true;
  dense_.multiply(CUBLAS_OP_N, a_, space_.range(0, size_), 1, 0, product_.range(0, size_));
  return false;
}

// Q becomes the present Ritz vectors and what the preceding ones have beside them.
void LowestEigenpairs::shrink() {
  const std::vector<double> coordinates =
      joined(ritzVectors_, size_, preceding_, static_cast<int64_t>(preceding_.size()) / width_);
  send(small_, coordinates);
  const Columns kept{small_, size_, static_cast<int64_t>(coordinates.size()) / size_, size_};
  for (const Columns& columns : {space_, product_}) {
    const Columns result = block_.range(0, kept.cols);
    dense_.multiply(CUBLAS_OP_N, columns.range(0, size_), kept, 1, 0, result);
    queue_.copy(columns.data, result.data, static_cast<size_t>(n_ * kept.cols) * sizeof(double));
  }
  size_ = kept.cols;
  ritzVectors_.assign(static_cast<size_t>(size_ * width_), 0.0);
  for (int64_t i = 0; i < width_; ++i) ritzVectors_[static_cast<size_t>(i * size_ + i)] = 1;
}

void LowestEigenpairs::formShifted(const Columns& moved, double shift) {
  queue_.copy(inverse_.data, a_.data, static_cast<size_t>(n_ * n_) * sizeof(double));
  if (moved.cols > 0) dense_.addOuter(moved, 2 * norm_, inverse_);
  addToDiagonal(queue_, inverse_.data, n_, -shift);
}

bool LowestEigenpairs::invertShifted(double shift, int64_t first) {
  formShifted(vectors_.range(0, first), shift);
  ++inversions_;
  lastInversion_ = steps_;
  inverted_ = dense_.factor(inverse_.data, n_, workspace_, workspaceBytes_) == 0;
  if (inverted_) {
    dense_.invert(inverse_.data, n_, workspace_, workspaceBytes_);
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
  queue_.copy(block_.data, vectors_.data, static_cast<size_t>(n_ * moved_) * sizeof(double));
  dense_.multiply(CUBLAS_OP_N, inverse_, vectors_.range(moved_, width_ - moved_), 1, 0, block_.range(moved_, width_ - moved_));
  size_ = 0;
  return append(width_) == width_;
}

// Adds the preconditioned residuals of the pairs from `first` on to the space.
bool LowestEigenpairs::expand(int64_t first) {
  const int64_t count = width_ - first;
  const Columns residuals = residuals_.range(first, count);
  Columns block = block_.range(0, count);
  std::fill(errors_.begin(), errors_.end(), unknown);
  if (inverted_) {
    dense_.multiply(CUBLAS_OP_N, inverse_, residuals, 1, 0, block);
    // A Ritz vector's error is about the inverse times its residual, and the error of its value their product.
    const std::vector<double> products = gram(residuals, block);
    for (int64_t i = 0; i < count; ++i) errors_[first + i] = std::abs(products[static_cast<size_t>(i * count + i)]);
  } else {
    queue_.copy(block.data, residuals.data, static_cast<size_t>(n_ * count) * sizeof(double));
  }
  return append(count) > 0;
}

bool LowestEigenpairs::nothingMissed(const Ritz& ritz) {
  const Columns wanted = vectors_.range(0, count_);
  if (!(differenceFromIdentity(gram(wanted, wanted), count_) <= orthogonality)) return false;
  formShifted(wanted, ritz.values[count_ - 1] - static_cast<double>(n_) * epsilon * norm_);
  return dense_.factor(inverse_.data, n_, workspace_, workspaceBytes_) == 0;
}

bool LowestEigenpairs::find(void* memory, double* values, double* vectors) {
  layOut(static_cast<char*>(memory));
  start();
  Ritz ritz;
  for (steps_ = 1; steps_ <= mostSteps && size_ >= width_; ++steps_) {
    if (!project(ritz)) return false;
    const double goal = (comesNoFurther() ? mostTolerance : tolerance) * norm_;
    const auto wanted = ritz.residuals.begin() + count_;
    const auto lowest = std::find_if_not(ritz.residuals.begin(), wanted, [&](double residual) { return residual <= goal; });
    if (lowest == wanted && confirm()) {
      if (!nothingMissed(ritz)) return false;
      queue_.copy(values, values_, static_cast<size_t>(count_) * sizeof(double));
      queue_.copy(vectors, vectors_.data, static_cast<size_t>(count_ * n_) * sizeof(double));
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

}  // namespace lora_da::cuda
