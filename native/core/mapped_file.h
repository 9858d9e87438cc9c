// A file mapped for reading. Reading pages that are no longer there (the file was cut while mapped) raises SIGBUS, which would
// end the process: a handler puts zeros in the place of the missing page and remembers it, so that truncated() tells afterwards.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace lora_da {

class MappedFile {
 public:
  // Throws Error(ioError) when the file cannot be opened or mapped.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const char* data() const { return data_; }
  size_t size() const { return size_; }
  bool truncated() const;
  // Reads these bytes into memory and maps their pages, where the system can do both at once; else they come when touched.
  void populate(size_t offset, size_t bytes) const;
  // Tells the system that these bytes are not needed for now; they are read from the file again when touched.
  void release(size_t offset, size_t bytes) const;

 private:
  std::string path_;
  char* data_ = nullptr;
  size_t size_ = 0;
  int file_ = -1;  // kept open: its size tells whether the file was cut, even where the name now means another
  int slot_ = -1;
};

}  // namespace lora_da
