// Attention of the CPU device, forward and over a cache; its gradient is in attention_grad.cpp.
#include <omp.h>

#include <algorithm>

#include "core/error.h"
#include "core/integers.h"
#include "cpu/attention_tasks.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// Decoding: about the rows of a part, at least.
constexpr int64_t cachedPartRows = 64;

}  // namespace

void CpuDevice::attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                          const AttentionShape& shape, const Matrix& out, float* lse) {
  requireAttentionShape(shape, q, k);
  const TypedKernels& kernels = typed(q.dtype);
  const std::vector<int32_t>& starts = sequences.hostStarts;

  // Scratch: the tasks, then each thread's working memory, which the task with the most keys sizes.
  const auto overAll = [&](auto&& body) {
    for (int32_t s = 0; s < sequences.count(); ++s) {
      for (int32_t h = 0; h < shape.kvHeads; ++h) overTasks(shape, starts[s], starts[s + 1] - starts[s], h, body);
    }
  };
  int64_t taskCount = 0, floats = 0;
  overAll([&](const AttentionTask& task) {
    ++taskCount;
    floats = std::max(floats, kernels.attentionScratch(groupOf(task, shape)));
  });
  const size_t taskBytes = cacheLines(static_cast<size_t>(taskCount) * sizeof(AttentionTask));
  const size_t threadBytes = cacheLines(static_cast<size_t>(floats) * sizeof(float));
  char* memory = static_cast<char*>(scratch(taskBytes + threadBytes * static_cast<size_t>(threads_)));
  AttentionTask* tasks = reinterpret_cast<AttentionTask*>(memory);
  AttentionTask* next = tasks;
  overAll([&](const AttentionTask& task) { *next++ = task; });
  std::sort(tasks, tasks + taskCount, largerFirst);

#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
  for (int64_t i = 0; i < taskCount; ++i) {
    const AttentionTask& task = tasks[i];
    float* own = reinterpret_cast<float*>(memory + taskBytes + threadBytes * static_cast<size_t>(omp_get_thread_num()));
    kernels.attentionGroup(groupOf(task, q, k, v, shape), out.at(task.firstRow, queryColumn(task, shape)), out.stride,
                           lseOf(lse, task, shape), shape.heads, own);
  }

  const int64_t padding = starts.empty() ? 0 : starts.back();
  zeroPadding(out, padding);
  std::fill(lse + padding * shape.heads, lse + q.rows * shape.heads, 0.0f);
}

void CpuDevice::attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                                const Matrix& out) {
  requireAttentionShape(shape, q, keys);
  if (keys.rows < 1) throw Error(code::internal, "attention over an empty cache");
  const TypedKernels& kernels = typed(q.dtype);
  const int64_t first = shape.window > 0 ? std::max<int64_t>(keys.rows - shape.window, 0) : 0, count = keys.rows - first;
  // The same cuts for any number of threads, so that sums are. Neighbouring items are key heads of the same rows.
  const int64_t partRows = roundUp(ceilDiv(count, std::clamp<int64_t>(count / cachedPartRows, 1, mostCachedParts)), 16);
  const int64_t parts = ceilDiv(count, partRows);
  const int64_t group = shape.heads / shape.kvHeads, floats = cachedPartFloats(shape.headDim);
  float* results = static_cast<float*>(scratch(static_cast<size_t>(parts * shape.heads * floats) * sizeof(float)));
#pragma omp parallel num_threads(threads_)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < parts * shape.kvHeads; ++item) {
      const int64_t part = item / shape.kvHeads, kvHead = item % shape.kvHeads, row = first + part * partRows;
      CachedAttention attention;
      attention.q = q.at(0, kvHead * group * shape.headDim);
      attention.keys = keys.at(row, kvHead * shape.headDim);
      attention.values = values.at(row, kvHead * shape.headDim);
      attention.keyStride = keys.stride;
      attention.valueStride = values.stride;
      attention.rows = std::min(partRows, keys.rows - row);
      attention.queries = group;
      attention.headDim = shape.headDim;
      attention.scale = shape.scale;
      kernels.attentionCachedPart(attention, results + (part * shape.heads + kvHead * group) * floats);
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < shape.heads; ++head) {
      kernels.mergeCached(results + head * floats, parts, shape.heads * floats, shape.headDim, out.at(0, head * shape.headDim));
    }
  }
}

}  // namespace lora_da::cpu
