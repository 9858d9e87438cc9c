// What the attention kernels are made of: how a block of query or key rows falls into sequences, tiles in shared memory, and a
// warp's products of such tiles, on tensor cores for bfloat16 and with float32 multiply-adds for float32.
//
// A block owns a tile of consecutive rows of the packed batch, whatever sequences they belong to, and does their sequences one
// after the other, each as if it were alone: rows of other sequences are zero where they are read, so that not even a NaN of
// theirs is met, and sums start anew. Warps none of whose rows belong to the sequence sit it out.
//
// A warp owns some rows of its block's tile. With them it forms scores [its rows, columns of the other operand's tile] and adds
// products of scores and that operand to sums [its rows, headDim]. Which rows and columns a thread holds is its Math's matter.
#pragma once

#include <cmath>
#include <limits>

#include "core/error.h"
#include "cuda/reduction.h"
#include "cuda/tensor_core.h"
#include "cuda/vector_access.h"

namespace lora_da::cuda {

inline constexpr int attentionWarps = 4;
inline constexpr int attentionThreads = attentionWarps * warpThreads;
// Kernels exist for the head dimensions 16 (bfloat16 only), 32, 64, 96, 128 and 256; others run as the next one with zeros
// behind.
inline constexpr int32_t maxAttentionHeadDim = 256;
inline constexpr float log2OfE = 1.4426950408889634f;
inline constexpr float lnOf2 = 0.6931471805599453f;

// What every kernel over a packed batch is told.
struct AttentionProblem {
  const int32_t* rowFirst;  // [rows]
  const int32_t* rowEnd;    // [rows]
  int32_t rows;
  int32_t heads;
  int32_t kvHeads;
  int32_t group;  // query heads of a key head
  int32_t headDim;
  int32_t window;  // at most rows, so that sums of a row and it do not overflow
  float scale;
  int32_t vectors;  // whether all matrices can be read and written 16 bytes at a time
};
static_assert(sizeof(AttentionProblem) == 2 * sizeof(void*) + 8 * sizeof(int32_t),
              "a padding byte spoils a launch's fingerprint");

__host__ __device__ constexpr int32_t ceilDivide(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}

// --- sequences ----------------------------------------------------------------------------------------------------------

// Rows [begin, stop) of a tile, which belong to the sequence of rows [first, end).
struct Segment {
  int32_t first;
  int32_t end;
  int32_t begin;
  int32_t stop;
};

// body(segment) for each sequence that has rows in [from, to), then padding(first, to) if padding rows follow. No copy of this
// thread's is under way any more when it returns: where there was nothing but padding, no body has waited for the block's own
// tile, and the memory is about to be another block's.
template <class Body, class Padding>
__device__ inline void overSegments(const AttentionProblem& problem, int32_t from, int32_t to, const Body& body,
                                    const Padding& padding) {
  for (int32_t row = from; row < to;) {
    const int32_t end = problem.rowEnd[row];
    if (end == row) {
      padding(row, to);
      break;
    }
    const Segment segment{problem.rowFirst[row], end, row, min(end, to)};
    body(segment);
    row = segment.stop;
  }
  commitCopies();  // only copies of closed groups are waited for
  waitCopies<0>();
}

// Keys that the queries of a segment see, in tiles of `columns`. The tiles end at the segment's last row, so that only the last
// of them has the causal border in it, and are visited from there on down.
template <int columns>
class KeyTiles {
 public:
  // `warpFirst` and `warpRows` are the rows that this warp owns.
  __device__ KeyTiles(const Segment& segment, int32_t window, int32_t warpFirst, int32_t warpRows)
      : segment_(segment),
        window_(window),
        begin_(max(segment.begin, warpFirst)),
        stop_(min(segment.stop, warpFirst + warpRows)) {}

  __device__ int32_t count() const { return ceilDivide(segment_.stop - lowest(), columns); }
  __device__ int32_t key(int32_t tile) const { return segment_.stop - (tile + 1) * columns; }
  // The lowest key that any query of the segment sees.
  __device__ int32_t lowest() const { return lowestOf(segment_.begin); }

  __device__ bool ownsRow(int32_t row) const { return row >= begin_ && row < stop_; }
  // Of the tile from `key` on: whether this warp's queries see none of its keys, or each sees them all.
  __device__ bool hidden(int32_t key) const { return begin_ >= stop_ || key >= stop_ || key + columns <= lowestOf(begin_); }
  __device__ bool open(int32_t key) const { return key + columns - 1 <= begin_ && key >= lowestOf(stop_ - 1); }
  __device__ bool sees(int32_t query, int32_t key) const {
    return static_cast<uint32_t>(query - key) < static_cast<uint32_t>(window_) && key >= segment_.first;
  }

 private:
  __device__ int32_t lowestOf(int32_t query) const { return max(segment_.first, query - window_ + 1); }

  Segment segment_;
  int32_t window_;
  int32_t begin_;  // the rows of the segment that this warp owns
  int32_t stop_;
};

// Queries that see the keys of a segment, in tiles of `columns`, from the first on; the first tile starts at a multiple of four,
// so that four rows' statistics can be read at once.
template <int columns>
class QueryTiles {
 public:
  __device__ QueryTiles(const Segment& segment, int32_t window, int32_t warpFirst, int32_t warpRows)
      : segment_(segment),
        window_(window),
        begin_(max(segment.begin, warpFirst)),
        stop_(min(segment.stop, warpFirst + warpRows)) {}

  __device__ int32_t count() const { return ceilDivide(end() - start(), columns); }
  __device__ int32_t query(int32_t tile) const { return start() + tile * columns; }
  // Queries that see any key of the segment are [begin(), end()).
  __device__ int32_t begin() const { return segment_.begin; }
  __device__ int32_t end() const { return min(segment_.end, segment_.stop - 1 + window_); }

  __device__ bool ownsRow(int32_t row) const { return row >= begin_ && row < stop_; }
  // Of the tile from `query` on: whether none of its queries sees this warp's keys, or each sees them all.
  __device__ bool hidden(int32_t query) const {
    return begin_ >= stop_ || query + columns <= begin_ || query - (stop_ - 1) >= window_;
  }
  __device__ bool open(int32_t query) const {
    return query >= stop_ - 1 && query + columns - 1 - begin_ < window_ && query + columns <= segment_.end;
  }
  __device__ bool sees(int32_t key, int32_t query) const {
    return static_cast<uint32_t>(query - key) < static_cast<uint32_t>(window_) && query < segment_.end;
  }

 private:
  __device__ int32_t start() const { return segment_.begin / 4 * 4; }

  Segment segment_;
  int32_t window_;
  int32_t begin_;  // the rows of the segment that this warp owns
  int32_t stop_;
};

// --- tiles in shared memory ---------------------------------------------------------------------------------------------

// Rows of headDim elements in chunks of 16 bytes. Eight neighbouring rows have a chunk in eight different places of 128 bytes,
// so that reading a chunk of each meets no bank twice: a row's chunks are permuted within groups of eight, or, where they do
// not fill such groups, rows are an odd number of chunks apart.
template <class Element, int headDim>
struct TileLayout {
  static constexpr int chunkElements = fullWidth<Element>;
  static constexpr int chunks = headDim / chunkElements;
  static constexpr bool permuted = chunks % 8 == 0;
  static constexpr int rowBytes = (permuted ? chunks : chunks | 1) * 16;

  // Of chunk `first + own` of row `firstRow + ownRow`, where `first` and `firstRow` are known to the compiler (firstRow a
  // multiple of 8, first even) and own is 0 or 1: what depends on the thread is computed once.
  __device__ static int ownOffset(int ownRow, int own) { return ownRow * rowBytes + 16 * (permuted ? own ^ (ownRow & 7) : own); }
  __device__ static int offset(int row, int chunk) { return row * rowBytes + 16 * (permuted ? chunk ^ (row & 7) : chunk); }
};

// One head's columns of a matrix.
template <class T>
__device__ inline Rows<T> headRows(const Rows<T>& matrix, int32_t head, int32_t headDim) {
  return {matrix.data + int64_t{head} * headDim, matrix.stride};
}

// Starts copying rows first .. first + count - 1 of [rows, width] into a tile; what lies outside of rows [from, to) or beyond the
// width is zero.
template <int headDim, int count, class Element>
__device__ inline void startTile(unsigned char* tile, const Rows<const Element>& source, int32_t sourceWidth, bool vectors,
                                 int32_t first, int32_t from, int32_t to) {
  using Layout = TileLayout<Element, headDim>;
  constexpr int width = Layout::chunkElements;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * Layout::chunks; i += attentionThreads) {
    const int32_t row = first + i / Layout::chunks, column = i % Layout::chunks * width;
    const bool inside = row >= from && row < to && column < sourceWidth;
    const Element* element = inside ? source[row] + column : source.data;
    unsigned char* place = tile + Layout::offset(i / Layout::chunks, i % Layout::chunks);
    if (vectors) {
      copyAsync16(place, element, inside);
      continue;
    }
    for (int e = 0; e < width; ++e) {
      reinterpret_cast<Element*>(place)[e] = inside && column + e < sourceWidth ? element[e] : Element(0.0f);
    }
  }
}

// compute(i, stage) for i < count, each after load(i, stage) has started its copies: with two stages those of the next are under
// way meanwhile. All threads of the block together; no thread is at compute any more when one returns.
template <int stages, class Load, class Compute>
__device__ inline void overTiles(int32_t count, const Load& load, const Compute& compute) {
  static_assert(stages == 1 || stages == 2, "a tile is alone or one of two");
  __syncthreads();  // others may still read what the stages held before
  load(0, 0);
  commitCopies();
  for (int32_t i = 0; i < count; ++i) {
    waitCopies<0>();
    __syncthreads();
    if constexpr (stages == 2) {
      if (i + 1 < count) load(i + 1, (i + 1) % 2);
      commitCopies();
      compute(i, i % 2);
    } else {
      compute(i, 0);
      __syncthreads();
      if (i + 1 < count) load(i + 1, 0);
      commitCopies();
    }
  }
  if constexpr (stages == 2) __syncthreads();
}

// --- a warp's products --------------------------------------------------------------------------------------------------

__device__ inline int lane() {
  return static_cast<int>(threadIdx.x % static_cast<unsigned>(warpThreads));
}
__device__ inline int warp() {
  return static_cast<int>(threadIdx.x / static_cast<unsigned>(warpThreads));
}

// bfloat16 on tensor cores: a warp owns `blocks` times 16 rows. Scores that enter a product are rounded to bfloat16.
template <int headDim_, int blocks, int columns_>
struct Bf16Math {
  using Element = Bf16;
  static constexpr int headDim = headDim_;
  static constexpr int columns = columns_;
  static constexpr int warpRows = 16 * blocks;
  static constexpr int lanesPerRow = 4;
  static constexpr int threadRows = 2 * blocks;
  static constexpr int threadColumns = columns / 4;
  static constexpr int threadElements = headDim / 4;
  static constexpr int run = 2;  // neighbouring elements that a thread holds
  static constexpr int exchangeBytes = 0;
  using Layout = TileLayout<Element, headDim>;

  // Accumulators of [16 blocks, width] products.
  template <int width>
  struct Accumulators {
    float tile[blocks][width / 8][4];
    __device__ float& at(int row, int column) { return tile[row / 2][column / 2][row % 2 * 2 + column % 2]; }
  };
  using Scores = Accumulators<columns>;
  using Sums = Accumulators<headDim>;

  // The row of the warp's that the i-th one is of threads in a place among those that share no row; and the score column that a
  // thread's i-th one is; the element of the head that its first one is, and how far its i-th is from there.
  __device__ static int rowAt(int i, int place) { return i / 2 * 16 + i % 2 * 8 + place; }
  __device__ static int column(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }
  __device__ static int firstElement() { return lane() % 4 * 2; }
  static constexpr __device__ int elementOffset(int i) { return i / 2 * 8 + i % 2; }

  // scores = own rows times the columns of `other`, each a row of its tile.
  __device__ static void multiply(const unsigned char* own, const unsigned char* other, Scores& scores) {
    clear(scores);
    const int ownOffset = Layout::ownOffset(lane() % 16, lane() / 16);
    const int otherOffset = Layout::ownOffset(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
    for (int k = 0; k < headDim / 16; ++k) {
      uint32_t a[blocks][4];
#pragma unroll
      for (int m = 0; m < blocks; ++m) loadTiles(a[m], own + place(ownOffset, 16 * m, 2 * k));
#pragma unroll
      for (int n = 0; n < columns / 16; ++n) {
        uint32_t b[4];
        loadTiles(b, other + place(otherOffset, 16 * n, 2 * k));
        multiplyPair(a, b, scores, n);
      }
    }
  }

  // sums += scores times `other`, whose rows are the scores' columns.
  __device__ static void accumulate(Scores& scores, const unsigned char* other, unsigned char*, Sums& sums) {
    const int otherOffset = Layout::ownOffset(lane() % 16, lane() / 16);
#pragma unroll
    for (int k = 0; k < columns / 16; ++k) {
      uint32_t a[blocks][4];
#pragma unroll
      for (int m = 0; m < blocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &scores.tile[m][2 * k + i / 2][i % 2 * 2];
          a[m][i] = pack<2>(Floats<2>{{pair[0], pair[1]}}, Bf16{}).words[0];
        }
      }
#pragma unroll
      for (int n = 0; n < headDim / 16; ++n) {
        uint32_t b[4];
        loadTilesTransposed(b, other + place(otherOffset, 16 * k, 2 * n));
        multiplyPair(a, b, sums, n);
      }
    }
  }

 private:
  // Where an own offset is for other rows and chunks.
  __device__ static int place(int ownOffset, int firstRow, int firstChunk) {
    const int shift = Layout::permuted ? (16 * (firstChunk & 7)) ^ ownOffset : 16 * firstChunk + ownOffset;
    return shift + firstRow * Layout::rowBytes + (Layout::permuted ? 16 * (firstChunk & ~7) : 0);
  }
  // Columns 16 n .. 16 n + 15 of the product.
  template <int width>
  __device__ static void multiplyPair(const uint32_t (&a)[blocks][4], const uint32_t (&b)[4], Accumulators<width>& product,
                                      int n) {
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < blocks; ++m) {
      mma16816(product.tile[m][2 * n], a[m], low);
      mma16816(product.tile[m][2 * n + 1], a[m], high);
    }
  }
  template <int width>
  __device__ static void clear(Accumulators<width>& product) {
#pragma unroll
    for (int i = 0; i < threadRows * width / 4; ++i) product.at(i % threadRows, i / threadRows) = 0.0f;
  }
};

// float32: the lanes of a warp lie in `rowLanes` rows; each has four rows of the warp's, one in every rowLanes, and the columns
// and elements of its place in the lanes' row. Scores reach the other lanes of a row through shared memory.
template <int headDim_, int rowLanes, int columns_>
struct F32Math {
  using Element = float;
  static constexpr int headDim = headDim_;
  static constexpr int columns = columns_;
  static constexpr int lanesPerRow = warpThreads / rowLanes;
  static constexpr int threadRows = 4;
  static constexpr int warpRows = threadRows * rowLanes;
  static constexpr int threadColumns = columns / lanesPerRow;
  static constexpr int threadElements = headDim / lanesPerRow;
  static constexpr int run = 4;
  // Rows of the other tile added in one go: beside the sums of the widest heads, dk and dv, no more fit into registers.
  static constexpr int rowsAtOnce = headDim <= 128 ? 4 : 2;
  // Rows so far apart that the lanes' rows fall into different banks.
  static constexpr int exchangeStride = columns + 64 / lanesPerRow;
  static constexpr int exchangeBytes = warpRows * exchangeStride * static_cast<int>(sizeof(float));
  using Layout = TileLayout<Element, headDim>;

  template <int width>
  struct Accumulators {
    float value[threadRows][width];
    __device__ float& at(int row, int column) { return value[row][column]; }
  };
  using Scores = Accumulators<threadColumns>;
  using Sums = Accumulators<threadElements>;

  __device__ static int rowAt(int i, int place) { return i * rowLanes + place; }
  __device__ static int column(int i) { return i * lanesPerRow + lane() % lanesPerRow; }
  __device__ static int firstElement() { return lane() % lanesPerRow * run; }
  static constexpr __device__ int elementOffset(int i) { return i / run * run * lanesPerRow + i % run; }

  __device__ static void multiply(const unsigned char* own, const unsigned char* other, Scores& scores) {
#pragma unroll
    for (int i = 0; i < threadRows * threadColumns; ++i) scores.value[i / threadColumns][i % threadColumns] = 0.0f;
#pragma unroll 2
    for (int chunk = 0; chunk < Layout::chunks; ++chunk) {
      Floats<4> x[threadRows], y[threadColumns];
#pragma unroll
      for (int r = 0; r < threadRows; ++r) x[r] = chunkAt(own, rowAt(r, lane() / lanesPerRow), chunk);
#pragma unroll
      for (int c = 0; c < threadColumns; ++c) y[c] = chunkAt(other, column(c), chunk);
#pragma unroll
      for (int i = 0; i < threadRows * threadColumns; ++i) {
        const int r = i / threadColumns, c = i % threadColumns;
#pragma unroll
        for (int e = 0; e < 4; ++e) scores.value[r][c] += x[r].at[e] * y[c].at[e];
      }
    }
  }

  __device__ static void accumulate(Scores& scores, const unsigned char* other, unsigned char* exchange, Sums& sums) {
    auto* shared = reinterpret_cast<float*>(exchange);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < threadRows * threadColumns; ++i) {
      const int r = i / threadColumns, c = i % threadColumns;
      shared[rowAt(r, lane() / lanesPerRow) * exchangeStride + column(c)] = scores.value[r][c];
    }
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < columns; k += rowsAtOnce) {
      Floats<rowsAtOnce> x[threadRows];
#pragma unroll
      for (int r = 0; r < threadRows; ++r) x[r] = load<rowsAtOnce>(shared + rowAt(r, lane() / lanesPerRow) * exchangeStride + k);
#pragma unroll
      for (int j = 0; j < rowsAtOnce; ++j) addRow(x, j, other, k + j, sums);
    }
  }

 private:
  __device__ static Floats<4> chunkAt(const unsigned char* tile, int row, int chunk) {
    return load<4>(reinterpret_cast<const float*>(tile + Layout::offset(row, chunk)));
  }
  __device__ static void addRow(const Floats<rowsAtOnce> (&x)[threadRows], int j, const unsigned char* other, int otherRow,
                                Sums& sums) {
#pragma unroll
    for (int first = 0; first < threadElements; first += run) {
      const Floats<4> y = chunkAt(other, otherRow, (firstElement() + elementOffset(first)) / run);
#pragma unroll
      for (int i = 0; i < threadRows * run; ++i) sums.value[i / run][first + i % run] += x[i / run].at[j] * y.at[i % run];
    }
  }
};

// The row of the warp's that the thread's i-th one is.
template <class Math>
__device__ inline int ownRow(int i) {
  return Math::rowAt(i, lane() / Math::lanesPerRow);
}

// Scores of the warp's rows, from firstRow on, and the tile's, from firstOther on, become `hidden` where one does not see the
// other.
template <class Math, class Tiles>
__device__ inline void hideScores(const Tiles& tiles, int32_t firstRow, int32_t firstOther, float hidden,
                                  typename Math::Scores& scores) {
#pragma unroll
  for (int r = 0; r < Math::threadRows; ++r) {
    const int32_t row = firstRow + ownRow<Math>(r);
#pragma unroll
    for (int c = 0; c < Math::threadColumns; ++c) {
      if (!tiles.sees(row, firstOther + Math::column(c))) scores.at(r, c) = hidden;
    }
  }
}

template <class Math>
__device__ inline void clearSums(typename Math::Sums& sums) {
#pragma unroll
  for (int i = 0; i < Math::threadRows * Math::threadElements; ++i) {
    sums.at(i / Math::threadElements, i % Math::threadElements) = 0.0f;
  }
}

// Shared memory through which a warp's sums go on their way out, to be written 16 bytes at a time.
template <class Math, class T>
struct Staging {
  static constexpr int rows = warpThreads / Math::lanesPerRow;
  static constexpr int rowBytes = Math::headDim * static_cast<int>(sizeof(T)) + 16;
  static constexpr int warpBytes = rows * rowBytes;
  static constexpr int bytes = attentionWarps * warpBytes;
};

// to[firstRow + i] [width] = factor(thread's row) times row i of the warp's sums, where owns(firstRow + i).
template <class Math, class T, class Factor, class Owns>
__device__ inline void storeSums(typename Math::Sums& sums, unsigned char* staging, const Rows<T>& to, int32_t firstRow,
                                 int32_t width, bool vectors, const Factor& factor, const Owns& owns) {
  using Shared = Staging<Math, T>;
  constexpr int run = Math::run, chunkWidth = fullWidth<T>, chunks = Math::headDim / chunkWidth;
  unsigned char* warpStaging = staging + warp() * Shared::warpBytes;
  T* own = reinterpret_cast<T*>(warpStaging + lane() / Math::lanesPerRow * Shared::rowBytes) + Math::firstElement();
#pragma unroll
  for (int r = 0; r < Math::threadRows; ++r) {
    const float scale = factor(r);
    __syncwarp();
#pragma unroll
    for (int first = 0; first < Math::threadElements; first += run) {
      Floats<run> values;
#pragma unroll
      for (int i = 0; i < run; ++i) values.at[i] = scale * sums.at(r, first + i);
      store<run>(own + Math::elementOffset(first), values);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane(); i < Shared::rows * chunks; i += warpThreads) {
      const int32_t row = firstRow + Math::rowAt(r, i / chunks), column = i % chunks * chunkWidth;
      if (column >= width || !owns(row)) continue;
      const T* from = reinterpret_cast<const T*>(warpStaging + i / chunks * Shared::rowBytes) + column;
      T* target = to[row] + column;
      if (vectors) {
        store<chunkWidth>(target, load<chunkWidth>(from));
        continue;
      }
      for (int e = 0; e < chunkWidth && column + e < width; ++e) target[e] = from[e];
    }
  }
}

// Elements [0, width) of rows [from, to) = 0.
template <class T>
__device__ inline void clearRows(const Rows<T>& matrix, int32_t width, int32_t from, int32_t to) {
  for (int i = static_cast<int>(threadIdx.x); i < (to - from) * width; i += attentionThreads) {
    matrix[from + i / width][i % width] = T(0.0f);
  }
}

// --- softmax ------------------------------------------------------------------------------------------------------------

// exp of scores relative to a running maximum, as powers of two of scores times `scale`, which has log2(e) in it. The maximum is
// raised only where a score exceeds it by more than `slack` powers of two: sums stay far from overflow, and are hardly ever
// brought to another maximum.
template <class Math>
struct OnlineSoftmax {
  static constexpr float slack = 8;
  float maximum[Math::threadRows];  // times scale
  float sum[Math::threadRows];      // of the columns that this thread holds

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < Math::threadRows; ++r) {
      maximum[r] = -INFINITY;
      sum[r] = 0.0f;
    }
  }

  // Scores become exponentials; hidden ones are -infinity before.
  __device__ void update(float scale, typename Math::Scores& scores, typename Math::Sums& sums) {
    raiseMaxima(scale, scores, sums);
#pragma unroll
    for (int r = 0; r < Math::threadRows; ++r) {
      const float shift = maximum[r] == -INFINITY ? 0.0f : maximum[r];
#pragma unroll
      for (int c = 0; c < Math::threadColumns; ++c) {
        const float exponential = exp2Flushed(scores.at(r, c) * scale - shift);
        scores.at(r, c) = exponential;
        sum[r] += exponential;
      }
    }
  }
  // Makes the sums those of whole rows.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < Math::threadRows; ++r) sum[r] = overRowLanes(sum[r], [](float a, float b) { return a + b; });
  }

 private:
  __device__ void raiseMaxima(float scale, typename Math::Scores& scores, typename Math::Sums& sums) {
    float kept[Math::threadRows];
    bool raised = false;
#pragma unroll
    for (int r = 0; r < Math::threadRows; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int c = 0; c < Math::threadColumns; ++c) largest = fmaxf(largest, scores.at(r, c));
      largest = scale * overRowLanes(largest, [](float a, float b) { return fmaxf(a, b); });
      kept[r] = 1.0f;
      if (largest <= maximum[r] + slack) continue;
      kept[r] = exp2Flushed(maximum[r] - largest);
      maximum[r] = largest;
      raised = true;
    }
    if (!__any_sync(allLanes, raised)) return;
#pragma unroll
    for (int r = 0; r < Math::threadRows; ++r) {
      sum[r] *= kept[r];
#pragma unroll
      for (int e = 0; e < Math::threadElements; ++e) sums.at(r, e) *= kept[r];
    }
  }
  template <class Combine>
  __device__ static float overRowLanes(float value, const Combine& combine) {
#pragma unroll
    for (int offset = Math::lanesPerRow / 2; offset > 0; offset /= 2) {
      value = combine(value, __shfl_xor_sync(allLanes, value, offset));
    }
    return value;
  }
};

// --- on the host --------------------------------------------------------------------------------------------------------

inline void requireAttentionShape(const AttentionShape& shape, const Matrix& q, const Matrix& k) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw Error(code::internal, message);
  };
  require(shape.kvHeads > 0 && shape.heads % shape.kvHeads == 0,
          "attention: the number of heads is not a multiple of that of key heads");
  require(q.cols == int64_t{shape.heads} * shape.headDim && k.cols == int64_t{shape.kvHeads} * shape.headDim,
          "attention: columns differ from heads * headDim");
  require(shape.scale > 0, "attention: the scale is not positive");
  require(q.dtype == DType::f32 || q.dtype == DType::bf16, "attention takes float32 and bfloat16");
  if (shape.headDim < 1 || shape.headDim > maxAttentionHeadDim) {
    throw Error(code::invalidArgument, "Expected a head dimension from 1 to " + std::to_string(maxAttentionHeadDim) +
                                           " on a CUDA device but received " + std::to_string(shape.headDim));
  }
}

// Whether every head of the matrix can be read and written 16 bytes at a time.
inline bool headsAreAligned(const Matrix& matrix, const AttentionShape& shape) {
  const int64_t width = 16 / static_cast<int64_t>(sizeOf(matrix.dtype));
  return readsInVectors(matrix, static_cast<int>(width)) && shape.headDim % width == 0;
}

template <class... Matrices>
AttentionProblem attentionProblem(const Sequences& sequences, const AttentionShape& shape, const Matrix& q,
                                  const Matrices&... others) {
  AttentionProblem problem{};
  problem.rowFirst = sequences.rowFirst;
  problem.rowEnd = sequences.rowEnd;
  problem.rows = static_cast<int32_t>(q.rows);
  problem.heads = shape.heads;
  problem.kvHeads = shape.kvHeads;
  problem.group = shape.heads / shape.kvHeads;
  problem.headDim = shape.headDim;
  problem.window = shape.window > 0 && shape.window < problem.rows ? shape.window : problem.rows;
  problem.scale = shape.scale;
  problem.vectors = headsAreAligned(q, shape) && (headsAreAligned(others, shape) && ...) ? 1 : 0;
  return problem;
}

// call(Plan{}) with the plan of the kernels for this element type and head dimension.
template <template <class, int> class Plan, class Call>
void withAttentionPlan(DType type, int32_t headDim, const Call& call) {
  const bool bf16 = type == DType::bf16;
  if (bf16 && headDim <= 16) return call(Plan<Bf16, 16>{});
  if (headDim <= 32) return bf16 ? call(Plan<Bf16, 32>{}) : call(Plan<float, 32>{});
  if (headDim <= 64) return bf16 ? call(Plan<Bf16, 64>{}) : call(Plan<float, 64>{});
  if (headDim <= 96) return bf16 ? call(Plan<Bf16, 96>{}) : call(Plan<float, 96>{});
  if (headDim <= 128) return bf16 ? call(Plan<Bf16, 128>{}) : call(Plan<float, 128>{});
  return bf16 ? call(Plan<Bf16, 256>{}) : call(Plan<float, 256>{});
}

}  // namespace lora_da::cuda
