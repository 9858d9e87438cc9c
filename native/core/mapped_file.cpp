#include "core/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>

#include "core/error.h"

namespace lora_da {

namespace {

// The handler may only touch async-signal-safe state: a fixed table of address ranges in atomics.
struct Range {
  std::atomic<uintptr_t> first{0};
  std::atomic<uintptr_t> last{0};
  std::atomic<bool> truncated{false};
};

constexpr int slots = 4096;
Range ranges[slots];
std::mutex tableMutex;
struct sigaction previousAction;
const uintptr_t pageSize = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

void onBusError(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    const uintptr_t first = range.first.load();
    if (first == 0 || address < first || address >= range.last.load()) continue;
    void* page = reinterpret_cast<void*>(address / pageSize * pageSize);
    if (mmap(page, pageSize, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
    range.truncated.store(true);
    return;
  }
  // Not ours: whoever was there before decides.
  if (previousAction.sa_flags & SA_SIGINFO) {
    previousAction.sa_sigaction(signal, info, context);
  } else if (previousAction.sa_handler != SIG_DFL && previousAction.sa_handler != SIG_IGN) {
    previousAction.sa_handler(signal);
  } else {
    sigaction(SIGBUS, &previousAction, nullptr);  // the access repeats and ends the process as it would have
  }
}

int registerRange(const char* data, size_t size) {
  const std::lock_guard<std::mutex> lock(tableMutex);
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_sigaction = onBusError;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &previousAction) == 0;
  }();
  if (!installed) return -1;
  for (int slot = 0; slot < slots; ++slot) {
    if (ranges[slot].first.load() != 0) continue;
    const auto first = reinterpret_cast<uintptr_t>(data);
    ranges[slot].truncated.store(false);
    ranges[slot].last.store(first + (size + pageSize - 1) / pageSize * pageSize);
    ranges[slot].first.store(first);
    return slot;
  }
  return -1;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw Error(code::ioError, path + ": " + std::strerror(errno));
  struct stat status {};
  if (fstat(file_, &status) != 0 || status.st_size == 0) {
    const std::string reason = status.st_size == 0 ? "the file is empty" : std::strerror(errno);
    close(file_);
    throw Error(code::ioError, path + ": " + reason);
  }
  size_ = static_cast<size_t>(status.st_size);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_, 0);
  if (mapped == MAP_FAILED) {
    const std::string reason = std::strerror(errno);
    close(file_);
    throw Error(code::ioError, path + ": cannot be mapped: " + reason);
  }
  data_ = static_cast<char*>(mapped);
  slot_ = registerRange(data_, size_);
  if (slot_ < 0) {
    munmap(data_, size_);
    close(file_);
    throw Error(code::ioError, path + ": too many files are mapped at once");
  }
}

MappedFile::~MappedFile() {
  ranges[slot_].first.store(0);
  munmap(data_, size_);
  close(file_);
}

bool MappedFile::truncated() const {
  struct stat status {};
  return ranges[slot_].truncated.load() || (fstat(file_, &status) == 0 && static_cast<size_t>(status.st_size) < size_);
}

void MappedFile::populate(size_t offset, size_t bytes) const {
#ifdef MADV_POPULATE_READ
  const uintptr_t base = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t first = (base + offset) / pageSize * pageSize;
  madvise(reinterpret_cast<void*>(first), base + offset + bytes - first, MADV_POPULATE_READ);  // fails where the file was cut
#endif
}

void MappedFile::release(size_t offset, size_t bytes) const {
  const uintptr_t base = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t first = (base + offset + pageSize - 1) / pageSize * pageSize;
  const uintptr_t last = (base + offset + bytes) / pageSize * pageSize;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace lora_da
