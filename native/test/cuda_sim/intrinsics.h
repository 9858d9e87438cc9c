// Arithmetic, bit and atomic intrinsics. Fibers give up the processor only where they wait, so plain operations are atomic.
#pragma once

#include <math.h>  // the overloads for float in the global namespace

#include <cmath>
#include <cstdint>
#include <cstring>

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

namespace cuda_sim {

template <class T>
struct Plain {
  using type = T;
};
// A parameter that is converted to the type of the others and does not take part in deducing it.
template <class T>
using Same = typename Plain<T>::type;

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class T>
T exchange(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

}  // namespace cuda_sim

template <class T>
T atomicAdd(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address + value);
}
template <class T>
T atomicSub(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address - value);
}
template <class T>
T atomicMax(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address < value ? value : *address);
}
template <class T>
T atomicMin(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, value < *address ? value : *address);
}
template <class T>
T atomicExch(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, value);
}
template <class T>
T atomicOr(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address | value);
}
template <class T>
T atomicAnd(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address & value);
}
template <class T>
T atomicXor(T* address, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address ^ value);
}
template <class T>
T atomicCAS(T* address, cuda_sim::Same<T> expected, cuda_sim::Same<T> value) {
  return cuda_sim::exchange<T>(address, *address == expected ? value : *address);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return cuda_sim::exchange(address, *address >= limit ? 0u : *address + 1u);
}

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __popcll(unsigned long long value) {
  return __builtin_popcountll(value);
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __ffsll(long long value) {
  return __builtin_ffsll(value);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}

inline int __float_as_int(float value) {
  return cuda_sim::bits<int>(value);
}
inline unsigned __float_as_uint(float value) {
  return cuda_sim::bits<unsigned>(value);
}
inline float __int_as_float(int value) {
  return cuda_sim::bits<float>(value);
}
inline float __uint_as_float(unsigned value) {
  return cuda_sim::bits<float>(value);
}
inline long long __double_as_longlong(double value) {
  return cuda_sim::bits<long long>(value);
}
inline double __longlong_as_double(long long value) {
  return cuda_sim::bits<double>(value);
}

inline int __float2int_rn(float value) {
  return static_cast<int>(std::nearbyint(value));
}
inline int __float2int_rz(float value) {
  return static_cast<int>(value);
}
inline float __int2float_rn(int value) {
  return static_cast<float>(value);
}
inline float __uint2float_rn(unsigned value) {
  return static_cast<float>(value);
}
inline float __double2float_rn(double value) {
  return static_cast<float>(value);
}

inline float __expf(float x) {
  return std::exp(x);
}
inline float __exp10f(float x) {
  return std::pow(10.0f, x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __log10f(float x) {
  return std::log10(x);
}
inline float __sinf(float x) {
  return std::sin(x);
}
inline float __cosf(float x) {
  return std::cos(x);
}
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}
inline float __powf(float x, float y) {
  return std::pow(x, y);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __fdiv_rn(float x, float y) {
  return x / y;
}
inline float __fadd_rn(float x, float y) {
  return x + y;
}
inline float __fsub_rn(float x, float y) {
  return x - y;
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fmaf_rn(float x, float y, float z) {
  return std::fma(x, y, z);
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline double __dadd_rn(double x, double y) {
  return x + y;
}
inline double __dmul_rn(double x, double y) {
  return x * y;
}
inline double __fma_rn(double x, double y, double z) {
  return std::fma(x, y, z);
}
inline float rsqrtf(float x) {
  return __frsqrt_rn(x);
}
inline float rsqrt(float x) {
  return __frsqrt_rn(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
// A NaN becomes 0.
inline float __saturatef(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

// As CUDA's: on floating-point values NaN gives way to the other operand.
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a < b ? b : a;
}
inline unsigned min(unsigned a, unsigned b) {
  return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
  return a < b ? b : a;
}
inline unsigned min(int a, unsigned b) {
  return min(static_cast<unsigned>(a), b);
}
inline unsigned max(int a, unsigned b) {
  return max(static_cast<unsigned>(a), b);
}
inline unsigned min(unsigned a, int b) {
  return min(a, static_cast<unsigned>(b));
}
inline unsigned max(unsigned a, int b) {
  return max(a, static_cast<unsigned>(b));
}
inline long min(long a, long b) {
  return a < b ? a : b;
}
inline long max(long a, long b) {
  return a < b ? b : a;
}
inline unsigned long min(unsigned long a, unsigned long b) {
  return a < b ? a : b;
}
inline unsigned long max(unsigned long a, unsigned long b) {
  return a < b ? b : a;
}
inline long long min(long long a, long long b) {
  return a < b ? a : b;
}
inline long long max(long long a, long long b) {
  return a < b ? b : a;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
  return a < b ? a : b;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
  return a < b ? b : a;
}
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
inline double min(float a, double b) {
  return std::fmin(static_cast<double>(a), b);
}
inline double max(float a, double b) {
  return std::fmax(static_cast<double>(a), b);
}
inline double min(double a, float b) {
  return std::fmin(a, static_cast<double>(b));
}
inline double max(double a, float b) {
  return std::fmax(a, static_cast<double>(b));
}
