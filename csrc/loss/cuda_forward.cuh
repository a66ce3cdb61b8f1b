// Softmax on the GPU, forward: groups of threads read each row once, online, and then a thread a row finishes them. A
// row longer than a segment is divided among blocks, always in the same way, so that results do not depend on the grid.
// One launch does all of it, sums over the rows included.
#pragma once

#include <cassert>

#include "cuda_common.cuh"

namespace facefast {

constexpr int kInFlight = 4;          // chunks that a thread has in flight
constexpr int kSegmentChunks = 2048;  // 32 KiB of a row at most: two rounds of kInFlight chunks for each thread

template <typename A>
struct SegmentStats {
  A peak, mass;
  double sum;
};

// What to do with the statistics of a row: finish its loss, or merge them into those of earlier chunks of classes.
enum class Then { kLoss, kMerge };

// kPlain reads a matrix as it is. kScaled scales columns, and adds the logits up for label smoothing; kAnywhere does so
// where its operands do not lie alike (a view's odd columns), element by element. Few losses need them, and the
// streaming kernels keep their registers.
enum class Mode { kPlain, kScaled, kAnywhere };

struct Job {
  Problem p;
  Columns c;
  RowState s;
  int segments = 1;
  int segment_chunks = 0;
  void* partial = nullptr;      // SegmentStats [rows, segments], when there are several
  int64_t bundle = 1;           // rows whose segments the last of their blocks merges
  unsigned* bundles = nullptr;  // tickets, one for each bundle
  Target* targets = nullptr;    // [rows], from target_kernel, for margins that need the angle itself
  unsigned parts = 0;           // how many sums are handed in
  Sums sums;
};

__device__ __forceinline__ int64_t label_of(const Problem& p, int64_t row) {
  return p.target_is_int64 ? static_cast<const int64_t*>(p.target)[row]
                           : static_cast<int64_t>(static_cast<const int32_t*>(p.target)[row]);
}

template <typename A>
__device__ __forceinline__ RowStats<A>& stats_of(const RowState& s, int64_t row) {
  return static_cast<RowStats<A>*>(s.stats)[row];
}

// Where among these columns the label lies, -1 if it is of others or of none.
__device__ __forceinline__ int own_column(const Columns& c, int64_t label) {
  const int64_t place = label - c.first;
  return place >= 0 && place < c.width ? static_cast<int>(place) : -1;
}

// The factors of a chunk's columns, 1 where there are none and outside the row. kTogether for a whole chunk whose
// columns' numbers are aligned as well.
template <bool kTogether, typename T>
__device__ __forceinline__ void column_scales(const Chunks<T>& chunks, int chunk, Acc<T> row_scale, const Acc<T>* cols,
                                              Acc<T> (&scale)[Chunks<T>::kSize]) {
  const int first = chunks.first(chunk);
  if (kTogether && cols != nullptr) load_run(cols + first, scale);
#pragma unroll
  for (int i = 0; i < Chunks<T>::kSize; ++i) {
    const int column = first + i;
    if (cols == nullptr) {
      scale[i] = 1;
    } else if constexpr (kTogether) {
      scale[i] *= row_scale;
    } else {
      scale[i] = column >= 0 && column < chunks.width ? row_scale * cols[column] : Acc<T>(1);
    }
  }
}

// -----------------------------------------------------------------------------------------------
// Statistics of a row.

template <typename A>
__device__ __forceinline__ SegmentStats<A> merged(SegmentStats<A> a, SegmentStats<A> b, A scale) {
  const Stats<A> both = merge(Stats<A>{a.peak, a.mass}, Stats<A>{b.peak, b.mass}, scale);
  return {both.peak, both.mass, a.sum + b.sum};
}

// What a thread knows of the values it has seen: the greatest, and the sum of their exponentials relative to it. Chunks
// are taken in several at a time: their own greatest value is found first, so that the sum is rescaled once for all.
template <typename T>
struct Running {
  using A = Acc<T>;
  static constexpr A kNone = static_cast<A>(-kInf);
  A peak = kNone, mass = 0;

  // The new reference, to which the mass so far is brought. Nothing above -inf yet: relative to 0 all exponentials are
  // 0, relative to -inf they would be NaN.
  __device__ __forceinline__ A rise(A highest, const Exponential<T>& exponential) {
    highest = greater(peak, highest);
    const A reference = highest == kNone ? A(0) : highest;
    mass *= exponential(peak, reference);
    peak = highest;
    return reference;
  }

  // Whole chunks as they lie in memory.
  template <int kCount>
  __device__ __forceinline__ void take(const uint4 (&chunks)[kCount], const Exponential<T>& exponential) {
    const A reference = rise(greatest<T>(chunks), exponential);
    const auto total = [&](const auto& of) {
      A sums[kCount];
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        A x[kPerChunk<T>];
        unpack<T>(chunks[u], x);
        sums[u] = of(x[0]);
#pragma unroll
        for (int i = 1; i < kPerChunk<T>; ++i) sums[u] += of(x[i]);
      }
#pragma unroll
      for (int u = 1; u < kCount; ++u) sums[0] += sums[u];
      return sums[0];
    };
    if constexpr (sizeof(T) == 2) {
      const auto relative = exponential.relative_to(reference);
      if (!exponential.far(relative)) {
        mass += total(relative) * relative.correction;
        return;
      }
    }
    mass += total([&](A x) { return exponential(x, reference); });
  }

  // Values of a chunk.
  __device__ __forceinline__ void take(const A (&x)[kPerChunk<T>], const Exponential<T>& exponential) {
    A highest = x[0];
#pragma unroll
    for (int i = 1; i < kPerChunk<T>; ++i) highest = greater(highest, x[i]);
    const A reference = rise(highest, exponential);
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) mass += exponential(x[i], reference);
  }
};

// Every lane of the group gets a value; that of its first thread is the group's, combined in a fixed order: first the
// greatest value of all, then the masses relative to it. In a warp by halves: lane i takes in lane i + 16, then i + 8
// and so on; of a larger group the first thread adds what its warps found.
template <typename T, int kGroup>
__device__ __forceinline__ SegmentStats<Acc<T>> combine(Running<T> mine, double sum, bool summed,
                                                        const Exponential<T>& exponential) {
  using A = Acc<T>;
  constexpr int kLanes = kGroup < 32 ? kGroup : 32, kWarps = kGroup / 32;
  A highest = mine.peak;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    highest = greater(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
  }
  const int warp = threadIdx.x / 32, first_warp = kGroup > 32 ? warp / kWarps * kWarps : warp;
  if constexpr (kGroup > 32) {
    __shared__ A peaks[kThreads / 32];
    if (threadIdx.x % 32 == 0) peaks[warp] = highest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) highest = greater(highest, peaks[first_warp + w]);
  }
  mine.rise(highest, exponential);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    mine.mass += __shfl_down_sync(0xffffffffu, mine.mass, offset, kLanes);
    if (summed) sum += __shfl_down_sync(0xffffffffu, sum, offset, kLanes);
  }
  if constexpr (kGroup > 32) {
    __shared__ A masses[kThreads / 32];
    __shared__ double sums[kThreads / 32];
    if (threadIdx.x % 32 == 0) {
      masses[warp] = mine.mass;
      sums[warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x % kGroup == 0) {
      for (int w = 1; w < kWarps; ++w) {
        mine.mass += masses[warp + w];
        sum += sums[warp + w];
      }
    }
  }
  return {mine.peak == Running<T>::kNone ? A(0) : mine.peak, mine.mass, sum};
}

// A round of chunks, kGroup apart; `none` from `end` on and where `skipped` lies. kConstant if this launch writes to
// the matrix nowhere.
template <typename T, int kGroup, bool kConstant>
__device__ __forceinline__ void load_round(const Chunks<T>& chunks, int chunk, int end, int skipped, uint4 none,
                                           uint4 (&round)[kInFlight]) {
  const T* base = chunks.row - chunks.head;
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int at = chunk + u * kGroup;
    round[u] = none;
    if (at >= end || at == skipped) continue;
    const T* place = base + int64_t{at} * kPerChunk<T>;
    round[u] = kConstant ? load_constant(place) : load_chunk(place);
  }
}

// The statistics of chunks [begin, end) of a row without column `own`, in the group's first thread.
//
// The label is left out of the sum (docs/focal.md). Its chunk is one of the row's odd ones, at most three, which a
// thread each reads element by element; in the main loop, which reads nothing but whole chunks, it counts as empty, so
// that no value there is compared with anything but the greatest.
template <typename T, int kGroup, Mode kMode>
__device__ __forceinline__ SegmentStats<Acc<T>> scan(const Chunks<T>& chunks, int begin, int end, int own,
                                                     Acc<T> row_scale, const Acc<T>* cols, double scale, bool summed) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize;
  const uint4 none = filled<T>(Running<T>::kNone);
  const Exponential<T> exponential(scale);
  const int lane = threadIdx.x % kGroup;
  const int from = begin > chunks.whole_begin() ? begin : chunks.whole_begin();
  const int to = end < chunks.whole_end() ? end : chunks.whole_end();
  const int own_chunk = own >= 0 ? chunks.holding(own) : -1;
  Running<T> running;
  double sum = 0;
  const auto take_odd = [&](int number) {
    const int chunk = chunks.odd(number, begin, end, own);
    if (chunk < 0) return;
    A x[kSize];
    chunks.read(chunk, own, Running<T>::kNone, x);
    if constexpr (kMode != Mode::kPlain) {
      A factor[kSize];
      column_scales<false>(chunks, chunk, row_scale, cols, factor);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        x[i] *= factor[i];
        const int column = chunks.first(chunk) + i;
        if (column >= 0 && column < chunks.width && column != own) sum += double(x[i]);
      }
    }
    running.take(x, exponential);
  };

  for (int chunk = from + lane; chunk < to; chunk += kInFlight * kGroup) {
    uint4 round[kInFlight];
    load_round<T, kGroup, true>(chunks, chunk, to, own_chunk, none, round);
    if constexpr (kMode == Mode::kPlain) {
      running.take(round, exponential);
    } else {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = chunk + u * kGroup;
        if (at >= to || at == own_chunk) continue;
        A x[kSize], factor[kSize], part = 0;
        unpack<T>(round[u], x);
        column_scales<kMode == Mode::kScaled>(chunks, at, row_scale, cols, factor);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          x[i] *= factor[i];
          part += x[i];
        }
        running.take(x, exponential);
        if (summed) sum += double(part);
      }
    }
  }
  if constexpr (kGroup == 1) {
    for (int number = 0; number < 3; ++number) take_odd(number);
  } else {
    take_odd(lane);
  }
  return combine<T, kGroup>(running, sum, summed, exponential);
}

struct Finished {
  Row row;
  double slope;  // d (target's logit) / d x
};

// The terms of a row whose statistics are complete. A label that is no class gives NaN where assertions are compiled
// out.
template <typename A>
__device__ __forceinline__ Finished finish_row(const Job& job, int64_t row, int64_t label, RowStats<A> state,
                                               double others) {
  const Problem& p = job.p;
  const bool valid = label >= 0 && label < p.focal.num_classes;
  assert(valid && "facefast: a label is neither a class nor ignore_index");
  double alpha = p.focal.alpha;
  if (p.alpha_by == AlphaBy::kClass && valid) alpha = static_cast<const A*>(p.alpha)[label];
  if (p.alpha_by == AlphaBy::kRow) alpha = static_cast<const A*>(p.alpha)[row];
  Target target = plain_logit(double(state.own), p.focal);
  if (p.focal.margin.active) {
    target = job.targets != nullptr ? job.targets[row] : shifted_logit(double(state.own), p.focal, row);
  }
  const double z = valid ? target.z : kNaN;
  return {focal_row<A>(z, Stats<A>{state.peak, state.mass}, p.focal.scale * others, alpha, p.focal), target.slope};
}

template <typename A>
__device__ __forceinline__ Partial finish_loss(const Job& job, int64_t row, RowStats<A> state, double others,
                                               A* losses) {
  const Problem& p = job.p;
  const int64_t label = label_of(p, row);
  const bool counts = label != p.focal.ignore_index;
  const double loss = counts ? finish_row<A>(job, row, label, state, others).row.loss : 0;
  if (losses != nullptr) losses[row] = static_cast<A>(loss);
  return {loss, counts ? 1.0 : 0.0};
}

// One thread per row: the target's logit where the margin needs trigonometry, which would crowd the other kernels'
// registers. The target's value comes from the columns at hand, or from what the forward pass left.
template <typename T>
__global__ void __launch_bounds__(kThreads) target_kernel(const __grid_constant__ Job job) {
  using A = Acc<T>;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= job.p.rows) return;
  A own = 0;
  if (job.c.data == nullptr) {
    own = stats_of<A>(job.s, row).own;
  } else {
    const int64_t label = label_of(job.p, row);
    if (label >= 0 && label < job.c.width) own = load(static_cast<const T*>(job.c.data)[row * job.c.stride + label]);
  }
  job.targets[row] = angular_logit(double(own), job.p.focal, row);
}

// The label's own value, read directly, whichever segment it lies in.
template <typename A>
struct Own {
  A value = 0;
  bool here = false;
};

template <typename T>
__device__ __forceinline__ Own<Acc<T>> own_of(const Job& job, int64_t row) {
  using A = Acc<T>;
  const Columns& c = job.c;
  const int64_t label = label_of(job.p, row);
  const int own = own_column(c, label);
  if (own < 0 || label == job.p.focal.ignore_index) return {};
  const A* cols = static_cast<const A*>(c.col_scale);
  const A scale = cols == nullptr ? A(1) : static_cast<const A*>(c.row_scale)[row] * cols[own];
  return {load(static_cast<const T*>(c.data)[row * c.stride + own]) * scale, true};
}

// What is left to do for a row, by the one thread that has the statistics of these columns.
template <typename A>
__device__ __forceinline__ Partial settle(const Job& job, Then then, int64_t row, SegmentStats<A> all, Own<A> own,
                                          A* losses) {
  RowStats<A>& state = stats_of<A>(job.s, row);
  RowStats<A> now{all.peak, all.mass, own.value};
  if (job.c.first != 0) {
    const RowStats<A> before = state;
    const double sum = job.s.sums == nullptr ? 0 : job.s.sums[row];
    all = merged(SegmentStats<A>{before.peak, before.mass, sum}, all, static_cast<A>(job.p.focal.scale));
    now = {all.peak, all.mass, own.here ? own.value : before.own};
  }
  state = now;
  if (job.s.sums != nullptr) job.s.sums[row] = all.sum;
  return then == Then::kLoss ? finish_loss<A>(job, row, now, all.sum, losses) : Partial{0, 0};
}

template <typename A>
__device__ __forceinline__ SegmentStats<A> load_shared(const SegmentStats<A>* from) {
  return {__ldcg(&from->peak), __ldcg(&from->mass), __ldcg(&from->sum)};
}

// Merges the segments of a bundle's rows, in order, and settles them: a thread a row.
template <typename T>
__device__ __forceinline__ Partial settle_bundle(const Job& job, Then then, int64_t first, int64_t rows,
                                                 Acc<T>* losses) {
  using A = Acc<T>;
  Partial total{0, 0};
  for (int64_t row = first + threadIdx.x; row < first + rows; row += kThreads) {
    const Own<A> own = own_of<T>(job, row);
    const SegmentStats<A>* segments = static_cast<const SegmentStats<A>*>(job.partial) + row * job.segments;
    SegmentStats<A> all{0, 0, 0};
#pragma unroll 4
    for (int i = 0; i < job.segments; ++i) {
      all = merged(all, load_shared(segments + i), static_cast<A>(job.p.focal.scale));
    }
    const Partial one = settle(job, then, row, all, own, losses);
    total.loss += one.loss;
    total.count += one.count;
  }
  return total;
}

// Blocks of 256 threads on a multiprocessor at a time, which share its 65 536 registers: 5 leave 48 to a thread, 4
// leave 64 where segments are merged as well, 2 leave 128 where columns are scaled.
constexpr int blocks_wanted(int group, Mode mode) { return mode != Mode::kPlain ? 2 : group == kThreads ? 4 : 5; }

// One group of kGroup threads per row and segment, kThreads / kGroup of them in a block: short rows share a warp, and a
// row never shares a group. Then thread t of the block finishes the block's row t: side by side, since the arithmetic
// of a row's loss is a long chain that a lone thread would keep the whole block waiting for.
template <typename T, int kGroup, Mode kMode>
__global__ void __launch_bounds__(kThreads, blocks_wanted(kGroup, kMode))
    stats_kernel(const __grid_constant__ Job job, const Then then, Acc<T>* losses) {
  using A = Acc<T>;
  constexpr int kRows = kThreads / kGroup;
  const Problem& p = job.p;
  const Columns& c = job.c;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGroup;
  const int64_t row = item / job.segments;
  const int segment = static_cast<int>(item % job.segments);
  const bool inside = row < p.rows;
  const int64_t label = inside ? label_of(p, row) : 0;
  const bool counts = inside && label != p.focal.ignore_index;
  // A row that does not count is scanned as one without columns: all lanes of a warp must take part in the shuffles.
  const Chunks<T> chunks(static_cast<const T*>(c.data) + (counts ? row * c.stride : 0),
                         counts ? static_cast<int>(c.width) : 0);
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = cols == nullptr || !counts ? A(1) : static_cast<const A*>(c.row_scale)[row];
  const int begin = segment * job.segment_chunks;
  const int end = segment + 1 == job.segments ? chunks.count : begin + job.segment_chunks;
  const SegmentStats<A> found = scan<T, kGroup, kMode>(chunks, begin, end, counts ? own_column(c, label) : -1,
                                                       row_scale, cols, p.focal.scale, job.s.sums != nullptr);
  Partial total{0, 0};
  if (kGroup == kThreads && job.segments > 1) {
    if (threadIdx.x == 0) static_cast<SegmentStats<A>*>(job.partial)[item] = found;
    const int64_t bundle = row / job.bundle, first = bundle * job.bundle;
    const int64_t rows = first + job.bundle < p.rows ? job.bundle : p.rows - first;
    if (!comes_last(job.bundles + bundle, static_cast<unsigned>(rows * job.segments))) return;
    total = settle_bundle<T>(job, then, first, rows, losses);
    if (then == Then::kLoss) add_up<A>(job.sums, block_sum(total), static_cast<unsigned>(bundle), job.parts);
    return;
  }
  __shared__ SegmentStats<A> of_rows[kRows];
  if (threadIdx.x % kGroup == 0) of_rows[threadIdx.x / kGroup] = found;
  __syncthreads();
  const int64_t mine = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (threadIdx.x < kRows && mine < p.rows) {
    total = settle(job, then, mine, of_rows[threadIdx.x], own_of<T>(job, mine), losses);
  }
  if (then == Then::kLoss) add_up<A>(job.sums, block_sum<kRows>(total), blockIdx.x, job.parts);
}

// One thread per row: complete statistics to losses.
template <typename A>
__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ Job job, A* losses) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Partial total{0, 0};
  if (row < job.p.rows) {
    const double others = job.s.sums == nullptr ? 0 : job.s.sums[row];
    total = finish_loss<A>(job, row, stats_of<A>(job.s, row), others, losses);
  }
  add_up<A>(job.sums, block_sum(total), blockIdx.x, job.parts);
}

}  // namespace facefast
