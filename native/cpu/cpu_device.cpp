#include "cpu/cpu_device.h"

#include <cblas.h>
#include <omp.h>

#include <algorithm>

#include "core/cpu_info.h"
#include "core/device_factory.h"
#include "cpu/products.h"

namespace lora_da::cpu {

CpuDevice::CpuDevice(const DeviceOptions& options)
    : computeType_(options.computeType),
      threads_(options.threads > 0 ? options.threads : physicalCores()),
      copyBudget_(options.copyBudget),
      prepack_(options.prepack),
      kernels_(kernels()) {
  // One OpenMP team for this engine thread; oneDNN and OpenBLAS (its OpenMP build) use the same one.
  omp_set_dynamic(0);
  omp_set_num_threads(threads_);
  openblas_set_num_threads(threads_);
  products_ = std::make_unique<Products>(
      [this](size_t bytes) { return productScratch_.reserve(*this, bytes, "matrix product workspace"); });
}

CpuDevice::~CpuDevice() = default;

// The two take turns in the same memory.
size_t CpuDevice::workspaceBytes(const StepShape& step) const {
  return std::max(headLossBytes(step.labelRows, step.vocabulary), attentionBytes(step.attention, step.rows, step.longest));
}

}  // namespace lora_da::cpu

namespace lora_da {

std::unique_ptr<Device> makeCpuDevice(const DeviceOptions& options) {
  return std::make_unique<cpu::CpuDevice>(options);
}

}  // namespace lora_da
