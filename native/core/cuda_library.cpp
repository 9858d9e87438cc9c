#include "core/cuda_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <system_error>
#include <vector>

#include "core/error.h"

namespace lora_da {

namespace {

namespace fs = std::filesystem;

// A major version of CUDA: the driver that it needs, and the libraries that a shared object of it is linked with, each after
// those that it needs itself.
struct CudaVersion {
  int major;
  const char* file;
  std::vector<const char*> libraries;
};

const std::vector<CudaVersion>& cudaVersions() {
  static const std::vector<CudaVersion> versions = {
      {13,
       "liblora_da_cuda13.so",
       {"libcublasLt.so.13", "libcublas.so.13", "libnvJitLink.so.13", "libcusparse.so.12", "libcusolver.so.12"}},
      {12,
       "liblora_da_cuda12.so",
       {"libcublasLt.so.12", "libcublas.so.12", "libnvJitLink.so.12", "libcusparse.so.12", "libcusolver.so.11"}},
  };
  return versions;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// The highest version of CUDA that the driver serves, as 1000 major + 10 minor; nothing where there is no driver.
std::optional<int> driverVersion() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver) return std::nullopt;
  auto* ask = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  if (!ask || ask(&version) != 0) return std::nullopt;
  return version;
}

// Folders in which the shared object may lie: that of this binary, and where cmake-js puts the add-on beside it.
std::vector<fs::path> libraryFolders() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&libraryFolders), &self) == 0 || !self.dli_fname) return {};
  std::error_code ignored;
  const fs::path folder = fs::weakly_canonical(self.dli_fname, ignored).parent_path();
  return {folder, folder / "Release"};
}

// Folders of CUDA's own libraries that the dynamic linker may not know.
std::vector<fs::path> toolkitFolders(int major) {
  std::vector<fs::path> roots;
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const std::string root = environment(name); !root.empty()) roots.push_back(root);
  }
  std::vector<fs::path> installed;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/usr/local", ignored)) {
    if (entry.path().filename().string().rfind("cuda-" + std::to_string(major), 0) == 0) installed.push_back(entry.path());
  }
  std::sort(installed.rbegin(), installed.rend());
  roots.insert(roots.end(), installed.begin(), installed.end());
  roots.insert(roots.end(), {"/usr/local/cuda", "/opt/cuda"});
  std::vector<fs::path> folders;
  for (const fs::path& root : roots) folders.insert(folders.end(), {root / "lib64", root / "lib"});
  return folders;
}

// Opens the libraries of `version` from the first folder that has its cuBLAS; what needs them later finds them open.
bool openToolkit(const CudaVersion& version) {
  std::error_code ignored;
  for (const fs::path& folder : toolkitFolders(version.major)) {
    if (!fs::exists(folder / version.libraries.front(), ignored)) continue;
    for (const char* library : version.libraries) dlopen((folder / library).c_str(), RTLD_LAZY | RTLD_LOCAL);
    return true;
  }
  return false;
}

constexpr int openMode = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;

// Null, with the linker's words in `problem`, where the file cannot be opened.
void* openFile(const std::string& path, std::string& problem) {
  void* handle = dlopen(path.c_str(), openMode);
  if (!handle) problem = dlerror();
  return handle;
}

[[noreturn]] void unavailable(const std::string& reason) {
  throw Error(code::deviceUnavailable, reason);
}

// The versions that the driver serves, the newest first; all of them where there is no driver, so that CUDA itself says so.
std::vector<CudaVersion> servedVersions() {
  const std::optional<int> driver = driverVersion();
  if (!driver) return cudaVersions();
  std::vector<CudaVersion> served;
  for (const CudaVersion& version : cudaVersions()) {
    if (*driver >= 1000 * version.major) served.push_back(version);
  }
  if (served.empty()) {
    unavailable("the NVIDIA driver is too old: it goes up to CUDA " + std::to_string(*driver / 1000) + "." +
                std::to_string(*driver % 1000 / 10) + "; driver 525 or later serves CUDA 12, 580 or later CUDA 13");
  }
  return served;
}

// The linker's words on a file that does not open, with what helps where a library of CUDA is what is missing.
std::string explained(const std::string& path, const std::string& problem) {
  const bool toolkit = problem.find("libcu") != std::string::npos || problem.find("libnvJitLink") != std::string::npos;
  return "cannot open " + path + ": " + problem +
         (toolkit ? "; cuBLAS and cuSOLVER come with NVIDIA's CUDA toolkit: install it, or set CUDA_HOME to its folder or "
                    "LD_LIBRARY_PATH to that of its libraries (PyTorch for CUDA brings them too, in site-packages/nvidia)"
                  : "");
}

// Opens the shared object at `path`, built for one of `versions`; false with the reason in `problem` where that fails.
bool tryOpen(const std::string& path, const std::vector<CudaVersion>& versions, std::string& problem) {
  std::string words;
  bool opened = openFile(path, words);
  for (auto version = versions.begin(); !opened && version != versions.end(); ++version) {
    opened = openToolkit(*version) && openFile(path, words);
  }
  if (!opened) problem = explained(path, words);
  return opened;
}

// The path of the shared object that opens.
std::string findLibrary() {
  const std::string named = environment("LORA_DA_CUDA_LIBRARY");
  std::string problem;
  if (!named.empty()) {
    if (!tryOpen(named, cudaVersions(), problem)) unavailable(problem + " (LORA_DA_CUDA_LIBRARY names it)");
    return named;
  }
  std::string sought;
  std::error_code ignored;
  const std::vector<fs::path> folders = libraryFolders();
  for (const CudaVersion& version : servedVersions()) {
    sought += (sought.empty() ? "" : " or ") + std::string(version.file);
    for (const fs::path& folder : folders) {
      const std::string path = (folder / version.file).string();
      if (fs::exists(path, ignored) && tryOpen(path, {version}, problem)) return path;
    }
  }
  if (!problem.empty()) unavailable(problem);
  unavailable("this installation has no CUDA device: there is no " + sought + " in " +
              (folders.empty() ? "the add-on's folder" : folders.front().string()) +
              " (a build on a machine with nvcc makes it, LORA_DA_CUDA_LIBRARY names one that lies elsewhere)" +
              (driverVersion() ? "" : ", and no NVIDIA driver (libcuda.so.1)"));
}

template <class Function>
Function* entryPoint(void* handle, const char* name) {
  return reinterpret_cast<Function*>(dlsym(handle, name));
}

void throwIfFailed(const PluginStatus& status) {
  if (!status.code.empty()) throw Error(status.code, status.message);
}

}  // namespace

bool CudaLibrary::worthOpening() {
  return !environment("LORA_DA_CUDA_LIBRARY").empty() || driverVersion().has_value();
}

const CudaLibrary& CudaLibrary::open() {
  static const CudaLibrary library(findLibrary());
  return library;
}

CudaLibrary::CudaLibrary(const std::string& path) {
  void* handle = dlopen(path.c_str(), openMode);  // open already: counted once more
  const auto abi = entryPoint<plugin::Abi>(handle, plugin::abiName);
  describe_ = entryPoint<plugin::Describe>(handle, plugin::describeName);
  choose_ = entryPoint<plugin::Choose>(handle, plugin::chooseName);
  make_ = entryPoint<plugin::Make>(handle, plugin::makeName);
  if (!abi || !describe_ || !choose_ || !make_) unavailable(path + " is not a CUDA device of lora-da");
  if (std::string(abi()) != LORA_DA_PLUGIN_ABI) unavailable(path + " belongs to another version of lora-da: build it anew");
}

DeviceReport CudaLibrary::describe() const {
  DeviceReport report;
  PluginStatus status;
  describe_(report, status);
  throwIfFailed(status);
  return report;
}

DeviceDescription CudaLibrary::choose(const std::string& name) const {
  DeviceDescription chosen;
  PluginStatus status;
  choose_(name, chosen, status);
  throwIfFailed(status);
  return chosen;
}

std::unique_ptr<Device> CudaLibrary::make(const DeviceOptions& options) const {
  PluginStatus status;
  std::unique_ptr<Device> device(make_(options, status));
  throwIfFailed(status);
  return device;
}

}  // namespace lora_da
