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
  const RowStats<A> state = stats_of<A>(job.s, row);
  const Finished finished = finish_row<A>(job, row, label, state, job.s.sums == nullptr ? 0 : job.s.sums[row]);
  double factor = double(static_cast<const A*>(up.data)[row * up.stride]);
  if (p.reduction == Reduction::kMean) {
    const double count = double(*static_cast<const A*>(up.count));
    factor /= count > 1 ? count : 1;
  }
  const double scaled = factor * p.focal.scale;
  return {static_cast<A>(finished.row.others * scaled), static_cast<A>(finished.row.constant * scaled),
          static_cast<A>(finished.row.target * finished.slope * factor), state.peak};
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    row_gradient_kernel(const __grid_constant__ Job job, const Upstream up, RowGradient<A>* out) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= job.p.rows) return;
  const int64_t label = label_of(job.p, row);
  if (label != job.p.focal.ignore_index) out[row] = row_gradient<A>(job, up, row, label);
}

// others * exp(scale * (x - peak)) + constant of one row, for any x.
template <typename T>
struct Slope {
  using A = Acc<T>;
  A others, constant, peak;
  Exponential<T> exponential;

  __device__ __forceinline__ A operator()(A x) const { return others * exponential(x, peak) + constant; }
};
template <typename T>
  requires(sizeof(T) == 2)
struct Slope<T> {
  float others, constant, peak;
  Exponential<T> exponential;
  typename Exponential<T>::Relative relative;

  __device__ __forceinline__ Slope(float others, float constant, float peak, Exponential<T> exponential)
      : others(others),
        constant(constant),
        peak(peak),
        exponential(exponential),
        relative(exponential.relative_to(peak)) {
    if (!exponential.far(relative)) this->others *= relative.correction;
  }
  __device__ __forceinline__ float operator()(float x) const { return others * relative(x) + constant; }
};

// One group of threads per row and segment. The row's numbers come from `ready`, or are computed by thread t of the
// block for its row t, while the first chunks are on their way. `out` may be the matrix itself. Whole chunks are read
// and written 16 bytes at a time, as if none held the label, whose number is put in its place afterwards, by the thread
// that wrote the chunk; the partial chunks at the row's ends go element by element. kAnywhere is for rows of `out` that
// are not aligned as those of the matrix.
template <typename T, int kGroup, Mode kMode>
__global__ void __launch_bounds__(kThreads, kMode == Mode::kPlain ? 3 : 2)
    gradient_kernel(const __grid_constant__ Job job, const Upstream up, const RowGradient<Acc<T>>* ready, T* out,
                    int64_t out_stride) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize, kRows = kThreads / kGroup;
  const Problem& p = job.p;
  const Columns& c = job.c;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGroup;
  const int64_t row = item / job.segments;
  const int segment = static_cast<int>(item % job.segments);
  const int lane = threadIdx.x % kGroup;
  const bool inside = row < p.rows;
  const int64_t label = inside ? label_of(p, row) : 0;
  const bool counts = inside && label != p.focal.ignore_index;
  const int own = counts ? own_column(c, label) : -1;
  const Chunks<T> chunks(static_cast<const T*>(c.data) + (inside ? row * c.stride : 0),
                         inside ? static_cast<int>(c.width) : 0);
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = cols == nullptr || !inside ? A(1) : static_cast<const A*>(c.row_scale)[row];
  const int begin = segment * job.segment_chunks;
  const int end = segment + 1 == job.segments ? chunks.count : begin + job.segment_chunks;
  const int from = begin > chunks.whole_begin() ? begin : chunks.whole_begin();
  const int to = end < chunks.whole_end() ? end : chunks.whole_end();
  T* row_out = out + (inside ? row * out_stride : 0);

  // A row that does not count is not read: it may hold anything, and its gradient is 0.
  const uint4 nothing = filled<T>(A(0));
  uint4 round[kInFlight], next[kInFlight];
  load_round<T, kGroup, false>(chunks, from + lane, counts ? to : 0, -1, nothing, round);

  RowGradient<A> g{0, 0, 0, 0};
  const int64_t mine = int64_t{blockIdx.x} * kRows / job.segments + threadIdx.x;
  if (threadIdx.x < kRows && mine < p.rows) {
    const int64_t its_label = label_of(p, mine);
    if (its_label != p.focal.ignore_index)
      g = ready != nullptr ? ready[mine] : row_gradient<A>(job, up, mine, its_label);
  }
  if constexpr (kGroup > 1) {
    __shared__ RowGradient<A> of_rows[kRows];
    if (threadIdx.x < kRows) of_rows[threadIdx.x] = g;
    __syncthreads();
    g = of_rows[threadIdx.x / kGroup];
  }
  const Exponential<T> exponential(p.focal.scale);
  const Slope<T> slope{g.others, g.constant, g.peak, exponential};

  const auto run = [&](const auto& gradient) {
    for (int chunk = from + lane; chunk < to; chunk += kInFlight * kGroup) {
      load_round<T, kGroup, false>(chunks, chunk + kInFlight * kGroup, counts ? to : 0, -1, nothing, next);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = chunk + u * kGroup, first = chunks.first(at);
        if (at >= to) break;
        A x[kSize];
        unpack<T>(round[u], x);
        if constexpr (kMode == Mode::kPlain) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[i] = gradient(x[i]);
        } else {
          A factor[kSize];
          column_scales<kMode == Mode::kScaled>(chunks, at, row_scale, cols, factor);
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[i] = gradient(x[i] * factor[i]) * factor[i];
        }
        if constexpr (kMode == Mode::kAnywhere) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) store(row_out + first + i, x[i]);
        } else {
          store_chunk(row_out + first, pack<T>(x));
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) round[u] = next[u];
    }
    for (int number = lane; number < 2; number += kGroup) {
      const int chunk = chunks.odd(number, begin, end, -1);
      if (chunk < 0) continue;
      A x[kSize], factor[kSize];
      chunks.read(chunk, -1, A(0), x);
      column_scales<false>(chunks, chunk, row_scale, cols, factor);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int column = chunks.first(chunk) + i;
        if (column < 0 || column >= chunks.width || column == own) continue;
        store(row_out + column, counts ? gradient(x[i] * factor[i]) * factor[i] : A(0));
      }
    }
  };
  if constexpr (sizeof(T) == 2) {
    if (exponential.far(slope.relative)) {
      run([&](A x) { return g.others * exponential(x, g.peak) + g.constant; });
    } else {
      run(slope);
    }
  } else {
    run(slope);
  }
  if (own < 0) return;
  const int own_chunk = chunks.holding(own);
  const bool whole = own_chunk >= from && own_chunk < to;
  // The chunk's own thread: nobody else may write there later. In a partial chunk nobody has written there at all.
  if (whole ? (own_chunk - from) % kGroup == lane : lane == 0 && own_chunk >= begin && own_chunk < end) {
    A factor = 1;
    if (cols != nullptr) factor = row_scale * cols[own];
    store(row_out + own, g.target * factor);
  }
}

// -----------------------------------------------------------------------------------------------
// Normalisation: one warp per row, products added in double. kWide if rows are whole aligned chunks.

// kCount values, of an array that may be written to in this launch.
template <bool kWide, int kCount, typename T>
__device__ __forceinline__ void load_values(const T* from, Acc<T> (&x)[kCount]) {
  if constexpr (kWide) {
#pragma unroll
    for (int part = 0; part < kCount; part += kPerChunk<T>) {
      Acc<T> some[kPerChunk<T>];
      unpack<T>(load_chunk(from + part), some);
#pragma unroll
      for (int i = 0; i < kPerChunk<T>; ++i) x[part + i] = some[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = load(from[i]);
  }
}

// Of T at a time: a chunk, or one.
template <bool kWide, typename T>
constexpr int kStep = kWide ? kPerChunk<T> : 1;

template <bool kWide, typename T, typename U>
__device__ __forceinline__ double dot(const T* a, const U* b, int64_t dim) {
  constexpr int kCount = kStep<kWide, T>;
  double sum = 0;
  for (int64_t j = threadIdx.x % 32 * kCount; j < dim; j += 32 * kCount) {
    Acc<T> x[kCount], y[kCount];
    load_values<kWide>(a + j, x);
    load_values<kWide>(b + j, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += double(x[i]) * double(y[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) norm_kernel(const T* x, int64_t rows, int64_t dim, Acc<T>* inverse) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const double norm = ::sqrt(dot<kWide>(x + row * dim, x + row * dim, dim));
  if (threadIdx.x % 32 == 0) inverse[row] = static_cast<Acc<T>>(1 / (norm > kNormFloor ? norm : kNormFloor));
}

// U is T or the accumulator's type; `out` may be `grad`.
template <typename T, typename U, bool kWide>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const T* x, int64_t rows, int64_t dim, const Acc<T>* inverse, const U* grad, T* out) {
  constexpr int kCount = kStep<kWide, T>;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const T* v = x + row * dim;
  const U* g = grad + row * dim;
  const double scale = inverse == nullptr ? 0 : double(inverse[row]);
  const double length = scale == 0 || scale >= kFlooredNorm ? 0 : dot<kWide>(v, g, dim);
  const Acc<T> along = static_cast<Acc<T>>(length * scale * scale);
  for (int64_t j = threadIdx.x % 32 * kCount; j < dim; j += 32 * kCount) {
    Acc<T> value[kCount], direction[kCount];
    load_values<kWide>(g + j, value);
    if (along != Acc<T>(0)) {  // or nothing is projected: the x of an ignored row may be NaN
      load_values<kWide>(v + j, direction);
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] -= along * direction[i];
    }
    if constexpr (kWide) {
      store_chunk(out + row * dim + j, pack<T>(value));
    } else {
      store(out + row * dim + j, value[0]);
    }
  }
}

// A thread adds up one chunk of the parts, or one number.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) add_kernel(const T* parts, int64_t count, int64_t n, Acc<T>* total) {
  using A = Acc<T>;
  constexpr int kCount = kStep<kWide, T>;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (i >= n) return;
  A sum[kCount], x[kCount];
  load_values<kWide>(total + i, sum);
  for (int64_t k = 0; k < count; ++k) {
    load_values<kWide>(parts + k * n + i, x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum[e] += x[e];
  }
  if constexpr (kWide) {
#pragma unroll
    for (int part = 0; part < kCount; part += kPerChunk<A>) {
      uint4 chunk;
      memcpy(&chunk, sum + part, 16);
      store_chunk(total + i + part, chunk);
    }
  } else {
    total[i] = sum[0];
  }
}

}  // namespace facefast
