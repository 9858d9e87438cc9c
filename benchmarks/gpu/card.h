// The limits that results are shares of.
#pragma once

#include <string>

#include "measure.h"

namespace lora_da::bench {

struct Card {
  double bandwidth = 0;    // bytes per second of a large copy on the device, read and written
  double productRate = 0;  // flops per second of a large product in the compute type
  double doubleRate = 0;   // the same in float64
  double peak = 0;         // what a share of the peak means: the vendor's dense figure where it is known, else productRate
  std::string peakSource;
};

struct CardSizes {
  int64_t copyBytes = int64_t{1} << 30;
  int64_t product = 8192, doubleProduct = 4096;  // orders of square matrices
};

Card measureCard(Device& device, const CardSizes& sizes, const Repeats& repeats);

// Dense bfloat16 flops per second with float32 sums of the cards that the vendor's data sheets give, or 0.
double publishedPeak(const std::string& deviceName);

}  // namespace lora_da::bench
