// The gradient of attention. Tasks each keep their own part of dk and dv, float32 in scratch memory, and the parts of a key head
// (one for each chunk of its queries) are then added in their order.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/attention_tasks.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

// Bound on the memory for parts of dk and dv; key heads beyond it wait for the next wave.
constexpr size_t gradPartBytes = size_t{256} << 20;

// Stands for the only task of a key head: its dk and dv need no sum.
constexpr int64_t noPart = -1;

struct Task : AttentionTask {
  int64_t part = 0;  // where its dk starts among the parts, in floats; dv follows. Or noPart
};

// The key head that tasks [firstTask, firstTask + tasks) add to.
struct KeyHead {
  int64_t firstRow = 0;
  int64_t length = 0;
  int32_t kvHead = 0;
  int64_t firstTask = 0;
  int64_t tasks = 0;
};

// How the backward pass of a batch is cut: key heads are numbered sequence by sequence, waves are ranges of them.
struct GradPlan {
  const std::vector<int32_t>& starts;  // of the sequences, and their end
  const AttentionShape& shape;

  int64_t keyHeads() const { return starts.empty() ? 0 : static_cast<int64_t>(starts.size() - 1) * shape.kvHeads; }
  KeyHead keyHead(int64_t i) const {
    const auto s = static_cast<size_t>(i / shape.kvHeads);
    return {starts[s], starts[s + 1] - starts[s], static_cast<int32_t>(i % shape.kvHeads), 0, 0};
  }
  // body(task) in the order in which their parts are added.
  template <class Body>
  void overTasksOf(const KeyHead& keyHead, const Body& body) const {
    overTasks(shape, keyHead.firstRow, keyHead.length, keyHead.kvHead, body);
  }
  bool alone(const AttentionTask& task) const { return task.queryCount == task.length; }
  // Floats of a task's dk, or dv.
  int64_t partFloats(const AttentionTask& task) const {
    return attentionKeyRows(groupOf(task, shape)) * attentionRowWidth(shape.headDim);
  }

  // dk and dv of a key head = its only task's.
  void storeKeyGrads(const Task& task, const Kernels& kernels, const float* part, const Matrix& dk, const Matrix& dv) const {
    const auto fromFloat = (dk.dtype == DType::bf16 ? kernels.bf16 : kernels.f32).fromFloat;
    const int64_t width = attentionRowWidth(shape.headDim), column = int64_t{task.kvHead} * shape.headDim;
    const float* valuePart = part + partFloats(task);
    for (int64_t i = 0; i < task.length; ++i) {
      fromFloat(part + i * width, dk.at(task.firstRow + i, column), shape.headDim);
      fromFloat(valuePart + i * width, dv.at(task.firstRow + i, column), shape.headDim);
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
      overTasksOf(keyHead(wave.end), [&](const AttentionTask& task) {
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

// A row of one key head's dk and dv: the sums of its tasks' parts, in the compute type.
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
    fromFloat(keySum, dk.at(keyHead.firstRow + i, keyHead.kvHead * headDim), headDim);
    fromFloat(valueSum, dv.at(keyHead.firstRow + i, keyHead.kvHead * headDim), headDim);
  }
};

// Scratch: a wave's key heads, its tasks in the order in which parts are added, the same sorted by cost, its parts, and each
// thread's working memory, which the task with the most keys sizes.
struct GradScratch {
  size_t keyHeadBytes = 0, taskBytes = 0, partBytes = 0, threadBytes = 0;

  size_t shared() const { return keyHeadBytes + 2 * taskBytes + partBytes; }
  size_t bytes(int threads) const { return shared() + threadBytes * static_cast<size_t>(threads); }
};

GradScratch scratchOf(const GradPlan& plan, const TypedKernels& kernels) {
  GradPlan::Wave largest;
  int64_t mostKeyHeads = 0, floats = 0;
  for (int64_t first = 0; first < plan.keyHeads();) {
    const GradPlan::Wave wave = plan.waveFrom(first);
    largest.tasks = std::max(largest.tasks, wave.tasks);
    largest.parts = std::max(largest.parts, wave.parts);
    mostKeyHeads = std::max(mostKeyHeads, wave.end - first);
    for (; first < wave.end; ++first) {
      plan.overTasksOf(plan.keyHead(first), [&](const AttentionTask& task) {
        const int64_t own = plan.alone(task) ? 2 * plan.partFloats(task) : 0;
        floats = std::max(floats, own + kernels.attentionGradScratch(groupOf(task, plan.shape)));
      });
    }
  }
  return {cacheLines(static_cast<size_t>(mostKeyHeads) * sizeof(KeyHead)),
          cacheLines(static_cast<size_t>(largest.tasks) * sizeof(Task)),
          cacheLines(static_cast<size_t>(largest.parts) * sizeof(float)),
          cacheLines(static_cast<size_t>(floats) * sizeof(float))};
}

}  // namespace

void CpuDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                              const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                              const Matrix& dk, const Matrix& dv) {
  requireAttentionShape(shape, q, k);
  const TypedKernels& kernels = typed(q.dtype);
  const GradPlan plan{sequences.hostStarts, shape};
  const GradScratch sizes = scratchOf(plan, kernels);
  char* memory = static_cast<char*>(scratch(sizes.bytes(threads_)));
  KeyHead* keyHeads = reinterpret_cast<KeyHead*>(memory);
  Task* tasks = reinterpret_cast<Task*>(memory + sizes.keyHeadBytes);
  Task* sorted = reinterpret_cast<Task*>(memory + sizes.keyHeadBytes + sizes.taskBytes);
  float* parts = reinterpret_cast<float*>(memory + sizes.keyHeadBytes + 2 * sizes.taskBytes);
  char* working = memory + sizes.shared();

  const PartSum partSum{kernels_, tasks, parts, shape.headDim};
  for (int64_t first = 0; first < plan.keyHeads();) {
    const GradPlan::Wave wave = plan.waveFrom(first);
    const int64_t keyHeadCount = wave.end - first;
    int64_t taskCount = 0, used = 0;
    for (int64_t i = 0; i < keyHeadCount; ++i) {
      keyHeads[i] = plan.keyHead(first + i);
      keyHeads[i].firstTask = taskCount;
      plan.overTasksOf(keyHeads[i], [&](const AttentionTask& task) {
        const bool alone = plan.alone(task);
        tasks[taskCount++] = {task, alone ? noPart : used};
        if (!alone) used += 2 * plan.partFloats(task);
      });
      keyHeads[i].tasks = taskCount - keyHeads[i].firstTask;
    }
    std::copy(tasks, tasks + taskCount, sorted);
    std::sort(sorted, sorted + taskCount, largerFirst);

#pragma omp parallel num_threads(threads_)
    {
      float* own = reinterpret_cast<float*>(working + sizes.threadBytes * static_cast<size_t>(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < taskCount; ++i) {
        const Task& task = sorted[i];
        const int64_t column = queryColumn(task, shape);
        const int64_t partFloats = plan.partFloats(task);
        float* part = task.part == noPart ? own : parts + task.part;
        float* scratch = task.part == noPart ? own + 2 * partFloats : own;
        kernels.attentionGroupGrad(groupOf(task, q, k, v, shape), out.at(task.firstRow, column), dout.at(task.firstRow, column),
                                   out.stride, dout.stride, lseOf(lse, task, shape), shape.heads, dq.at(task.firstRow, column),
                                   dq.stride, part, part + partFloats, scratch);
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

// With sequences that are all as long as the longest, or just too long for one task, each of which may take more than the other.
size_t CpuDevice::attentionBytes(const AttentionShape& shape, int64_t rows, int64_t longest) const {
  longest = std::max<int64_t>(longest, 1);
  size_t bytes = 0;
  for (const int64_t length : {longest, std::min(longest, attentionTask(shape, 0, longest, 0, 0).queryCount + 1)}) {
    std::vector<int32_t> starts{0};
    while (starts.back() < rows) starts.push_back(static_cast<int32_t>(std::min(starts.back() + length, rows)));
    bytes = std::max(bytes, scratchOf({starts, shape}, typed(computeType_)).bytes(threads_));
  }
  return bytes;
}

}  // namespace lora_da::cpu
