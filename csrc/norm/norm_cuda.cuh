// What the kernels of norm_cuda.cu share: how rows and columns are divided among threads.
#pragma once

#include "../loss/cuda_common.cuh"
#include "norm_math.h"

namespace facefast {

constexpr int kAhead = 4;           // rows of a thread on their way at a time
constexpr int kSumBlocks = 512;     // blocks of a sum at most: what one wave of an H100 holds
constexpr int kPassBlocks = 4096;   // blocks of a pass over all values at most
constexpr int kLeastRows = kAhead;  // rows of a thread at least

// How [rows, columns of chunks] is divided: blocks of `lanes` columns and kThreads / lanes rows, which step down
// `slice` rows each.
struct Grid {
  int64_t rows, slice;
  int columns, lanes, column_blocks, slices;

  template <typename T>
  static Grid of(const Norm& norm, int most_blocks) {
    Grid grid{norm.count(), 0, static_cast<int>(norm.channels / kPerChunk<T>), 1, 1, 1};
    while (grid.lanes < 32 && grid.lanes < grid.columns) grid.lanes *= 2;
    grid.column_blocks = (grid.columns + grid.lanes - 1) / grid.lanes;
    const int64_t least = int64_t{kThreads / grid.lanes} * kLeastRows;
    int64_t slices = (grid.rows + least - 1) / least;
    const int64_t most = most_blocks / grid.column_blocks;
    slices = slices < most ? slices : most;
    slices = slices < 1 ? 1 : slices;
    grid.slice = (grid.rows + slices - 1) / slices;
    grid.slices = static_cast<int>((grid.rows + grid.slice - 1) / grid.slice);
    return grid;
  }
  unsigned blocks() const { return static_cast<unsigned>(slices * column_blocks); }
  __device__ int64_t rows_of(int64_t number) const {
    const int64_t left = rows - number * slice;
    return left < slice ? left : slice;
  }
};

// A thread's place in the grid.
struct Place {
  int step, lane, depth, slice, column;  // rows between a thread's, place within them, column of chunks
  int64_t begin, end;                    // the block's rows
  bool active;

  __device__ __forceinline__ explicit Place(const Grid& grid)
      : step(kThreads / grid.lanes),
        lane(threadIdx.x % grid.lanes),
        depth(threadIdx.x / grid.lanes),
        slice(blockIdx.x / grid.column_blocks),
        column(static_cast<int>(blockIdx.x % grid.column_blocks) * grid.lanes + lane),
        begin(slice * grid.slice),
        end(begin + grid.rows_of(slice)),
        active(column < grid.columns) {}

  // Calls run(row, n) for n rows of this thread from `row` on, kAhead at a time and then one by one.
  template <typename F>
  __device__ __forceinline__ void each(const F& run) const {
    if (!active) return;
    int64_t row = begin + depth;
    for (; row + (kAhead - 1) * step < end; row += kAhead * step) run(row, std::integral_constant<int, kAhead>{});
    for (; row < end; row += step) run(row, std::integral_constant<int, 1>{});
  }
  // How many that are.
  __device__ __forceinline__ int rows() const {
    return begin + depth < end ? static_cast<int>((end - begin - depth + step - 1) / step) : 0;
  }
};

template <typename T>
__device__ __forceinline__ const uint4* chunk_at(const T* data, int64_t row, const Grid& grid, int column) {
  return reinterpret_cast<const uint4*>(data) + row * grid.columns + column;
}

template <typename T, int kCount>
__device__ __forceinline__ void load_rows(uint4 (&chunks)[kCount], const T* data, int64_t row, const Grid& grid,
                                          const Place& place) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) chunks[u] = *chunk_at(data, row + u * place.step, grid, place.column);
}

template <typename T>
__device__ __forceinline__ void store_row(T* data, int64_t row, const Grid& grid, const Place& place,
                                          const float (&x)[kPerChunk<T>]) {
  reinterpret_cast<uint4*>(data)[row * grid.columns + place.column] = pack<T>(x);
}

__device__ __forceinline__ float number(const void* values, int channel, float otherwise) {
  return values == nullptr ? otherwise : static_cast<const float*>(values)[channel];
}

__device__ __forceinline__ float inverse_deviation(const Norm& norm, int channel) {
  if (norm.var == nullptr) return 1.f;
  const float spread = static_cast<const float*>(norm.var)[channel] + static_cast<float>(norm.eps);
#if defined(__CUDACC__)
  return rsqrtf(spread);
#else  // on the host, under tests/support/cuda_on_host.h
  return 1.f / sqrtf(spread);
#endif
}

__device__ __forceinline__ Channel<float> channel_of(const Norm& norm, int channel) {
  return {number(norm.mean, channel, 0.f), number(norm.weight, channel, 1.f) * inverse_deviation(norm, channel),
          number(norm.bias, channel, 0.f), number(norm.slope, channel, 0.f)};
}

}  // namespace facefast
