#include "core/memory_info.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace lora_da {

namespace {

// A number in a file of one line, or 0 ("max" included).
size_t readNumber(const char* path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : 0;
}

}  // namespace

size_t availableMemory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  size_t kilobytes = 0, available = 0;
  while (file >> key >> kilobytes) {
    std::getline(file, unit);
    if (key == "MemAvailable:") available = kilobytes * 1024;
  }
  const size_t limit = readNumber("/sys/fs/cgroup/memory.max");
  if (limit > 0) {
    const size_t used = readNumber("/sys/fs/cgroup/memory.current");
    available = std::min(available, limit > used ? limit - used : 0);
  }
  return available;
}

size_t residentMemory() {
  std::ifstream file("/proc/self/statm");
  size_t total = 0, resident = 0;
  return file >> total >> resident ? resident * static_cast<size_t>(sysconf(_SC_PAGESIZE)) : 0;
}

}  // namespace lora_da
