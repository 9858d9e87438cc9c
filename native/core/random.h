// Seeded random numbers: xoshiro256** (Blackman & Vigna 2018), seeded by (seed, name of the stream), so that a
// module's numbers depend neither on the order of the modules nor on the platform's standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace lora_da {

class Random {
 public:
  Random(uint64_t seed, const std::string& stream) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a over the name
    for (const char c : stream) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    uint64_t counter = seed;
    counter = splitMix(counter) ^ hash;  // mixed first: seed 1, name x must not equal seed 2, another name
    for (uint64_t& word : state_) word = splitMix(counter);
  }

  uint64_t next() {
    const uint64_t result = rotate(state_[1] * 5, 7) * 9;
    const uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = rotate(state_[3], 45);
    return result;
  }

  // In [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }

  // Standard normal (Box & Muller 1958, both values used).
  double normal() {
    if (hasSpare_) {
      hasSpare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    const double angle = 6.283185307179586476925 * uniform();
    spare_ = radius * std::sin(angle);
    hasSpare_ = true;
    return radius * std::cos(angle);
  }

 private:
  static uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
  static uint64_t splitMix(uint64_t& counter) {
    uint64_t z = (counter += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_[4];
  double spare_ = 0;
  bool hasSpare_ = false;
};

}  // namespace lora_da
