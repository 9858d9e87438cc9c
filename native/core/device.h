// What a device must be able to do: the contract between the model, which owns the order of operations, and a
// device, which owns how they are computed and fused.
//
// Conventions
// - Matrices are row-major views: element (i, j) is data[i * stride + j]. T is the number of rows of a packed batch
//   (all sequences end to end, padded at the end to a multiple of 64 rows), H a width, r a LoRA rank.
// - "=" overwrites, "+=" accumulates; each comment says which.
// - "compute type" is the type of activations and products: float32 or bfloat16. The residual stream, norms' inputs,
//   gradients of the residual stream, adapter weights, gradients and moments are float32 in both.
// - Operations enqueue and return; results may be read on the host after download() + synchronize().
// - Views passed to one call must not overlap unless the comment says "in place".
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace lora_da {

struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  int64_t room = 0;  // columns behind the last one that linear and linearInputGrad may overwrite; see Device::lowRankRoom

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Where an element lies.
  char* at(int64_t row, int64_t col = 0) const {
    return static_cast<char*>(data) + (row * stride + col) * static_cast<int64_t>(sizeOf(dtype));
  }
  Matrix columns(int64_t first, int64_t count) const { return {at(0, first), dtype, rows, count, stride}; }
  Matrix rowRange(int64_t first, int64_t count) const { return {at(first), dtype, count, cols, stride, room}; }
};

// Device memory, freed with its owner.
using Buffer = std::unique_ptr<void, std::function<void(void*)>>;

// A frozen weight W [out, in] in whatever layout the device's products want.
class Weight {
 public:
  virtual ~Weight() = default;
  int64_t out = 0;
  int64_t in = 0;
  size_t bytes = 0;  // that its layouts take, mapped pages included
};

// Where a frozen weight comes from: mapped file pages (see core/mapped_file.h).
struct HostTensor {
  std::string name;
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  std::function<void()> populate;  // reads the pages in, so that no step waits for them; may be empty
  std::function<void()> release;   // tells the system that the pages are no longer needed; may be empty
};

// What a weight will be used for; a device prepares only the layouts that are asked for.
struct WeightUses {
  bool forward = true;     // linear
  bool inputGrad = false;  // linearInputGrad
  bool lookup = false;     // embed
  bool lora = false;       // with a LoRA term
};

// LoRA's up-projections of stacked modules: their B factors, transposed, side by side at their modules' columns. Block i adds
// columns [i rank, (i + 1) rank) of a down-projection times its columns of `factors` to those columns of the product.
struct UpProjection {
  struct Block {
    int64_t first = 0, count = 0;  // columns
  };
  Matrix factors;             // [rank, out]
  std::vector<Block> blocks;  // in order, apart; columns in none of them have no term

  int64_t rank() const { return factors.rows; }
};

// The sequences of a packed batch: sequence s has rows [hostStarts[s], hostStarts[s+1]); rows from the last entry on are padding.
// The same by row lies in device memory, so that work recorded for one batch serves every batch of its shape.
struct Sequences {
  std::vector<int32_t> hostStarts;    // count + 1 entries
  const int32_t* rowFirst = nullptr;  // device memory [T]: first row of the row's sequence; of a padding row the row itself
  const int32_t* rowEnd = nullptr;    // device memory [T]: one past the last row of its sequence; of a padding row the row itself
  int32_t count() const { return static_cast<int32_t>(hostStarts.size()) - 1; }
};

struct Rotary {
  const float* cos = nullptr;  // [positions, pairs], device memory; attention scaling folded in
  const float* sin = nullptr;
  int64_t pairs = 0;  // rotary dimension / 2; the pair of element i is i + pairs; elements from 2*pairs on pass unchanged
};

// Optional RMSNorm over each head before the rotation (Qwen3).
struct HeadNorm {
  const float* weight = nullptr;  // [headDim]; null: no norm
  float epsilon = 0;
};

struct AttentionShape {
  int32_t heads = 0;
  int32_t kvHeads = 0;  // heads % kvHeads == 0; query head h reads key head h / (heads / kvHeads)
  int32_t headDim = 0;
  float scale = 1;     // softmax(scale * q k^T)
  int32_t window = 0;  // 0: causal; else a query at p sees keys p-window+1 .. p
};

// What the scratch of a step follows.
struct StepShape {
  int64_t labelRows = 0;
  int64_t vocabulary = 0;
  AttentionShape attention;
  int64_t rows = 0;     // of all its sequences
  int64_t longest = 0;  // of one of them
};

enum class Activation { silu, geluTanh, gelu };

// One trainable tensor with its optimizer state, all float32 [count].
struct Parameter {
  float* value = nullptr;
  float* grad = nullptr;
  float* firstMoment = nullptr;
  float* secondMoment = nullptr;
  void* shadow = nullptr;  // `value` in the compute type for products; null when the compute type is float32
  int64_t count = 0;
};

struct AdamWStep {
  float learningRate = 0;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  float weightDecay = 0;
  float maxGradNorm = 0;  // 0: no clipping
  int64_t step = 1;       // 1 for the first update
};

enum class Transpose { no, yes };

// How a second moment is summed over rows: in float64 throughout; or, where x is bfloat16, so that float32 holds its products
// exactly, up to momentGroupRows rows at a time in float32, and those sums in float64. A device may take the first for the
// second.
enum class MomentSum { exact, grouped };
inline constexpr int64_t momentGroupRows = 64;

// Bytes of the memory that the device works in.
struct DeviceMemory {
  size_t held = 0;  // by this process
  size_t free = 0;  // that can still be had; 0 where unknown
};

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;
  virtual DType computeType() const = 0;
  // Tokens of one pass through the model that keep the device busy; a step of more is cut into passes.
  virtual int64_t passTokens() const = 0;

  // Columns of room that the inputs of linear and linearInputGrad should have behind each row where a LoRA term of at most that
  // rank comes with them: a device that lays the term's factors beside its weights makes one product of both.
  virtual int64_t lowRankRoom() const = 0;

  // Enqueues what body enqueues, which may be replayed from a recording of the same work: a device that records calls body once
  // to see what it asks for, and once more when it is new. Body calls operations that enqueue, in the same order and on the
  // same memory each time; it neither uploads, downloads, allocates nor synchronizes.
  virtual void recorded(const std::function<void()>& body) = 0;
  // How many recordings it keeps; 0 where body is only called.
  virtual size_t recordings() const = 0;

  // --- memory -------------------------------------------------------------------------------------------------
  virtual Buffer allocate(size_t bytes, const std::string& purpose) = 0;  // 64-byte aligned, contents undefined
  virtual void upload(void* device, const void* host, size_t bytes) = 0;  // `host` may be reused after the call
  virtual void download(void* host, const void* device, size_t bytes) = 0;
  virtual void zero(void* device, size_t bytes) = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;  // device memory both
  virtual void synchronize() = 0;
  // About the bytes that the device's own scratch grows to in such a step, or in one of fewer rows.
  virtual size_t workspaceBytes(const StepShape& step) const = 0;
  // The same for secondMoment over so many rows of this width.
  virtual size_t momentWorkspaceBytes(int64_t rows, int64_t width) const = 0;
  // The same, for each worker of `concurrently`, for the Cholesky operations and lowestEigenpairs of `count` pairs on matrices of
  // order n. What they are given is not in it.
  virtual size_t denseWorkspaceBytes(int64_t n, int64_t count) const = 0;
  virtual DeviceMemory memory() const = 0;

  // --- products -----------------------------------------------------------------------------------------------
  // One weight from `parts`, modules that read the same input, stacked along their outputs: W [sum of rows, in].
  virtual std::unique_ptr<Weight> prepare(const std::vector<HostTensor>& parts, WeightUses uses) = 0;
  // y [T, out] = x [T, in] W^T + bias + down up + residual. `bias` [out] float32 or null. `down` [T, blocks * rank] and `up` are
  // the LoRA term, in the compute type, or null. `residual` [T, out] float32 or null, then y is float32 too and another matrix. x
  // is in the compute type, y in the compute type or float32.
  virtual void linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
                      const Matrix* residual, const Matrix& y) = 0;
  // dx [T, in] = dy [T, out] W + downGrad a. `downGrad` [T, k] and `a` [k, in] are the LoRA term, in the compute type, or null.
  // dy is in the compute type, dx in the compute type or float32.
  virtual void linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                               const Matrix& dx) = 0;
  // c = alpha op(a) op(b), or += with `accumulate`. a and b share a type (float32, bfloat16 or float64); c is float32
  // or that type.
  virtual void matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                      const Matrix& c) = 0;
  // Z [in, in] float64 += x^T x over the rows of x [rows, in]; only the lower triangle (j <= i) counts,
  // what lies above it is undefined afterwards.
  virtual void secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) = 0;
  // sums [cols] float64 += column sums of x^2.
  virtual void squareSum(const Matrix& x, double* sums) = 0;

  // --- elementwise --------------------------------------------------------------------------------------------
  // x [T, H] float32 = scale * table[ids[t]].
  virtual void embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) = 0;
  // y [T, H] = x * rstd * weight in the compute type; rstd [T] = 1/sqrt(mean(x^2) + epsilon). x float32 [T, H]. `kept` [T, H] = x
  // in the compute type, for backward; null: not wanted.
  virtual void rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd, const Matrix* kept) = 0;
  // y = x * rstd * weight again, from the saved rstd (backward needs y and does not store it). x, y in the compute type.
  virtual void rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) = 0;
  // dx [T, H] float32 += gradient of rmsNorm's y w.r.t. its x (compute type), from dy [T, H] float32. The weight is frozen.
  // `rounded` [T, H] = dx in the compute type, for the products that follow; null: not wanted.
  virtual void rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                           const Matrix* rounded) = 0;
  // out = rotate(norm(in)) per head; in, out [T, heads*headDim] compute type, `out` may be `in` where there is no norm.
  // rstd [T, heads] is written where there is a norm. positions [T].
  virtual void rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                    const int32_t* positions, const Matrix& out, float* rstd) = 0;
  // d, in place: gradient w.r.t. `out` becomes gradient w.r.t. `in`. `in` and `rstd` are read only where there is a norm.
  virtual void ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm,
                        const Rotary& rotary, const int32_t* positions, const float* rstd) = 0;
  // gateUp [T, 2I] holds gate in its first I columns, up in the others. h [T, I] = activation(gate) * up.
  virtual void gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) = 0;
  // gateUp, in place: becomes the gradient w.r.t. itself, from dh [T, I]; h [T, I] = gatedMlp's result again. All in the compute
  // type.
  virtual void gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) = 0;
  // y [rows, H]: row i = x[index[i]], or zeros where index[i] is negative; x and y of one type, any.
  virtual void gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) = 0;
  // y[index[i]] += x[i], float32; no index repeats, a negative one takes its row nowhere.
  virtual void scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) = 0;
  // y = x in y's type (float32 <-> compute type, or the same).
  virtual void convert(const Matrix& x, const Matrix& y) = 0;

  // --- attention ----------------------------------------------------------------------------------------------
  // out [T, heads*headDim] = softmax(scale q k^T) v within each sequence, causal; padding rows of `out` are zero.
  // lse [T, heads] = log of each row's sum of exponentials, kept for backward. Works in tiles: never stores T x T.
  virtual void attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                         const AttentionShape& shape, const Matrix& out, float* lse) = 0;
  // dq, dk, dv = gradients from dout; padding rows are zero.
  virtual void attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                             const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                             const Matrix& dk, const Matrix& dv) = 0;
  // Decoding: q [1, heads*headDim] is the query at position length-1; keys, values [length, kvHeads*headDim] are the cache.
  virtual void attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                               const Matrix& out) = 0;

  // --- loss ---------------------------------------------------------------------------------------------------
  // Cross-entropy of rows x [L, H] (compute type) against targets [L], through the head, in chunks: L x vocabulary is never
  // stored. losses [L] float32 =. With dx (float32 [L, H]): dx = rowScale[i] * gradient of losses[i].
  virtual void headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                        const Matrix* dx) = 0;
  // total[0] += sum of scale[i] * losses[i], in double.
  virtual void sumLosses(const float* losses, const float* scale, int64_t count, double* total) = 0;

  // --- optimizer ----------------------------------------------------------------------------------------------
  // norm[0] = L2 norm of all gradients, summed in double in a fixed order.
  virtual void gradNorm(const std::vector<Parameter>& parameters, double* norm) = 0;
  // One AdamW update with gradients scaled by min(1, maxGradNorm / (norm + 1e-6)); refreshes shadows. Does nothing where `norm`
  // or `loss` is not finite, so that the last good factors survive. `step` [1] is in device memory: only its values change from
  // step to step, not the work.
  virtual void adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) = 0;

  // --- dense algebra of the initializations, float64 where not said otherwise (arrays are row-major and contiguous; symmetric
  // --- ones hold both triangles)
  // a [n, n] = its Cholesky factor in the lower triangle (upper undefined). Returns 0, or the 1-based order of the first
  // minor that is not positive: a host answer, since what follows depends on it (not used inside a step).
  virtual int64_t choleskyFactor(double* a, int64_t n) = 0;
  // b [n, m] = (L L^T)^-1 b.
  virtual void choleskySolve(const double* factor, int64_t n, double* b, int64_t m) = 0;
  // a [n, n], holding a factor, becomes the full symmetric inverse (L L^T)^-1.
  virtual void choleskyInverse(double* a, int64_t n) = 0;
  // The upper triangle of a [n, n] becomes the mirror image of the lower one.
  virtual void mirrorLower(double* a, int64_t n) = 0;
  // How many pieces of work on matrices of at most this order are best done at once, and that work: body(item, worker) for
  // each item, worker < concurrency(order). A body calls the operations of this section, float64 matmul, allocate, upload,
  // download and copy. Rethrows what the first item that failed threw; items after it may be left out.
  virtual int concurrency(int64_t order) const = 0;
  virtual void concurrently(int64_t order, int64_t items, const std::function<void(int64_t item, int worker)>& body) = 0;
  // c [n, n] = alpha a a^T (+ beta c), a [n, m]; both triangles.
  virtual void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) = 0;
  // The `count` smallest eigenpairs of the symmetric a [n, n] (destroyed): values [count] ascending, vectors [count, n], a row
  // each.
  virtual void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) = 0;
  // x *= factor, the product in float64. x is float32 or float64.
  virtual void scale(const Matrix& x, double factor) = 0;
  // a [count] = alpha a + beta b.
  virtual void blend(double* a, double alpha, const double* b, double beta, int64_t count) = 0;
  // a [n, n] += value I.
  virtual void addToDiagonal(double* a, int64_t n, double value) = 0;
  // y [cols, rows] = x^T diag(scale). x [rows, cols] float32, scale [rows].
  virtual void scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) = 0;
  // How many elements are infinite or not a number: a host answer. x is float32 or float64.
  virtual int64_t countNonFinite(const Matrix& x) = 0;
};

struct DeviceOptions {
  std::string device = "auto";  // auto | cpu | cuda[:i]
  DType computeType = DType::f32;
  int threads = 0;        // 0: physical cores
  size_t copyBudget = 0;  // bytes that copies of weights may take, where a device can also read them in their file
  bool prepack = false;   // lay weights out at load as each product of a step reads them, in more memory, not in every step
  bool profile = false;   // count and time every operation (core/profiled_device.h)
  bool record = true;     // a device that records passes replays them; false: it enqueues them anew each time, to compare
};

// Makes the device asked for; throws Error(deviceUnavailable) saying why it cannot be had.
std::unique_ptr<Device> makeDevice(const DeviceOptions& options);

}  // namespace lora_da
