// Single-threaded vectorized loops of the CPU device. Each is compiled once per instruction set from the same source
// (kernels/*.cpp, see CMakeLists.txt) and chosen at run time: kernels().
//
// A `Row` argument is a pointer to elements of the compute type given by the template instance: the table has one set for
// float32 and one for bfloat16. All arithmetic is float32.
#pragma once

#include <cstdint>

#include "core/device.h"

namespace lora_da::cpu {

inline constexpr int32_t maxHeadDim = 1024;

// The query heads that read one key head, over one sequence, for the queries [firstQuery, firstQuery + queryCount). Row 0 of
// every pointer is the sequence's first token, column 0 the first element of the first query head or of the key head; query
// heads follow each other every headDim columns. Strides are in elements.
struct AttentionGroup {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t qStride = 0;
  int64_t kStride = 0;
  int64_t vStride = 0;
  int64_t firstQuery = 0;
  int64_t queryCount = 0;
  int64_t firstKey = 0;  // a multiple of attentionTile; no query sees a key before it
  AttentionShape shape;
};

inline constexpr int64_t attentionTile = 48;

// Rows and columns of the padded partial gradients. Static, not inline: see kernels/vector.h.
[[maybe_unused]] static int64_t attentionKeyRows(const AttentionGroup& group) {
  const int64_t keys = group.firstQuery + group.queryCount - group.firstKey;
  return (keys + attentionTile - 1) / attentionTile * attentionTile;
}
[[maybe_unused]] static int64_t attentionRowWidth(int32_t headDim) {
  return (headDim + 15) / 16 * 16;
}

// The query heads [queries, headDim] of one new token that read one key head, over `rows` rows that are kept of it.
struct CachedAttention {
  const void* q = nullptr;
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t keyStride = 0;
  int64_t valueStride = 0;
  int64_t rows = 0;
  int64_t queries = 0;
  int32_t headDim = 0;
  float scale = 1;
};
// What is left of a part of the rows for each query head: its output [attentionRowWidth], not yet divided, its largest score
// and its sum of exponentials.
[[maybe_unused]] static int64_t cachedPartFloats(int32_t headDim) {
  return attentionRowWidth(headDim) + 2;
}
inline constexpr int64_t mostCachedParts = 64;

// Columns of a panel (see product_kernels.cpp): three vectors.
inline constexpr int64_t panelCols = 48;
// A multiple of the height of every tile that a panel is multiplied in.
inline constexpr int64_t panelRowGrain = 24;

// y [rows, cols] = scale * (x panel + lowRank panel') + bias + residual, or the same added to y's float32 values, for
// the columns of one panel. x [rows, depth], lowRank [rows, lowRankDepth] and y (unless floatOutput) are in the compute type.
struct PanelProduct {
  const void* x = nullptr;
  int64_t xStride = 0;
  int64_t depth = 0;
  const void* lowRank = nullptr;
  int64_t lowRankStride = 0;
  int64_t lowRankDepth = 0;  // 0: none
  const void* panel = nullptr;
  const void* lowRankPanel = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;  // at most panelCols
  float scale = 1;
  bool accumulate = false;  // only with floatOutput, scale 1
  const float* bias = nullptr;
  const float* residual = nullptr;
  int64_t residualStride = 0;
  void* y = nullptr;
  int64_t yStride = 0;
  bool floatOutput = true;
};

// Columns of a thin product, at most: two rows of sums fill a vector.
inline constexpr int64_t thinCols = 8;

// c [leftCols, cols] += left^T b over the rows of b [rows, cols]; left laid out by packRows as [steps][leftStride].
struct OuterSum {
  const void* left = nullptr;
  int64_t leftStride = 0;
  int64_t leftCols = 0;
  const void* b = nullptr;
  int64_t bStride = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  float* c = nullptr;
  int64_t cStride = 0;
};

// A row's softmax over the vocabulary, taken part by part, the target apart from all others: what is left of a nearly certain
// target would be lost in a sum with it. Sums are relative to the largest logit so far.
struct RunningSoftmax {
  float largest = -1e30f;  // "none yet": finite, so that no difference is NaN
  float targetLogit = 0;
  double sum = 0;  // of the others' exponentials
};

// Columns of a panel of a second moment: three vectors of doubles.
inline constexpr int momentPanelCols = 24;

// T is float or Bf16 (see kernels/vector.h); void* in the table so that one table type serves both.
struct TypedKernels {
  // y = x * rstd * weight, kept = x (null: not wanted); returns rstd. One row of `width`.
  float (*rmsNorm)(const float* x, const float* weight, float epsilon, void* y, void* kept, int64_t width);
  void (*rmsNormApply)(const void* x, float rstd, const float* weight, void* y, int64_t width);
  // dx += gradient of rmsNorm, one row; rounded = dx in the compute type (null: not wanted).
  void (*rmsNormGrad)(const void* x, float rstd, const float* weight, const float* dy, float* dx, void* rounded, int64_t width);
  // One row of heads: see Device::rope. cos, sin point at the row of this token's position.
  void (*rope)(const void* in, int32_t heads, int32_t headDim, const float* normWeight, float epsilon, const float* cos,
               const float* sin, int64_t pairs, void* out, float* rstd);
  void (*ropeGrad)(void* d, const void* in, int32_t heads, int32_t headDim, const float* normWeight, const float* cos,
                   const float* sin, int64_t pairs, const float* rstd);
  void (*gatedMlp)(const void* gate, const void* up, Activation activation, void* h, int64_t width);
  void (*gatedMlpGrad)(void* gate, void* up, Activation activation, const void* dh, void* h, int64_t width);
  void (*fromFloat)(const float* x, void* y, int64_t count);
  void (*toFloat)(const void* x, float* y, int64_t count);
  // sums[j] += x[j]^2 over `rows` rows of `stride`.
  void (*squareSum)(const void* x, int64_t rows, int64_t cols, int64_t stride, double* sums);
  // Takes in `count` logits, which are overwritten; `target` is the target's place among them, or outside of [0, count).
  // exponentials (compute type; null: not wanted; may be where the logits are) = e^(logit - largest), 0 for the target. Returns
  // the factor, at most 1, by which what earlier parts' exponentials went into has to be scaled.
  double (*addToSoftmax)(float* logits, int64_t count, int64_t target, RunningSoftmax& row, void* exponentials);
  // See attention_forward.cpp. out and lse (query heads are neighbours) of the group's queries = ; `scratch` has
  // attentionScratch() floats.
  void (*attentionGroup)(const AttentionGroup& group, void* out, int64_t outStride, float* lse, int64_t lseStride,
                         float* scratch);
  // See attention_backward.cpp. dq (compute type) of the group's queries = ; dk, dv (float32) = these queries' part of the
  // gradients of the keys that they see: rows from firstKey on, attentionKeyRows() of them, each attentionRowWidth() long.
  // `scratch` has attentionGradScratch() floats.
  void (*attentionGroupGrad)(const AttentionGroup& group, const void* out, const void* dout, int64_t outStride,
                             int64_t doutStride, const float* lse, int64_t lseStride, void* dq, int64_t dqStride, float* dk,
                             float* dv, float* scratch);
  int64_t (*attentionScratch)(const AttentionGroup& group);      // floats
  int64_t (*attentionGradScratch)(const AttentionGroup& group);  // floats
  // Panels, see panels.h; null where the instruction set has no kernels for them. Depths are rounded up to stepDepth,
  // columns to 16; a panel has steps * columns floats. packColumns: rows of the source become columns, `rows` has one pointer
  // for each column, rounded up to 16 (null: zeros). packRows: step i joins row i of `upper` and, in bfloat16, row i of `lower`
  // (null: zeros); `stride` leads from one step's row to the next's. `type` is that of the source.
  void (*packColumns)(const void* const* rows, DType type, int64_t depth, int64_t cols, void* panel);
  void (*packRows)(const void* upper, const void* lower, DType type, int64_t stride, int64_t steps, int64_t cols, void* panel);
  // From a weight that is kept as panels of `type`, which have storedSteps steps: the columns [firstCol, firstCol + cols) of its
  // depth, a multiple of panelCols, are the columns of the result, whose depth is `depth` of the one panel at `stored`.
  void (*turnPanel)(const void* stored, DType type, int64_t storedSteps, int64_t storedCols, int64_t firstCol, int64_t cols,
                    int64_t depth, void* panel);
  // A panel in float32 from one of bfloat16; null in bfloat16.
  void (*widenPanel)(const void* stored, int64_t depth, int64_t cols, void* panel);
  void (*multiplyPanel)(const PanelProduct& product);
  // y [cols rounded up to 16] = x [depth] times a panel of `type`.
  void (*multiplyRow)(const void* x, const void* panel, DType type, int64_t depth, int64_t cols, float* y);
  // y = scale * x b^T where b, read as it lies, has at most thinCols rows; y is in the compute type or float32.
  void (*multiplyThin)(const Matrix& x, const Matrix& b, float scale, const Matrix& y);
  void (*addOuter)(const OuterSum& sum);
  // y[i] = row i of w [rows, depth] (of `type`) times x [depth].
  void (*dotRows)(const void* x, const void* w, DType type, int64_t stride, int64_t rows, int64_t depth, float* y);
  int64_t stepDepth;
  // See moment_kernels.cpp; null where there is none. panel [rows, 24] = the columns of x [rows, cols], cols <= 24.
  void (*momentPanel)(const void* x, int64_t rows, int64_t stride, int64_t cols, double* panel);
  // See attention_cached.cpp. parts [queries, cachedPartFloats] = .
  void (*attentionCachedPart)(const CachedAttention& attention, float* parts);
  // out [headDim] = one query head's attention from `count` parts of it, at most mostCachedParts.
  void (*mergeCached)(const float* parts, int64_t count, int64_t stride, int32_t headDim, void* out);
};

struct Kernels {
  const char* isa;  // "avx512bf16", "avx512", "avx2", "baseline"
  TypedKernels f32;
  TypedKernels bf16;
  void (*scaleRow)(float scale, float* x, int64_t count);   // x *= scale
  void (*addRow)(const float* x, float* y, int64_t count);  // y += x
  // z [zRows, zCols] += left^T right over the rows of two panels; null where momentPanel is.
  void (*addMoment)(const double* left, const double* right, int64_t rows, int64_t zRows, int64_t zCols, double* z,
                    int64_t zStride);
  // The same, summed by groups of momentGroupRows rows, from panels of bfloat16 pairs (panels.h), panelCols columns of x or
  // fewer; null where the processor does not multiply pairs.
  void (*addGroupedMoment)(const void* left, const void* right, int64_t rows, int64_t zRows, int64_t zCols, double* z,
                           int64_t zStride);
  double (*squaredNorm)(const float* x, int64_t count);
  // One AdamW update of `count` elements; gradient is scaled by gradScale; shadow is bf16 or null.
  void (*adamw)(float* value, const float* grad, float* firstMoment, float* secondMoment, uint16_t* shadow, int64_t count,
                const AdamWStep& step, float gradScale, float biasCorrection1, float biasCorrection2);
};

const Kernels& kernels();  // the best that this processor runs

}  // namespace lora_da::cpu
