// How a matrix is shared among threads where every element is computed by itself: a block is a tile of neighbouring vectors
// (threadIdx.x) of some rows (threadIdx.y), and tiles repeat with the grid's size, blockIdx.y along the columns and blockIdx.x
// down the rows. One long row fills the device as well as many short ones.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace lora_da::cuda {

inline constexpr int rowBlockThreads = 256;

struct RowGrid {
  dim3 grid;
  dim3 block;
};

inline unsigned powerOfTwoFrom(int64_t count, unsigned most) {
  unsigned power = 1;
  while (power < count && power < most) power *= 2;
  return power;
}

inline RowGrid rowGrid(int64_t rows, int64_t vectors) {
  // Several waves of blocks on the largest devices, yet few enough that a thread of a large matrix has several vectors.
  constexpr int64_t mostBlocks = 4096;
  const unsigned across = powerOfTwoFrom(vectors, rowBlockThreads);
  const unsigned down = rowBlockThreads / across;
  const int64_t columnTiles = std::min((vectors + across - 1) / across, mostBlocks);
  if (columnTiles == 0) return {dim3(0), dim3(1)};
  const int64_t rowTiles = std::min((rows + down - 1) / down, (mostBlocks + columnTiles - 1) / columnTiles);
  return {dim3(static_cast<unsigned>(rowTiles), static_cast<unsigned>(columnTiles)), dim3(across, down)};
}

// body(row, column) for the first column of each vector that falls to this thread of a rowGrid(rows, cols / width).
template <int width, class Body>
__device__ inline void overMatrix(int64_t rows, int64_t cols, const Body& body) {
  const int64_t rowStep = int64_t{gridDim.x} * blockDim.y;
  const int64_t columnStep = int64_t{gridDim.y} * blockDim.x * width;
  const int64_t firstColumn = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * width;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += rowStep) {
#pragma unroll 1
    for (int64_t column = firstColumn; column < cols; column += columnStep) body(row, column);
  }
}

}  // namespace lora_da::cuda
