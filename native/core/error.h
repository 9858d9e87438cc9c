// The one exception of the native core. `code` is stable and reaches JavaScript unchanged as error.code.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

namespace lora_da {

class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message) : std::runtime_error(message), code_(std::move(code)) {}
  const std::string& code() const { return code_; }

 private:
  std::string code_;
};

// Codes used by the core.
namespace code {
inline constexpr const char* invalidArgument = "INVALID_ARGUMENT";
inline constexpr const char* invalidTensor = "INVALID_TENSOR";  // missing, extra, misshapen, wrong type
inline constexpr const char* fileTruncated = "FILE_TRUNCATED";
inline constexpr const char* ioError = "IO_ERROR";
inline constexpr const char* outOfMemory = "OUT_OF_MEMORY";
inline constexpr const char* notPositiveDefinite = "NOT_POSITIVE_DEFINITE";
inline constexpr const char* nonFinite = "NON_FINITE";
inline constexpr const char* aborted = "ABORTED";
inline constexpr const char* deviceUnavailable = "DEVICE_UNAVAILABLE";
inline constexpr const char* internal = "INTERNAL";
}  // namespace code

struct ErrorText {
  std::string code;
  std::string message;
};

// Of the exception that is being handled, for borders that none may cross. What is no std::exception is thrown on.
inline ErrorText handledError() {
  try {
    throw;
  } catch (const Error& error) {
    return {error.code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {code::outOfMemory, "the system is out of memory"};
  } catch (const std::exception& error) {
    return {code::internal, error.what()};
  }
}

}  // namespace lora_da
