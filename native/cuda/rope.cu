// Rotary position embedding of q or k [T, heads * headDim], after an optional RMSNorm of each head (Qwen3).
// forward:   n = x rstd weight (or x);  with c, s of the row's position: (a, b) = elements (i, i + pairs) of n become
//            (a c - b s, b c + a s); elements from 2 pairs on stay as they are
// backward:  d, in place: turned back; then through the norm: with g = d weight: rstd (g - x rstd^2 mean(g x))
//
// A head is shared by a team of lanes, each with some vectors of its pairs and of its rest. A thread goes through several heads
// of a row, so that it reads the position's angles once.
#include <algorithm>

#include "cuda/cuda_device.h"
#include "cuda/reduction.h"
#include "cuda/row_grid.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

namespace {

constexpr int ropeThreads = 256;

struct Heads {
  int32_t count;
  int32_t dim;
  int32_t pairs;
  float epsilon;
  const float* weight;  // [dim]; null: no norm
  const float* cos;     // [positions, pairs]
  const float* sin;
};

// threadIdx: x the member of a team, y its place among a row's teams, z the row.
struct Team {
  int64_t row = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  int member = static_cast<int>(threadIdx.x);
  int lanes = static_cast<int>(blockDim.x);

  __device__ float sum(float value) const {
    const unsigned before = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x % warpThreads;
    return sumOfLanes(value, lanes, (allLanes >> (warpThreads - lanes)) << before);
  }
};

// In vectors a lane has at most one of the pairs and one of the rest, kept in registers; else it has any number of elements.
template <int width>
inline constexpr bool oneVector = width > 1;

// body(i) for each vector of a member's among the elements [first, end).
template <int width, class Body>
__device__ inline void overElements(const Team& team, int first, int end, const Body& body) {
  if constexpr (oneVector<width>) {
    if (first + team.member * width < end) body(first + team.member * width);
  } else {
#pragma unroll 1
    for (int i = first + team.member; i < end; i += team.lanes) body(i);
  }
}

// The angles of a row's position.
template <int width>
class Angles {
 public:
  __device__ Angles(const Heads& heads, const Team& team, int64_t position)
      : cosRow_(heads.cos + position * heads.pairs), sinRow_(heads.sin + position * heads.pairs) {
    if constexpr (oneVector<width>) {
      overElements<width>(team, 0, heads.pairs, [&](int i) {
        cos_.first(cosRow_ + i);
        sin_.first(sinRow_ + i);
      });
    }
  }
  // (a, b) at pair i turned by the angle, or back with direction -1.
  __device__ void turn(Floats<width>& a, Floats<width>& b, int i, float direction) const {
    const Floats<width> c = cos_.again(cosRow_ + i), s = sin_.again(sinRow_ + i);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const float first = a.at[e], second = b.at[e], sine = direction * s.at[e];
      a.at[e] = first * c.at[e] - second * sine;
      b.at[e] = second * c.at[e] + first * sine;
    }
  }

 private:
  const float* cosRow_;
  const float* sinRow_;
  TwiceRead<const float, width, oneVector<width>> cos_, sin_;
};

template <int width>
__device__ inline float dot(const Floats<width>& a, const Floats<width>& b) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < width; ++e) sum += a.at[e] * b.at[e];
  return sum;
}

template <int width>
__device__ inline Floats<width> scaled(Floats<width> a, float scale, const Floats<width>& b) {
#pragma unroll
  for (int e = 0; e < width; ++e) a.at[e] *= scale * b.at[e];
  return a;
}

// What is read in place is not const.
template <class T, bool normed>
using RopeInput = std::conditional_t<normed, const T, T>;

template <class T, int width, bool normed>
__global__ void __launch_bounds__(ropeThreads)
    ropeKernel(Rows<RopeInput<T, normed>> in, Heads heads, const int32_t* positions, Rows<T> out, float* rstd, int64_t rows) {
  const Team team;
  if (team.row >= rows) return;
  const Angles<width> angles(heads, team, positions[team.row]);
  const int pairs = heads.pairs, turned = 2 * heads.pairs;
  for (int head = static_cast<int>(threadIdx.y); head < heads.count; head += static_cast<int>(blockDim.y)) {
    auto* x = in[team.row] + int64_t{head} * heads.dim;
    T* y = out[team.row] + int64_t{head} * heads.dim;
    TwiceRead<RopeInput<T, normed>, width, oneVector<width>> a, b, rest;
    float scale = 1;
    if constexpr (normed) {
      float squares = 0;
      overElements<width>(team, 0, pairs, [&](int i) {
        const Floats<width> first = a.first(x + i), second = b.first(x + i + pairs);
        squares += dot(first, first) + dot(second, second);
      });
      overElements<width>(team, turned, heads.dim, [&](int i) {
        const Floats<width> v = rest.first(x + i);
        squares += dot(v, v);
      });
      scale = 1.0f / sqrtf(team.sum(squares) / static_cast<float>(heads.dim) + heads.epsilon);
      if (team.member == 0) rstd[team.row * heads.count + head] = scale;
    }
    const auto normalized = [&](auto& read, int i) {
      if constexpr (normed)
        return scaled(read.again(x + i), scale, load<width>(heads.weight + i));
      else
        return read.first(x + i);
    };
    overElements<width>(team, 0, pairs, [&](int i) {
      Floats<width> first = normalized(a, i), second = normalized(b, i + pairs);
      angles.turn(first, second, i, 1.0f);
      store<width>(y + i, first);
      store<width>(y + i + pairs, second);
    });
    overElements<width>(team, turned, heads.dim, [&](int i) { store<width>(y + i, normalized(rest, i)); });
  }
}

// Without a norm only the pairs change.
template <class T, int width>
__global__ void __launch_bounds__(ropeThreads, 4) ropeGradKernel(Rows<T> d, Heads heads, const int32_t* positions, int64_t rows) {
  const Team team;
  if (team.row >= rows) return;
  const Angles<width> angles(heads, team, positions[team.row]);
  for (int head = static_cast<int>(threadIdx.y); head < heads.count; head += static_cast<int>(blockDim.y)) {
    T* dy = d[team.row] + int64_t{head} * heads.dim;
    overElements<width>(team, 0, heads.pairs, [&](int i) {
      Floats<width> first = load<width>(dy + i), second = load<width>(dy + i + heads.pairs);
      angles.turn(first, second, i, -1.0f);
      store<width>(dy + i, first);
      store<width>(dy + i + heads.pairs, second);
    });
  }
}

template <class T, int width>
__global__ void __launch_bounds__(ropeThreads, 3)
    ropeNormGradKernel(Rows<T> d, Rows<const T> in, Heads heads, const int32_t* positions, const float* rstd, int64_t rows) {
  const Team team;
  if (team.row >= rows) return;
  const Angles<width> angles(heads, team, positions[team.row]);
  const int pairs = heads.pairs, turned = 2 * heads.pairs;
  for (int head = static_cast<int>(threadIdx.y); head < heads.count; head += static_cast<int>(blockDim.y)) {
    T* dy = d[team.row] + int64_t{head} * heads.dim;
    const T* x = in[team.row] + int64_t{head} * heads.dim;
    const auto weighted = [&](const Floats<width>& v, int i) { return scaled(v, 1.0f, load<width>(heads.weight + i)); };
    TwiceRead<T, width, oneVector<width>> dyA, dyB, dyRest;
    TwiceRead<const T, width, oneVector<width>> xA, xB, xRest;
    float products = 0;
    overElements<width>(team, 0, pairs, [&](int i) {
      Floats<width> a = dyA.first(dy + i), b = dyB.first(dy + i + pairs);
      angles.turn(a, b, i, -1.0f);
      products += dot(xA.first(x + i), weighted(a, i)) + dot(xB.first(x + i + pairs), weighted(b, i + pairs));
    });
    overElements<width>(team, turned, heads.dim,
                        [&](int i) { products += dot(xRest.first(x + i), weighted(dyRest.first(dy + i), i)); });
    const float scale = rstd[team.row * heads.count + head];
    const float slope = team.sum(products) / static_cast<float>(heads.dim) * scale * scale;
    const auto write = [&](int i, const Floats<width>& g, const Floats<width>& v) {
      Floats<width> dx = weighted(g, i);
#pragma unroll
      for (int e = 0; e < width; ++e) dx.at[e] = scale * (dx.at[e] - slope * v.at[e]);
      store<width>(dy + i, dx);
    };
    overElements<width>(team, 0, pairs, [&](int i) {
      Floats<width> a = dyA.again(dy + i), b = dyB.again(dy + i + pairs);
      angles.turn(a, b, i, -1.0f);
      write(i, a, xA.again(x + i));
      write(i + pairs, b, xB.again(x + i + pairs));
    });
    overElements<width>(team, turned, heads.dim, [&](int i) { write(i, dyRest.again(dy + i), xRest.again(x + i)); });
  }
}

Heads headsOf(int32_t count, int32_t headDim, const HeadNorm& norm, const Rotary& rotary) {
  if (headDim < 1 || rotary.pairs < 0 || 2 * rotary.pairs > headDim) {
    throw Error(code::invalidArgument, "Expected a head dimension that holds 2 * " + std::to_string(rotary.pairs) +
                                           " rotary elements but received " + std::to_string(headDim));
  }
  return {count, headDim, static_cast<int32_t>(rotary.pairs), norm.epsilon, norm.weight, rotary.cos, rotary.sin};
}

int64_t longestPart(const Heads& heads) {
  return std::max(heads.pairs, heads.dim - 2 * heads.pairs);
}

// Whether heads split into vectors that all lie aligned and no lane needs two of a part.
bool splitsInVectors(const Heads& heads, int width) {
  return heads.dim % width == 0 && heads.pairs % width == 0 && longestPart(heads) <= width * warpThreads &&
         isAligned(heads.weight, 16) && isAligned(heads.cos, 16) && isAligned(heads.sin, 16);
}

RowGrid teamGrid(const Heads& heads, int width, int64_t rows) {
  // More heads than that at once would only read the angles more often.
  constexpr unsigned mostTeams = 8;
  constexpr unsigned mostRows = 64;  // CUDA's limit of blockDim.z
  const unsigned lanes = powerOfTwoFrom(longestPart(heads) / width, warpThreads);
  const unsigned teams = powerOfTwoFrom(heads.count, std::min(mostTeams, ropeThreads / lanes));
  const unsigned down = std::min(mostRows, ropeThreads / (lanes * teams));
  return {dim3(static_cast<unsigned>((rows + down - 1) / down)), dim3(lanes, teams, down)};
}

}  // namespace

void CudaDevice::rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                      const int32_t* positions, const Matrix& out, float* rstd) {
  const Heads shape = headsOf(heads, headDim, norm, rotary);
  withElementType(in.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int wide = fullWidth<T>;
    const bool inVectors = splitsInVectors(shape, wide) && readsInVectors(in, wide) && readsInVectors(out, wide);
    const RowGrid shared = teamGrid(shape, inVectors ? wide : 1, in.rows);
    if (norm.weight) {
      queue_.launch("rope", inVectors ? ropeKernel<T, wide, true> : ropeKernel<T, 1, true>, shared.grid, shared.block, 0,
                    rowsOf<const T>(in), shape, positions, rowsOf<T>(out), rstd, in.rows);
    } else {
      queue_.launch("rope", inVectors ? ropeKernel<T, wide, false> : ropeKernel<T, 1, false>, shared.grid, shared.block, 0,
                    rowsOf<T>(in), shape, positions, rowsOf<T>(out), rstd, in.rows);
    }
  });
}

void CudaDevice::ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm,
                          const Rotary& rotary, const int32_t* positions, const float* rstd) {
  const Heads shape = headsOf(heads, headDim, norm, rotary);
  withElementType(d.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int wide = fullWidth<T>;
    const bool inVectors = splitsInVectors(shape, wide) && readsInVectors(d, wide) && (!norm.weight || readsInVectors(in, wide));
    const RowGrid shared = teamGrid(shape, inVectors ? wide : 1, d.rows);
    if (norm.weight) {
      queue_.launch("ropeGrad", inVectors ? ropeNormGradKernel<T, wide> : ropeNormGradKernel<T, 1>, shared.grid, shared.block, 0,
                    rowsOf<T>(d), rowsOf<const T>(in), shape, positions, rstd, d.rows);
    } else {
      queue_.launch("ropeGrad", inVectors ? ropeGradKernel<T, wide> : ropeGradKernel<T, 1>, shared.grid, shared.block, 0,
                    rowsOf<T>(d), shape, positions, d.rows);
    }
  });
}

}  // namespace lora_da::cuda
