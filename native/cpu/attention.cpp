// Attention of the CPU device: tasks of the query heads of one key head over one sequence, long sequences in chunks of queries,
// the largest first.
//
// Forward tasks are independent. Backward tasks each keep their own part of dk and dv, float32 in scratch memory, and the parts
// of a key head (one for each chunk) are then added in their order. How work is cut depends on shapes and lengths alone, so
// results have the same bits for any number of threads.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/integers.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// Query rows of a task, over all its heads: enough that packing a sequence's keys again for each chunk stays cheap beside its
// products.
constexpr int64_t taskRows = 768;
// Chunks of a long sequence: few, since each has its part of dk and dv.
constexpr int64_t mostChunks = 8;
// Bound on the memory for parts of dk and dv; key heads beyond it wait for the next wave.
constexpr size_t gradPartBytes = size_t{256} << 20;

// Decoding: rows of a part, at least.
constexpr int64_t cachedPartRows = 64;

// Stands for the only task of a key head: its dk and dv need no sum.
constexpr int64_t noPart = -1;

struct Task {
  int64_t firstRow = 0;  // of the sequence in the batch
  int64_t length = 0;    // of the sequence
  int64_t firstQuery = 0;
  int64_t queryCount = 0;
  int64_t firstKey = 0;
  int32_t kvHead = 0;
  int64_t part = 0;  // backward: where its dk starts among the parts, in floats; dv follows. Or noPart
  int64_t cost = 0;  // scores
};

// The key head that tasks [firstTask, firstTask + tasks) add to.
struct KeyHead {
  int64_t firstRow = 0;
  int64_t length = 0;
  int32_t kvHead = 0;
  int64_t firstTask = 0;
  int64_t tasks = 0;
};

// Queries of a task, whole tiles.
int64_t chunkOf(const AttentionShape& shape, int64_t length) {
  const int64_t group = shape.heads / shape.kvHeads;
  const int64_t queries = std::max((taskRows + group - 1) / group, (length + mostChunks - 1) / mostChunks);
  return (queries + attentionTile - 1) / attentionTile * attentionTile;
}

Task makeTask(const AttentionShape& shape, int64_t firstRow, int64_t length, int64_t firstQuery, int64_t chunk, int32_t kvHead) {
  Task task;
  task.firstRow = firstRow;
  task.length = length;
  task.firstQuery = firstQuery;
  task.queryCount = std::min(chunk, length - firstQuery);
  const int64_t firstKey = shape.window > 0 ? std::max<int64_t>(firstQuery - shape.window + 1, 0) : 0;
  task.firstKey = firstKey / attentionTile * attentionTile;
  task.kvHead = kvHead;
  const int64_t meanKeys = firstQuery + (task.queryCount + 1) / 2;
  task.cost = task.queryCount * (shape.window > 0 ? std::min<int64_t>(meanKeys, shape.window) : meanKeys);
  return task;
}

bool largerFirst(const Task& a, const Task& b) {
  if (a.cost != b.cost) return a.cost > b.cost;
  if (a.firstRow != b.firstRow) return a.firstRow < b.firstRow;
  if (a.kvHead != b.kvHead) return a.kvHead < b.kvHead;
  return a.firstQuery < b.firstQuery;
}

char* at(const Matrix& m, int64_t row, int64_t col) {
  return m.as<char>() + (row * m.stride + col) * static_cast<int64_t>(sizeOf(m.dtype));
}

// The first column of a task's query heads.
int64_t queryColumn(const Task& task, const AttentionShape& shape) {
  return int64_t{task.kvHead} * (shape.heads / shape.kvHeads) * shape.headDim;
}

template <class Float>
Float* lseOf(Float* lse, const Task& task, const AttentionShape& shape) {
  return lse + task.firstRow * shape.heads + int64_t{task.kvHead} * (shape.heads / shape.kvHeads);
}

AttentionGroup groupOf(const Task& task, const Matrix& q, const Matrix& k, const Matrix& v, const AttentionShape& shape) {
  const int64_t kvColumn = int64_t{task.kvHead} * shape.headDim;
  AttentionGroup group;
  group.q = at(q, task.firstRow, queryColumn(task, shape));
  group.k = at(k, task.firstRow, kvColumn);
  group.v = at(v, task.firstRow, kvColumn);
  group.qStride = q.stride;
  group.kStride = k.stride;
  group.vStride = v.stride;
  group.firstQuery = task.firstQuery;
  group.queryCount = task.queryCount;
  group.firstKey = task.firstKey;
  group.shape = shape;
  return group;
}

void zeroPadding(const Matrix& m, int64_t firstRow) {
  for (int64_t i = firstRow; i < m.rows; ++i) std::memset(at(m, i, 0), 0, static_cast<size_t>(m.cols) * sizeOf(m.dtype));
}

void require(bool condition, const char* message) {
  if (!condition) throw Error(code::internal, message);
}

void requireShape(const AttentionShape& shape, const Matrix& q, const Matrix& k) {
  require(shape.kvHeads > 0 && shape.heads % shape.kvHeads == 0,
          "attention: the number of heads is not a multiple of that of key heads");
  require(shape.headDim > 0 && shape.headDim <= maxHeadDim, "attention: unsupported head dimension");
  require(q.cols == int64_t{shape.heads} * shape.headDim && k.cols == int64_t{shape.kvHeads} * shape.headDim,
          "attention: columns differ from heads * headDim");
  require(shape.scale > 0, "attention: the scale is not positive");
  require(q.dtype == DType::f32 || q.dtype == DType::bf16, "attention takes float32 and bfloat16");
}

constexpr size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

void CpuDevice::attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                          const AttentionShape& shape, const Matrix& out, float* lse) {
  requireShape(shape, q, k);
  const TypedKernels& kernels = typed(q.dtype);
  const std::vector<int32_t>& starts = sequences.hostStarts;

  // Scratch: the tasks, then each thread's working memory, which the task with the most keys sizes.
  const auto overTasks = [&](auto&& body) {
    for (int32_t s = 0; s < sequences.count(); ++s) {
      const int64_t length = starts[s + 1] - starts[s], chunk = chunkOf(shape, length);
      for (int64_t first = 0; first < length; first += chunk) {
        for (int32_t h = 0; h < shape.kvHeads; ++h) body(makeTask(shape, starts[s], length, first, chunk, h));
      }
    }
  };
  int64_t taskCount = 0, floats = 0;
  overTasks([&](const Task& task) {
    ++taskCount;
    floats = std::max(floats, kernels.attentionScratch(groupOf(task, q, k, v, shape)));
  });
  const size_t taskBytes = aligned(static_cast<size_t>(taskCount) * sizeof(Task));
  const size_t threadBytes = aligned(static_cast<size_t>(floats) * sizeof(float));
  char* memory = static_cast<char*>(scratch(taskBytes + threadBytes * static_cast<size_t>(threads_)));
  Task* tasks = reinterpret_cast<Task*>(memory);
  Task* next = tasks;
  overTasks([&](const Task& task) { *next++ = task; });
  std::sort(tasks, tasks + taskCount, largerFirst);

#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
  for (int64_t i = 0; i < taskCount; ++i) {
    const Task& task = tasks[i];
    float* own = reinterpret_cast<float*>(memory + taskBytes + threadBytes * static_cast<size_t>(omp_get_thread_num()));
    kernels.attentionGroup(groupOf(task, q, k, v, shape), at(out, task.firstRow, queryColumn(task, shape)), out.stride,
                           lseOf(lse, task, shape), shape.heads, own);
  }

  const int64_t padding = starts.empty() ? 0 : starts.back();
  zeroPadding(out, padding);
  std::fill(lse + padding * shape.heads, lse + q.rows * shape.heads, 0.0f);
}

namespace {

// How the backward pass of a batch is cut: key heads are numbered sequence by sequence, waves are ranges of them.
struct GradPlan {
  const Matrix& q;
  const Matrix& k;
  const Matrix& v;
  const Sequences& sequences;
  const AttentionShape& shape;

  int64_t keyHeads() const { return int64_t{sequences.count()} * shape.kvHeads; }
  KeyHead keyHead(int64_t i) const {
    const int64_t s = i / shape.kvHeads;
    const int64_t start = sequences.hostStarts[s];
    return {start, sequences.hostStarts[s + 1] - start, static_cast<int32_t>(i % shape.kvHeads), 0, 0};
  }
  // body(task) for the tasks of a key head in the order in which their parts are added.
  template <class Body>
  void overTasks(const KeyHead& keyHead, const Body& body) const {
    const int64_t chunk = chunkOf(shape, keyHead.length);
    for (int64_t first = 0; first < keyHead.length; first += chunk) {
      body(makeTask(shape, keyHead.firstRow, keyHead.length, first, chunk, keyHead.kvHead));
    }
  }
  AttentionGroup group(const Task& task) const { return groupOf(task, q, k, v, shape); }
  bool alone(const Task& task) const { return task.queryCount == task.length; }
  // Floats of a task's dk, or dv.
  int64_t partFloats(const Task& task) const { return attentionKeyRows(group(task)) * attentionRowWidth(shape.headDim); }

  // dk and dv of a key head = its only task's.
  void storeKeyGrads(const Task& task, const Kernels& kernels, const float* part, const Matrix& dk, const Matrix& dv) const {
    const auto fromFloat = (dk.dtype == DType::bf16 ? kernels.bf16 : kernels.f32).fromFloat;
    const int64_t width = attentionRowWidth(shape.headDim), column = int64_t{task.kvHead} * shape.headDim;
    const float* valuePart = part + partFloats(task);
    for (int64_t i = 0; i < task.length; ++i) {
      fromFloat(part + i * width, at(dk, task.firstRow + i, column), shape.headDim);
      fromFloat(valuePart + i * width, at(dv, task.firstRow + i, column), shape.headDim);
    }
  }

  struct Wave {
    int64_t end = 0;  // of its key heads
    int64_t tasks = 0;
    int64_t parts = 0;  // floats
  };
  Wave waveFrom(int64_t first) const {
    Wave wave{first, 0, 0};
    for (; wave.end < keyHeads(); ++wave.end) {
      int64_t tasks = 0, parts = 0;
      overTasks(keyHead(wave.end), [&](const Task& task) {
        ++tasks;
        if (!alone(task)) parts += 2 * partFloats(task);
      });
      if (wave.tasks > 0 && static_cast<size_t>(wave.parts + parts) * sizeof(float) > gradPartBytes) break;
      wave.tasks += tasks;
      wave.parts += parts;
    }
    return wave;
  }
};

// Rows [first, first + rows) of one key head's dk, or dv where `second`: the sum of its tasks' parts, in the compute type.
struct PartSum {
  const Kernels& kernels;
  const Task* tasks;
  const float* parts;
  int64_t headDim;

  void row(const KeyHead& keyHead, int64_t i, const GradPlan& plan, const Matrix& dk, const Matrix& dv) const {
    const int64_t width = attentionRowWidth(static_cast<int32_t>(headDim));
    const auto fromFloat = (dk.dtype == DType::bf16 ? kernels.bf16 : kernels.f32).fromFloat;
    float keySum[maxHeadDim], valueSum[maxHeadDim];
    std::fill(keySum, keySum + headDim, 0.0f);
    std::fill(valueSum, valueSum + headDim, 0.0f);
    for (int64_t t = keyHead.firstTask; t < keyHead.firstTask + keyHead.tasks; ++t) {
      const Task& task = tasks[t];
      if (i < task.firstKey || i >= task.firstQuery + task.queryCount) continue;
      const float* part = parts + task.part + (i - task.firstKey) * width;
      kernels.addRow(part, keySum, headDim);
      kernels.addRow(part + plan.partFloats(task), valueSum, headDim);
    }
    fromFloat(keySum, at(dk, keyHead.firstRow + i, keyHead.kvHead * headDim), headDim);
    fromFloat(valueSum, at(dv, keyHead.firstRow + i, keyHead.kvHead * headDim), headDim);
  }
};

}  // namespace

void CpuDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                              const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                              const Matrix& dk, const Matrix& dv) {
  requireShape(shape, q, k);
  const TypedKernels& kernels = typed(q.dtype);
  const GradPlan plan{q, k, v, sequences, shape};

  // Scratch: a wave's key heads, its tasks in the order in which parts are added, the same sorted by cost, its parts, and each
  // thread's working memory, which the task with the most keys sizes.
  GradPlan::Wave largest;
  int64_t mostKeyHeads = 0, floats = 0;
  for (int64_t first = 0; first < plan.keyHeads();) {
    const GradPlan::Wave wave = plan.waveFrom(first);
    largest.tasks = std::max(largest.tasks, wave.tasks);
    largest.parts = std::max(largest.parts, wave.parts);
    mostKeyHeads = std::max(mostKeyHeads, wave.end - first);
    for (; first < wave.end; ++first) {
      plan.overTasks(plan.keyHead(first), [&](const Task& task) {
        const int64_t own = plan.alone(task) ? 2 * plan.partFloats(task) : 0;
        floats = std::max(floats, own + kernels.attentionGradScratch(plan.group(task)));
      });
    }
  }
  const size_t keyHeadBytes = aligned(static_cast<size_t>(mostKeyHeads) * sizeof(KeyHead));
  const size_t taskBytes = aligned(static_cast<size_t>(largest.tasks) * sizeof(Task));
  const size_t partBytes = aligned(static_cast<size_t>(largest.parts) * sizeof(float));
  const size_t threadBytes = aligned(static_cast<size_t>(floats) * sizeof(float));
  char* memory =
      static_cast<char*>(scratch(keyHeadBytes + 2 * taskBytes + partBytes + threadBytes * static_cast<size_t>(threads_)));
  KeyHead* keyHeads = reinterpret_cast<KeyHead*>(memory);
  Task* tasks = reinterpret_cast<Task*>(memory + keyHeadBytes);
  Task* sorted = reinterpret_cast<Task*>(memory + keyHeadBytes + taskBytes);
  float* parts = reinterpret_cast<float*>(memory + keyHeadBytes + 2 * taskBytes);
  char* working = memory + keyHeadBytes + 2 * taskBytes + partBytes;

  const PartSum partSum{kernels_, tasks, parts, shape.headDim};
  for (int64_t first = 0; first < plan.keyHeads();) {
    const GradPlan::Wave wave = plan.waveFrom(first);
    const int64_t keyHeadCount = wave.end - first;
    int64_t taskCount = 0, used = 0;
    for (int64_t i = 0; i < keyHeadCount; ++i) {
      keyHeads[i] = plan.keyHead(first + i);
      keyHeads[i].firstTask = taskCount;
      plan.overTasks(keyHeads[i], [&](Task task) {
        task.part = plan.alone(task) ? noPart : used;
        if (task.part != noPart) used += 2 * plan.partFloats(task);
        tasks[taskCount++] = task;
      });
      keyHeads[i].tasks = taskCount - keyHeads[i].firstTask;
    }
    std::copy(tasks, tasks + taskCount, sorted);
    std::sort(sorted, sorted + taskCount, largerFirst);

#pragma omp parallel num_threads(threads_)
    {
      float* own = reinterpret_cast<float*>(working + threadBytes * static_cast<size_t>(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < taskCount; ++i) {
        const Task& task = sorted[i];
        const int64_t column = queryColumn(task, shape);
        const int64_t partFloats = plan.partFloats(task);
        float* part = task.part == noPart ? own : parts + task.part;
        float* scratch = task.part == noPart ? own + 2 * partFloats : own;
        kernels.attentionGroupGrad(plan.group(task), at(out, task.firstRow, column), at(dout, task.firstRow, column), out.stride,
                                   dout.stride, lseOf(lse, task, shape), shape.heads, at(dq, task.firstRow, column), dq.stride,
                                   part, part + partFloats, scratch);
        if (task.part == noPart) plan.storeKeyGrads(task, kernels_, part, dk, dv);
      }
      for (int64_t i = 0; i < keyHeadCount; ++i) {
        if (keyHeads[i].tasks == 1) continue;
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < keyHeads[i].length; ++row) partSum.row(keyHeads[i], row, plan, dk, dv);
      }
    }
    first = wave.end;
  }

  const int64_t padding = sequences.hostStarts.empty() ? 0 : sequences.hostStarts.back();
  zeroPadding(dq, padding);
  zeroPadding(dk, padding);
  zeroPadding(dv, padding);
}

void CpuDevice::attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                                const Matrix& out) {
  requireShape(shape, q, keys);
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
      attention.q = at(q, 0, kvHead * group * shape.headDim);
      attention.keys = at(keys, row, kvHead * shape.headDim);
      attention.values = at(values, row, kvHead * shape.headDim);
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
      kernels.mergeCached(results + head * floats, parts, shape.heads * floats, shape.headDim, at(out, 0, head * shape.headDim));
    }
  }
}

}  // namespace lora_da::cpu
