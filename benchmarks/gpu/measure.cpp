#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "core/random.h"

namespace lora_da::bench {

namespace {

// Four significant digits.
std::string rounded(double value) {
  char text[32];
  std::snprintf(text, sizeof text, std::abs(value) >= 1000 ? "%.0f" : "%.4g", value);
  return text;
}

// An odd number of elements, so that no two rows of a matrix are the same.
constexpr size_t blockElements = (size_t{1} << 20) - 3;

template <class T>
std::vector<uint8_t> bytesOf(const std::vector<float>& values, T (*convert)(float)) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    const T value = convert(values[i]);
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
  return bytes;
}

std::vector<uint8_t> randomBlock(DType type, float deviation) {
  Random random(1, "operands");
  const double bound = std::sqrt(3.0) * static_cast<double>(deviation);
  std::vector<float> values(blockElements);
  for (float& value : values) value = static_cast<float>(random.uniform(-bound, bound));
  if (type == DType::bf16) return bytesOf<uint16_t>(values, floatToBf16);
  if (type == DType::f64) return bytesOf<double>(values, [](float x) { return static_cast<double>(x); });
  return bytesOf<float>(values, [](float x) { return x; });
}

// A message in one line and one column.
std::string flat(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == '\t' || c == '\n'; }, ' ');
  return text;
}

}  // namespace

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double secondsOf(Device& device, const Repeats& repeats, const std::function<void()>& call, const std::function<void()>& reset) {
  const auto round = [&](int calls) {
    if (reset) reset();
    device.synchronize();
    const double start = now();
    for (int i = 0; i < calls; ++i) call();
    device.synchronize();
    return (now() - start) / calls;
  };
  round(1);
  const double once = round(1);
  const int calls = reset ? 1 : static_cast<int>(std::clamp(repeats.roundSeconds / once, 1.0, 1000.0));
  std::vector<double> times;
  for (int i = 0; i < repeats.rounds; ++i) times.push_back(round(calls));
  return median(times);
}

void fillRandom(Device& device, const Matrix& matrix, float deviation) {
  const std::vector<uint8_t> block = randomBlock(matrix.dtype, deviation);
  const size_t total = static_cast<size_t>(matrix.rows * matrix.stride) * sizeOf(matrix.dtype);
  for (size_t first = 0; first < total; first += block.size()) {
    device.upload(matrix.as<char>() + first, block.data(), std::min(block.size(), total - first));
  }
}

Results::Results(const std::string& path) : file_(path.empty() ? nullptr : std::fopen(path.c_str(), "a")) {
  if (!path.empty() && !file_) throw std::runtime_error("cannot write " + path);
}

Results::~Results() {
  if (file_) std::fclose(file_);
}

void Results::add(const std::string& what, double value, const std::string& unit, double share, const std::string& detail) {
  line(what, rounded(value), unit, share < 0 ? "" : rounded(share), "ok", detail);
}

void Results::skip(const std::string& what, const std::string& why) {
  line(what, "", "", "", "skipped", why);
}

void Results::fail(const std::string& what, const std::string& why) {
  line(what, "", "", "", "failed", why);
}

void Results::line(const std::string& what, const std::string& value, const std::string& unit, const std::string& share,
                   const std::string& status, const std::string& detail) {
  std::printf("%-58s %10s %-9s %6s %-8s %s\n", what.c_str(), value.c_str(), unit.c_str(), share.c_str(), status.c_str(),
              flat(detail).c_str());
  std::fflush(stdout);
  if (!file_) return;
  std::fprintf(file_, "%s\t%s\t%s\t%s\t%s\t%s\n", what.c_str(), value.c_str(), unit.c_str(), share.c_str(), status.c_str(),
               flat(detail).c_str());
  std::fflush(file_);
}

Options::Options(int count, char** arguments, std::map<std::string, std::string> defaults) : values_(std::move(defaults)) {
  for (int i = 1; i < count; i += 2) {
    const auto found = values_.find(arguments[i]);
    if (found == values_.end()) throw std::invalid_argument(std::string("unknown option ") + arguments[i]);
    if (i + 1 == count) throw std::invalid_argument(std::string("expected a value for ") + arguments[i]);
    found->second = arguments[i + 1];
  }
}

int64_t Options::number(const std::string& name) const {
  return std::atoll(text(name).c_str());
}

std::vector<std::string> Options::list(const std::string& name) const {
  std::istringstream stream(text(name));
  std::vector<std::string> parts;
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

DType Options::type() const {
  const std::string& name = text("--dtype");
  for (const DType type : {DType::f32, DType::bf16}) {
    if (name == nameOf(type)) return type;
  }
  throw std::invalid_argument("expected float32 or bfloat16 for --dtype");
}

std::pair<int64_t, int64_t> pairOf(const std::string& text) {
  long long first = 0, second = 0;
  if (std::sscanf(text.c_str(), "%lldx%lld", &first, &second) != 2 || first < 1 || second < 1) {
    throw std::invalid_argument("expected two positive numbers such as 8x512, found " + text);
  }
  return {first, second};
}

}  // namespace lora_da::bench
