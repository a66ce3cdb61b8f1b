// Softmax on the GPU, backward: the gradient of each row in a few numbers, then one pass that streams the matrix; and
// the gradient of the normalisation.
#pragma once

#include "cuda_forward.cuh"

namespace facefast {

// The gradient of a row with everything folded in: column j gets others * exp(scale * (x_j - peak)) + constant.
template <typename A>
struct RowGradient {
  A others, constant, target, peak;
};

template <typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(const Job& job, const Upstream& up, int64_t row, int64_t label) {
  const Problem& p = job.p;
  const Finished finished = finish_row<A>(job, row, label);
  double factor = double(static_cast<const A*>(up.data)[row * up.stride]);
  if (p.reduction == Reduction::kMean) {
    const double count = double(*static_cast<const A*>(up.count));
    factor /= count > 1 ? count : 1;
  }
  const double scaled = factor * p.focal.scale;
  return {static_cast<A>(finished.row.others * scaled), static_cast<A>(finished.row.constant * scaled),
          static_cast<A>(finished.row.target * finished.slope * factor), stats_of<A>(job.s, row).peak};
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    row_gradient_kernel(const __grid_constant__ Job job, const Upstream up, RowGradient<A>* out) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= job.p.rows) return;
  const int64_t label = label_of(job.p, row);
  if (label != job.p.focal.ignore_index) out[row] = row_gradient<A>(job, up, row, label);
}

// One group of threads per row and segment. The row's numbers come from `ready`, or are computed by the group's first
// thread. `out` may be the matrix itself.
template <typename T, int kGroup, bool kFull>
__global__ void __launch_bounds__(kThreads, kFull ? 2 : 3)
    gradient_kernel(const __grid_constant__ Job job, const Upstream up, const RowGradient<Acc<T>>* ready, T* out,
                    int64_t out_stride) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize, kUnroll = kInFlight;
  const Problem& p = job.p;
  const Columns& c = job.c;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGroup;
  const int64_t row = item / job.segments;
  const int segment = static_cast<int>(item % job.segments);
  const int lane = threadIdx.x % kGroup;
  const bool inside = row < p.rows;
  const int64_t label = inside ? label_of(p, row) : 0;
  const bool counts = inside && label != p.focal.ignore_index;
  const int64_t place = label - c.first;
  const int own = place >= 0 && place < c.width ? static_cast<int>(place) : -(1 << 30);
  const Chunks<T> chunks(static_cast<const T*>(c.data) + (inside ? row * c.stride : 0),
                         inside ? static_cast<int>(c.width) : 0);
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = cols == nullptr || !inside ? A(1) : static_cast<const A*>(c.row_scale)[row];
  const int begin = segment * kSegmentChunks;
  const int end = job.segments == 1 || begin + kSegmentChunks > chunks.count ? chunks.count : begin + kSegmentChunks;
  T* to = out + (inside ? row * out_stride : 0);
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == reinterpret_cast<uintptr_t>(chunks.row) % 16;

  // While the group's first thread does the row's arithmetic, the first chunks come nearer.
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = begin + lane + u * kGroup;
    if (at < end && chunks.whole(at)) prefetch(chunks.row + chunks.first(at));
  }
  RowGradient<A> g{0, 0, 0, 0};
  if (counts && lane == 0) g = ready != nullptr ? ready[row] : row_gradient<A>(job, up, row, label);
  if constexpr (kGroup > 32) {
    __shared__ RowGradient<A> shared;
    if (lane == 0) shared = g;
    __syncthreads();
    g = shared;
  } else if constexpr (kGroup > 1) {
    g.others = __shfl_sync(0xffffffffu, g.others, 0, kGroup);
    g.constant = __shfl_sync(0xffffffffu, g.constant, 0, kGroup);
    g.target = __shfl_sync(0xffffffffu, g.target, 0, kGroup);
    g.peak = __shfl_sync(0xffffffffu, g.peak, 0, kGroup);
  }

  const T none = typed<T>(0);
  const Exponential<T> exponential(p.focal.scale);
  for (int chunk = begin + lane; chunk < end; chunk += kUnroll * kGroup) {
    Pack<T> packs[kUnroll];
    chunks.read(packs, chunk, kGroup, end, none);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + u * kGroup, first = chunks.first(at);
      if (at >= end) break;
      A x[kSize];
      unpack<kFull>(chunks, at, packs[u], row_scale, cols, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const A other = g.others * exponential(x[i], g.peak) + g.constant;
        x[i] = counts ? (first + i == own ? g.target : other) : A(0);
        if constexpr (kFull) x[i] *= column_scale(chunks, first + i, row_scale, cols);
      }
      chunks.write(at, x, to, aligned);
    }
  }
}

// -----------------------------------------------------------------------------------------------
// Normalisation: one warp per row, products added in double.

template <typename T, typename U>
__device__ __forceinline__ double dot(const T* a, const U* b, int64_t dim) {
  double sum = 0;
  for (int64_t j = threadIdx.x % 32; j < dim; j += 32) sum += double(load(a[j])) * double(load(b[j]));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const T* x, int64_t rows, int64_t dim, Acc<T>* inverse) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const double norm = ::sqrt(dot(x + row * dim, x + row * dim, dim));
  if (threadIdx.x % 32 == 0) inverse[row] = static_cast<Acc<T>>(1 / (norm > kNormFloor ? norm : kNormFloor));
}

// U is T or the accumulator's type; `out` may be `grad`.
template <typename T, typename U>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const T* x, int64_t rows, int64_t dim, const Acc<T>* inverse, const U* grad, T* out) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const T* v = x + row * dim;
  const U* g = grad + row * dim;
  const double scale = inverse == nullptr ? 0 : double(inverse[row]);
  const double length = scale == 0 || scale >= kFlooredNorm ? 0 : dot(v, g, dim);
  const Acc<T> along = static_cast<Acc<T>>(length * scale * scale);
  for (int64_t j = threadIdx.x % 32; j < dim; j += 32) {
    const Acc<T> value = load(g[j]);  // alone where nothing is projected: the x of an ignored row may be NaN
    store(out + row * dim + j, along == Acc<T>(0) ? value : value - along * load(v[j]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_kernel(const T* parts, int64_t count, int64_t n, Acc<T>* total) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  for (int64_t k = 0; k < count; ++k) total[i] += load(parts[k * n + i]);
}

}  // namespace facefast
