// Reading and writing elements of float32 or bfloat16 as float32 numbers, `width` neighbours at a time in accesses of up to 16
// bytes. Kernels are compiled for a width that fills such accesses and for single elements; the launcher takes the wide one
// where every view allows it (readsInVectors).
#pragma once

#include <cstring>
#include <type_traits>

#include "core/device.h"
#include "cuda/launch.h"

namespace lora_da::cuda {

using Bf16 = __nv_bfloat16;

// A matrix in a kernel's parameters. `data` may be null where the operation's matrix is optional.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rowsOf(const Matrix& matrix) {
  return {matrix.as<T>(), matrix.stride};
}
template <class T>
Rows<T> rowsOf(const Matrix* optional) {
  return optional ? rowsOf<T>(*optional) : Rows<T>{nullptr, 0};
}

// Elements in 16 bytes of T.
template <class T>
inline constexpr int fullWidth = 16 / static_cast<int>(sizeof(T));

__host__ __device__ inline bool isAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}
// Whether every row can be read `width` elements at a time.
inline bool readsInVectors(const Matrix& matrix, int width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeOf(matrix.dtype));
  return matrix.cols % width == 0 && matrix.stride % width == 0 && isAligned(matrix.data, bytes < 16 ? bytes : 16);
}
inline bool readsInVectors(const Matrix* optional, int width) {
  return !optional || readsInVectors(*optional, width);
}

// call(element) with a value of the element's type, for matrices of float32 or bfloat16.
template <class Call>
void withElementType(DType type, const Call& call) {
  if (type == DType::f32) return call(float{});
  if (type == DType::bf16) return call(Bf16{});
  throw Error(code::internal, std::string("elementwise operations take float32 and bfloat16, not ") + nameOf(type));
}

namespace access {

template <int bytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint2;
};
template <>
struct Unsigned<16> {
  using type = uint4;
};

}  // namespace access

// `width` elements as they lie in memory.
template <class T, int width>
struct Packed {
  static constexpr int bytes = width * static_cast<int>(sizeof(T));
  using Word = typename access::Unsigned<(bytes < 16 ? bytes : 16)>::type;
  static constexpr int count = bytes / static_cast<int>(sizeof(Word));
  Word words[count];
};

template <int width>
struct Floats {
  float at[width];
};

// A pointer to const promises that no thread of the kernel writes there, so that reads may pass earlier writes.
template <int width, class T>
__device__ inline Packed<std::remove_const_t<T>, width> loadPacked(T* from) {
  using Result = Packed<std::remove_const_t<T>, width>;
  Result packed;
#pragma unroll
  for (int i = 0; i < Result::count; ++i) {
    const auto* word = reinterpret_cast<const typename Result::Word*>(from) + i;
    packed.words[i] = std::is_const_v<T> ? __ldg(word) : *word;
  }
  return packed;
}

template <int width>
__device__ inline Floats<width> unpack(const Packed<float, width>& packed) {
  Floats<width> values;
  std::memcpy(values.at, packed.words, sizeof values.at);
  return values;
}
template <int width>
__device__ inline Floats<width> unpack(const Packed<Bf16, width>& packed) {
  uint16_t halves[width];
  std::memcpy(halves, packed.words, sizeof halves);
  Floats<width> values;
#pragma unroll
  for (int i = 0; i < width; ++i) values.at[i] = __uint_as_float(static_cast<uint32_t>(halves[i]) << 16);
  return values;
}

template <int width, class T>
__device__ inline Floats<width> load(T* from) {
  return unpack<width>(loadPacked<width>(from));
}

// Rounded to nearest even; NaN stays NaN.
template <int width>
__device__ inline Packed<float, width> pack(const Floats<width>& values, float) {
  Packed<float, width> packed;
  std::memcpy(packed.words, values.at, sizeof values.at);
  return packed;
}
template <int width>
__device__ inline Packed<Bf16, width> pack(const Floats<width>& values, Bf16) {
  Packed<Bf16, width> packed;
  if constexpr (width == 1) {
    packed.words[0] = __bfloat16_as_ushort(__float2bfloat16_rn(values.at[0]));
  } else {
    __nv_bfloat162 pairs[width / 2];
#pragma unroll
    for (int i = 0; i < width / 2; ++i) pairs[i] = __floats2bfloat162_rn(values.at[2 * i], values.at[2 * i + 1]);
    std::memcpy(packed.words, pairs, sizeof pairs);
  }
  return packed;
}

// Past the nearest cache: what a kernel writes is read by another one. (The compiler splits some plain 16-byte writes.)
template <int width, class T>
__device__ inline void store(T* to, const Floats<width>& values) {
  const Packed<T, width> packed = pack<width>(values, T{});
#pragma unroll
  for (int i = 0; i < Packed<T, width>::count; ++i)
    __stcg(reinterpret_cast<typename Packed<T, width>::Word*>(to) + i, packed.words[i]);
}

// Elements that a thread reads twice, before and after a reduction: with `inRegisters` they are kept in between, as they lie in
// memory; else the caches serve the second time. T may be const, as for load.
template <class T, int width, bool inRegisters>
class TwiceRead {
 public:
  __device__ Floats<width> first(T* from) {
    kept_ = loadPacked<width>(from);
    return unpack<width>(kept_);
  }
  __device__ Floats<width> again(T*) const { return unpack<width>(kept_); }

 private:
  Packed<std::remove_const_t<T>, width> kept_;
};
template <class T, int width>
class TwiceRead<T, width, false> {
 public:
  __device__ Floats<width> first(T* from) { return load<width>(from); }
  __device__ Floats<width> again(T* from) const { return load<width>(from); }
};

}  // namespace lora_da::cuda
