// What the GPU benchmarks share: medians of times, random operands, command lines, and lines of results for
// scripts/gpu_first_hour.sh.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/device.h"

namespace lora_da::bench {

// Seconds since some moment in the past.
double now();
double median(std::vector<double> values);

// Rounds of calls back to back, as many as take about `roundSeconds` together.
struct Repeats {
  int rounds = 5;
  double roundSeconds = 0.02;
};

// Median seconds of one call, after one of warm-up. With `reset`, which is not timed, each round is one call after it.
double secondsOf(Device& device, const Repeats& repeats, const std::function<void()>& call,
                 const std::function<void()>& reset = nullptr);

// Uniform numbers of this deviation and mean 0, repeating after a million. Fills the matrix's stride too.
void fillRandom(Device& device, const Matrix& matrix, float deviation = 1);

// Lines of "what, value, unit, share, status, detail", separated by tabs, at the end of a file; and the same to read on stdout.
class Results {
 public:
  explicit Results(const std::string& path);
  ~Results();
  Results(const Results&) = delete;

  // share: of a limit that `detail` or the table's text names; negative: none.
  void add(const std::string& what, double value, const std::string& unit, double share = -1, const std::string& detail = "");
  void skip(const std::string& what, const std::string& why);
  void fail(const std::string& what, const std::string& why);

 private:
  void line(const std::string& what, const std::string& value, const std::string& unit, const std::string& share,
            const std::string& status, const std::string& detail);

  std::FILE* file_;
};

// `--name value` pairs; throws std::invalid_argument naming a name that is not in `defaults`.
class Options {
 public:
  Options(int count, char** arguments, std::map<std::string, std::string> defaults);
  const std::string& text(const std::string& name) const { return values_.at(name); }
  int64_t number(const std::string& name) const;
  // Parts separated by commas.
  std::vector<std::string> list(const std::string& name) const;
  DType type() const;  // of --dtype

 private:
  std::map<std::string, std::string> values_;
};

// "8x512" as 8 and 512.
std::pair<int64_t, int64_t> pairOf(const std::string& text);

}  // namespace lora_da::bench
