#include "cpu/attention_tasks.h"

#include <cstring>

#include "core/error.h"
#include "core/integers.h"

namespace lora_da::cpu {

namespace {

// Query rows of a task, over all its heads: enough that packing a sequence's keys again for each chunk stays cheap beside its
// products.
constexpr int64_t taskRows = 768;
// Chunks of a long sequence: few, since each has its part of dk and dv.
constexpr int64_t mostChunks = 8;

// Queries of a task, whole tiles.
int64_t chunkOf(const AttentionShape& shape, int64_t length) {
  const int64_t group = shape.heads / shape.kvHeads;
  return roundUp(std::max(ceilDiv(taskRows, group), ceilDiv(length, mostChunks)), attentionTile);
}

void require(bool condition, const char* message) {
  if (!condition) throw Error(code::internal, message);
}

}  // namespace

bool largerFirst(const AttentionTask& a, const AttentionTask& b) {
  if (a.cost != b.cost) return a.cost > b.cost;
  if (a.firstRow != b.firstRow) return a.firstRow < b.firstRow;
  if (a.kvHead != b.kvHead) return a.kvHead < b.kvHead;
  return a.firstQuery < b.firstQuery;
}

AttentionTask attentionTask(const AttentionShape& shape, int64_t firstRow, int64_t length, int32_t kvHead, int64_t firstQuery) {
  AttentionTask task;
  task.firstRow = firstRow;
  task.length = length;
  task.firstQuery = firstQuery;
  task.queryCount = std::min(chunkOf(shape, length), length - firstQuery);
  const int64_t firstKey = shape.window > 0 ? std::max<int64_t>(firstQuery - shape.window + 1, 0) : 0;
  task.firstKey = firstKey / attentionTile * attentionTile;
  task.kvHead = kvHead;
  const int64_t meanKeys = firstQuery + (task.queryCount + 1) / 2;
  task.cost = task.queryCount * (shape.window > 0 ? std::min<int64_t>(meanKeys, shape.window) : meanKeys);
  return task;
}

AttentionGroup groupOf(const AttentionTask& task, const AttentionShape& shape) {
  AttentionGroup group;
  group.firstQuery = task.firstQuery;
  group.queryCount = task.queryCount;
  group.firstKey = task.firstKey;
  group.shape = shape;
  return group;
}

AttentionGroup groupOf(const AttentionTask& task, const Matrix& q, const Matrix& k, const Matrix& v,
                       const AttentionShape& shape) {
  const int64_t kvColumn = int64_t{task.kvHead} * shape.headDim;
  AttentionGroup group = groupOf(task, shape);
  group.q = q.at(task.firstRow, queryColumn(task, shape));
  group.k = k.at(task.firstRow, kvColumn);
  group.v = v.at(task.firstRow, kvColumn);
  group.qStride = q.stride;
  group.kStride = k.stride;
  group.vStride = v.stride;
  return group;
}

int64_t queryColumn(const AttentionTask& task, const AttentionShape& shape) {
  return int64_t{task.kvHead} * (shape.heads / shape.kvHeads) * shape.headDim;
}

void zeroPadding(const Matrix& m, int64_t firstRow) {
  for (int64_t i = firstRow; i < m.rows; ++i) {
    std::memset(m.at(i, 0), 0, static_cast<size_t>(m.cols) * sizeOf(m.dtype));
  }
}

void requireAttentionShape(const AttentionShape& shape, const Matrix& q, const Matrix& k) {
  require(shape.kvHeads > 0 && shape.heads % shape.kvHeads == 0,
          "attention: the number of heads is not a multiple of that of key heads");
  require(shape.headDim > 0 && shape.headDim <= maxHeadDim, "attention: unsupported head dimension");
  require(q.cols == int64_t{shape.heads} * shape.headDim && k.cols == int64_t{shape.kvHeads} * shape.headDim,
          "attention: columns differ from heads * headDim");
  require(shape.scale > 0, "attention: the scale is not positive");
  require(q.dtype == DType::f32 || q.dtype == DType::bf16, "attention takes float32 and bfloat16");
}

}  // namespace lora_da::cpu
