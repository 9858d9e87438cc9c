#include "cuda/cuda_device.h"

#include "cuda/dense.h"
#include "cuda/devices.h"
#include "cuda/products.h"
#include "cuda/uploads.h"

namespace lora_da::cuda {

// useDevice comes first: the members after name_ are made on the device that it chose.
CudaDevice::CudaDevice(const DeviceOptions& options)
    : name_(useDevice(options.device)),
      computeType_(options.computeType),
      record_(options.record),
      uploads_(std::make_unique<Uploads>(queue_)),
      products_(std::make_unique<Products>(queue_)),
      dense_(std::make_unique<Dense>(queue_, [this](size_t bytes) { return scratch(bytes); })) {}

CudaDevice::~CudaDevice() = default;

}  // namespace lora_da::cuda
