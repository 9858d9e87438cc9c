// Tiles of a second moment x^T x in float64: panels of 24 columns of x, widened, and products of two panels over their rows.
//
// Written for AVX-512; elsewhere the table's entries stay null and BLAS serves.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lora_da::cpu::KERNEL_ISA {

#if defined(__AVX512F__)

namespace {

constexpr int doubles = 8;                          // of a vector
constexpr int vectors = momentPanelCols / doubles;  // of a panel's row
typedef double VecDouble __attribute__((vector_size(8 * doubles)));

KERNEL_INLINE VecDouble loadDoubles(const double* p) {
  VecDouble v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Columns beyond `cols` become zeros.
template <class T>
void momentPanel(const void* x, int64_t rows, int64_t stride, int64_t cols, double* panel) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = static_cast<const T*>(x) + row * stride;
    float values[2 * lanes] = {};
    overVectors(cols, [&](int64_t i, auto part) { store(values + i, load(in + i, part), Whole{}); });
    for (int i = 0; i < momentPanelCols; ++i) panel[row * momentPanelCols + i] = static_cast<double>(values[i]);
  }
}

// sum [8, 24] += left^T right over the rows of two panels; of left's, the 8 columns that it points at.
KERNEL_INLINE void addTile(const double* left, const double* right, int64_t rows, VecDouble (&sum)[doubles][vectors]) {
  for (int64_t t = 0; t < rows; ++t) {
    VecDouble columns[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) columns[v] = loadDoubles(right + t * momentPanelCols + v * doubles);
#pragma GCC unroll 8
    for (int i = 0; i < doubles; ++i) {
      const VecDouble factor = left[t * momentPanelCols + i] - VecDouble{};
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sum[i][v] += factor * columns[v];
    }
  }
}

void addMoment(const double* left, const double* right, int64_t rows, int64_t zRows, int64_t zCols, double* z, int64_t zStride) {
  for (int64_t first = 0; first < zRows; first += doubles) {
    VecDouble sum[doubles][vectors] = {};
    addTile(left + first, right, rows, sum);
    const int64_t height = zRows - first < doubles ? zRows - first : doubles;
    double values[doubles][momentPanelCols];
    __builtin_memcpy(values, sum, sizeof values);
    for (int64_t i = 0; i < height; ++i) {
      double* row = z + (first + i) * zStride;
#pragma omp simd
      for (int64_t j = 0; j < zCols; ++j) row[j] += values[i][j];
    }
  }
}

}  // namespace

void fillMoments(Kernels& table) {
  table.f32.momentPanel = momentPanel<float>;
  table.bf16.momentPanel = momentPanel<Bf16>;
  table.addMoment = addMoment;
}

#else

void fillMoments(Kernels&) {}

#endif

}  // namespace lora_da::cpu::KERNEL_ISA
