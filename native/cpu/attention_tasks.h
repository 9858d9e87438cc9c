// How attention is cut: tasks of the query heads of one key head over one sequence, long sequences in chunks of queries. Cuts
// depend on shapes and lengths alone, so results have the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/device.h"
#include "cpu/cache_lines.h"
#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

struct AttentionTask {
  int64_t firstRow = 0;  // of the sequence in the batch
  int64_t length = 0;    // of the sequence
  int64_t firstQuery = 0;
  int64_t queryCount = 0;
  int64_t firstKey = 0;
  int32_t kvHead = 0;
  int64_t cost = 0;  // scores
};

// The order in which threads take them.
bool largerFirst(const AttentionTask& a, const AttentionTask& b);

// The tasks of one key head over the rows [firstRow, firstRow + length), in the order of their queries.
AttentionTask attentionTask(const AttentionShape& shape, int64_t firstRow, int64_t length, int32_t kvHead, int64_t firstQuery);
template <class Body>
void overTasks(const AttentionShape& shape, int64_t firstRow, int64_t length, int32_t kvHead, const Body& body) {
  for (int64_t first = 0; first < length;) {
    const AttentionTask task = attentionTask(shape, firstRow, length, kvHead, first);
    body(task);
    first += task.queryCount;
  }
}

// Its sizes; and with its operands.
AttentionGroup groupOf(const AttentionTask& task, const AttentionShape& shape);
AttentionGroup groupOf(const AttentionTask& task, const Matrix& q, const Matrix& k, const Matrix& v, const AttentionShape& shape);

// The first column of a task's query heads, and their log-sums.
int64_t queryColumn(const AttentionTask& task, const AttentionShape& shape);
template <class Float>
Float* lseOf(Float* lse, const AttentionTask& task, const AttentionShape& shape) {
  return lse + task.firstRow * shape.heads + int64_t{task.kvHead} * (shape.heads / shape.kvHeads);
}

// Rows from firstRow on.
void zeroPadding(const Matrix& m, int64_t firstRow);

// Throws Error(internal).
void requireAttentionShape(const AttentionShape& shape, const Matrix& q, const Matrix& k);

}  // namespace lora_da::cpu
