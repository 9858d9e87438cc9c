// Memory that weights are copied to: blocks of huge pages, filled one weight after the other, so that small weights lie in huge
// pages too. A block lives as long as a weight in it.
#pragma once

#include <memory>
#include <string>

#include "core/device.h"
#include "cpu/cache_lines.h"

namespace lora_da::cpu {

class WeightPages {
 public:
  std::shared_ptr<char> take(Device& device, size_t bytes, const std::string& purpose) {
    const size_t rounded = cacheLines(bytes);
    if (block_ && block_.use_count() == 1) used_ = 0;
    if (!block_ || rounded > size_ - used_) {
      size_ = rounded > blockBytes ? rounded : blockBytes;
      used_ = 0;
      block_ = std::make_shared<Buffer>(device.allocate(size_, purpose));
    }
    char* place = static_cast<char*>(block_->get()) + used_;
    used_ += rounded;
    return std::shared_ptr<char>(block_, place);
  }

 private:
  static constexpr size_t blockBytes = size_t{64} << 20;  // what is not used of the last one is never touched

  std::shared_ptr<Buffer> block_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace lora_da::cpu
