// Products with frozen weights, which stay as they lie in the file, row-major [out, in]:
//   linear           y [T, out] = x [T, in] W^T + bias + down [T, k] up + residual, up block by block
//   linearInputGrad  dx [T, in] = dy [T, out] W + downGrad [T, k] a [k, in]
// The residual is what the library adds, the bias its epilogue. A LoRA term is laid beside the operands where they have room, so
// that the sum is one product, made and rounded at once:
//   y  = [x down] [W up^T]^T        dx = [dy downGrad] [W; a]
// Without room the thin product goes first and the large one adds itself to it; the bias comes with the large one, so that a
// bfloat16 result is rounded with as little in it as can be.
#include <algorithm>

#include "core/file_tensor.h"
#include "cuda/cuda_device.h"
#include "cuda/cuda_weight.h"
#include "cuda/low_rank.h"
#include "cuda/products.h"
#include "cuda/uploads.h"

namespace lora_da::cuda {

namespace {

// Bytes first .. first + count - 1 of the tensor's rows as they lie on the device, `stride` elements apart. What is between the
// rows is left as it is.
void convertPiece(const HostTensor& tensor, int64_t stride, size_t first, size_t count, DType type, char* stage) {
  const auto width = static_cast<int64_t>(sizeOf(type));
  const int64_t begin = static_cast<int64_t>(first) / width, end = begin + static_cast<int64_t>(count) / width;
  for (int64_t row = begin / stride; row * stride < end; ++row) {
    const int64_t from = std::max(begin, row * stride), to = std::min(end, row * stride + tensor.cols);
    if (from >= to) continue;
    convertFileElements(tensor, row * tensor.cols + from - row * stride, to - from, type, stage + (from - begin) * width);
  }
}

bool fitsBeside(const Matrix& lowRank, const Matrix& input, const CudaWeight& weight) {
  return roundedRank(lowRank.cols) <= std::min(input.room, weight.room);
}

}  // namespace

std::unique_ptr<Weight> CudaDevice::prepare(const std::vector<HostTensor>& parts, WeightUses uses) {
  auto weight = std::make_unique<CudaWeight>();
  weight->in = parts.front().cols;
  weight->dtype = computeType_;
  weight->room = uses.lora ? lowRankRoom() : 0;
  weight->stride = weight->in + weight->room;
  for (const HostTensor& part : parts) weight->out += part.rows;
  const int64_t rows = weight->out + (uses.inputGrad ? weight->room : 0);
  weight->bytes = static_cast<size_t>(rows * weight->stride) * sizeOf(computeType_);
  weight->memory = allocate(weight->bytes, "weight " + parts.front().name);

  char* target = weight->view().as<char>();
  for (const HostTensor& part : parts) {
    if (part.populate) part.populate();
    const size_t bytes = static_cast<size_t>(part.rows * weight->stride) * sizeOf(computeType_);
    uploads_->stream(target, bytes, [&](void* stage, size_t first, size_t count) {
      convertPiece(part, weight->stride, first, count, computeType_, static_cast<char*>(stage));
    });
    if (part.release) part.release();
    target += bytes;
  }
  return weight;
}

void CudaDevice::linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
                        const Matrix* residual, const Matrix& y) {
  const auto& w = static_cast<const CudaWeight&>(weight);
  Matrix input = x, rows = w.view();
  const Matrix* added = residual;
  const bool beside = down && fitsBeside(*down, x, w), apart = down && !beside;
  const int64_t rank = down ? roundedRank(down->cols) : 0;
  const size_t width = sizeOf(computeType_), factorBytes = apart ? static_cast<size_t>(w.out * rank) * width : 0;
  const bool roundedBias = bias && y.dtype != DType::f32;  // an epilogue's bias has the result's type
  char* memory = nullptr;
  if (apart || roundedBias) {
    memory = static_cast<char*>(scratch(factorBytes + (roundedBias ? static_cast<size_t>(y.cols) * sizeOf(y.dtype) : 0)));
  }
  const void* typedBias = bias;
  if (roundedBias) {
    typedBias = memory + factorBytes;
    convert({const_cast<float*>(bias), DType::f32, 1, y.cols, y.cols}, {memory + factorBytes, y.dtype, 1, y.cols, y.cols});
  }
  if (beside) {
    input.cols += rank;
    rows = w.with(0, rank);
    lay(queue_, *down, input.columns(x.cols, rank));
    layBlocks(queue_, *up, rows.columns(w.in, rank));
  } else if (apart) {
    const Matrix factors{memory, computeType_, w.out, rank, rank};
    layBlocks(queue_, *up, factors);
    products_->multiply({Transpose::no, *down, Transpose::yes, factors.columns(0, down->cols), 1.0f, residual, nullptr, y});
    added = &y;
  }
  products_->multiply({Transpose::no, input, Transpose::yes, rows, 1.0f, added, typedBias, y});
}

void CudaDevice::linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                                 const Matrix& dx) {
  const auto& w = static_cast<const CudaWeight&>(weight);
  Matrix input = dy, rows = w.view();
  const Matrix* added = nullptr;
  if (downGrad && fitsBeside(*downGrad, dy, w)) {
    const int64_t rank = roundedRank(downGrad->cols);
    input.cols += rank;
    rows = w.with(rank, 0);
    lay(queue_, *downGrad, input.columns(dy.cols, rank));
    lay(queue_, *a, rows.rowRange(w.out, rank));
  } else if (downGrad) {
    products_->multiply({Transpose::no, *downGrad, Transpose::no, *a, 1.0f, nullptr, nullptr, dx});
    added = &dx;
  }
  products_->multiply({Transpose::no, input, Transpose::no, rows, 1.0f, added, nullptr, dx});
}

void CudaDevice::matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                        const Matrix& c) {
  products_->multiply({ta, a, tb, b, alpha, accumulate ? &c : nullptr, nullptr, c});
}

}  // namespace lora_da::cuda
