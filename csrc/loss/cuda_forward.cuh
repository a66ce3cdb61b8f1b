// Softmax on the GPU, forward: groups of threads read each row once, online, and one thread finishes it. A row longer
// than a segment is divided among blocks, always in the same way, so that results do not depend on the grid.
#pragma once

#include <cassert>

#include "cuda_common.cuh"

namespace facefast {

constexpr int kInFlight = 4;          // chunks that a thread has in flight
constexpr int kSegmentChunks = 2048;  // 32 KiB of a row: two rounds of kInFlight chunks for each thread of a block

template <typename A>
struct SegmentStats {
  A peak, mass;
  double sum;
};

// What to do with the statistics of a row: finish its loss, merge them into those of earlier chunks of classes, or
// leave them as those of one segment.
enum class Then { kLoss, kMerge, kStore };

struct Job {
  Problem p;
  Columns c;
  RowState s;
  int segments = 1;
  void* partial = nullptr;    // SegmentStats [rows, segments], when there are several
  Target* targets = nullptr;  // [rows], from target_kernel, for margins that need the angle itself
};

__device__ __forceinline__ int64_t label_of(const Problem& p, int64_t row) {
  return p.target_is_int64 ? static_cast<const int64_t*>(p.target)[row]
                           : static_cast<int64_t>(static_cast<const int32_t*>(p.target)[row]);
}

template <typename A>
__device__ __forceinline__ RowStats<A>& stats_of(const RowState& s, int64_t row) {
  return static_cast<RowStats<A>*>(s.stats)[row];
}

template <typename T>
__device__ __forceinline__ Acc<T> column_scale(const Chunks<T>& chunks, int column, Acc<T> row_scale,
                                               const Acc<T>* cols) {
  return cols != nullptr && column >= 0 && column < chunks.width ? row_scale * cols[column] : Acc<T>(1);
}

// The values of a chunk; kFull scales them by row and column where linear_focal_loss normalises.
template <bool kFull, typename T>
__device__ __forceinline__ void unpack(const Chunks<T>& chunks, int chunk, const Pack<T>& pack, Acc<T> row_scale,
                                       const Acc<T>* cols, Acc<T> (&x)[Chunks<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Chunks<T>::kSize; ++i) {
    x[i] = load(pack.at[i]);
    if constexpr (kFull) x[i] *= column_scale(chunks, chunks.first(chunk) + i, row_scale, cols);
  }
}

// `fill` in the type of the matrix.
template <typename T>
__device__ __forceinline__ T typed(Acc<T> fill) {
  T value;
  store(&value, fill);
  return value;
}

// -----------------------------------------------------------------------------------------------
// Statistics of a row.

template <typename A>
__device__ __forceinline__ SegmentStats<A> merged(SegmentStats<A> a, SegmentStats<A> b, A scale) {
  const Stats<A> both = merge(Stats<A>{a.peak, a.mass}, Stats<A>{b.peak, b.mass}, scale);
  return {both.peak, both.mass, a.sum + b.sum};
}

// Every lane of the group gets a value; lane 0's is the group's, combined in a fixed order. In a warp by halves: lane i
// takes in lane i + 16, then i + 8 and so on, five merges for 32 lanes; a group larger than a warp is a whole block,
// whose first thread merges what the warps found.
template <int kGroup, typename A>
__device__ __forceinline__ SegmentStats<A> combine(SegmentStats<A> mine, A scale) {
  constexpr int kLanes = kGroup < 32 ? kGroup : 32;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    SegmentStats<A> theirs;
    theirs.peak = __shfl_down_sync(0xffffffffu, mine.peak, offset, kLanes);
    theirs.mass = __shfl_down_sync(0xffffffffu, mine.mass, offset, kLanes);
    theirs.sum = __shfl_down_sync(0xffffffffu, mine.sum, offset, kLanes);
    mine = merged(mine, theirs, scale);
  }
  if constexpr (kGroup > 32) {
    __shared__ SegmentStats<A> warps[kGroup / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kGroup / 32; ++w) mine = merged(mine, warps[w], scale);
    }
  }
  return mine;
}

// The statistics of chunks [begin, end) of a row without column `own`, in lane 0 of the group.
template <typename T, int kGroup, bool kFull>
__device__ __forceinline__ SegmentStats<Acc<T>> scan(const Chunks<T>& chunks, int begin, int end, int own,
                                                     Acc<T> row_scale, const Acc<T>* cols, double scale) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize, kUnroll = kInFlight;
  constexpr A kNone = static_cast<A>(-kInf);
  const T none = typed<T>(kNone);
  const Exponential<T> exponential(scale);
  const int lane = threadIdx.x % kGroup;
  A peak = kNone, mass = 0;
  double sum = 0;
  // Online: the sum so far is relative to the greatest value so far. A round of kUnroll chunks first finds its own
  // greatest value, so that the sum is rescaled once a round and not with every new maximum.
  for (int chunk = begin + lane; chunk < end; chunk += kUnroll * kGroup) {
    // The values stay packed and are unpacked twice: that is cheaper than the registers that would hold them.
    Pack<T> packs[kUnroll];
    A x[kSize], highest = peak;
    chunks.read(packs, chunk, kGroup, end, none);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + u * kGroup, inside = own - chunks.first(at);
      if (inside >= 0 && inside < kSize) {  // the label is left out of the sum (docs/focal.md): it becomes -inf
#pragma unroll
        for (int i = 0; i < kSize; ++i) packs[u].at[i] = i == inside ? none : packs[u].at[i];
      }
      unpack<kFull>(chunks, at, packs[u], row_scale, cols, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) highest = x[i] > highest ? x[i] : highest;
    }
    // Nothing above -inf yet: relative to 0 all exponentials are 0, relative to -inf they would be NaN.
    const A reference = highest == kNone ? A(0) : highest;
    A added = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + u * kGroup, first = chunks.first(at);
      unpack<kFull>(chunks, at, packs[u], row_scale, cols, x);
      A part = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        added += exponential(x[i], reference);
        const bool counts = kFull && at < end && first + i >= 0 && first + i < chunks.width && first + i != own;
        if constexpr (kFull) part += counts ? x[i] : A(0);
      }
      if constexpr (kFull) sum += double(part);
    }
    mass = (mass == A(0) ? A(0) : mass * exponential(peak, reference)) + added;
    peak = highest;
  }
  const SegmentStats<A> mine{peak == kNone ? A(0) : peak, mass, sum};
  return combine<kGroup>(mine, static_cast<A>(scale));
}

struct Finished {
  Row row;
  double slope;  // d (target's logit) / d x
};

// The terms of a row whose statistics are complete. A label that is no class gives NaN where assertions are compiled
// out.
template <typename A>
__device__ __forceinline__ Finished finish_row(const Job& job, int64_t row, int64_t label) {
  const Problem& p = job.p;
  const RowStats<A> state = stats_of<A>(job.s, row);
  const bool valid = label >= 0 && label < p.focal.num_classes;
  assert(valid && "facefast: a label is neither a class nor ignore_index");
  double alpha = p.focal.alpha;
  if (p.alpha_by == AlphaBy::kClass && valid) alpha = static_cast<const A*>(p.alpha)[label];
  if (p.alpha_by == AlphaBy::kRow) alpha = static_cast<const A*>(p.alpha)[row];
  Target target = plain_logit(double(state.own), p.focal);
  if (p.focal.margin.active) {
    target = job.targets != nullptr ? job.targets[row] : shifted_logit(double(state.own), p.focal, row);
  }
  const double z = valid ? target.z : kNaN, sum = job.s.sums == nullptr ? 0 : p.focal.scale * job.s.sums[row];
  return {focal_row<A>(z, Stats<A>{state.peak, state.mass}, sum, alpha, p.focal), target.slope};
}

template <typename A>
__device__ __forceinline__ Partial finish_loss(const Job& job, int64_t row, A* losses) {
  const Problem& p = job.p;
  const int64_t label = label_of(p, row);
  const bool counts = label != p.focal.ignore_index;
  const double loss = counts ? finish_row<A>(job, row, label).row.loss : 0;
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

// One group of kGroup threads per row and segment, kThreads / kGroup of them in a block: short rows share a warp, and a
// row never shares a group. kFull is for what few losses need: scaled columns and the sum of the logits. The second
// launch bound lets 4 blocks of 256 threads onto a multiprocessor, which leaves 64 of its 65 536 registers to a thread
// (128 with kFull).
template <typename T, int kGroup, bool kFull>
__global__ void __launch_bounds__(kThreads, kFull ? 2 : 4)
    stats_kernel(const __grid_constant__ Job job, const Then then, Acc<T>* losses, Partial* partial) {
  using A = Acc<T>;
  const Problem& p = job.p;
  const Columns& c = job.c;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGroup;
  const int64_t row = item / job.segments;
  const int segment = static_cast<int>(item % job.segments);
  const bool leads = threadIdx.x % kGroup == 0;
  Partial total{0, 0};
  const bool inside = row < p.rows;
  const int64_t label = inside ? label_of(p, row) : 0;
  const bool counts = inside && label != p.focal.ignore_index;
  // A row that does not count is scanned as one without columns: all lanes of a warp must take part in the shuffles.
  const Chunks<T> chunks(static_cast<const T*>(c.data) + (counts ? row * c.stride : 0),
                         counts ? static_cast<int>(c.width) : 0);
  const int64_t place = label - c.first;
  // Where the label is not among these columns it lies in no chunk: widths are at most 2^30.
  const int own = place >= 0 && place < c.width ? static_cast<int>(place) : -(1 << 30);
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = cols == nullptr || !counts ? A(1) : static_cast<const A*>(c.row_scale)[row];
  const int begin = segment * kSegmentChunks;
  const int end = job.segments == 1 || begin + kSegmentChunks > chunks.count ? chunks.count : begin + kSegmentChunks;
  const SegmentStats<A> found = scan<T, kGroup, kFull>(chunks, begin, end, own, row_scale, cols, p.focal.scale);
  // The thread that has the group's statistics also writes them, and reads them back for the loss: no other thread
  // needs to see them in this launch.
  if (inside && leads) {
    RowStats<A>& state = stats_of<A>(job.s, row);
    const bool starts = c.first == 0;
    if (then == Then::kStore) {
      static_cast<SegmentStats<A>*>(job.partial)[item] = found;
      if (segment == 0 && starts) state.own = 0;
    } else {
      SegmentStats<A> all = found;
      if (!starts) {
        const double before = job.s.sums == nullptr ? 0 : job.s.sums[row];
        all = merged(SegmentStats<A>{state.peak, state.mass, before}, found, static_cast<A>(p.focal.scale));
      }
      state.peak = all.peak;
      state.mass = all.mass;
      if (starts) state.own = 0;
      if (job.s.sums != nullptr) job.s.sums[row] = all.sum;
    }
    // Read directly, whichever segment it lies in: one thread alone writes a row's `own`.
    if (counts && own >= 0 && segment == 0) {
      const A scale = cols == nullptr ? A(1) : row_scale * cols[own];
      state.own = load(chunks.row[own]) * scale;
    }
    if (then == Then::kLoss) total = finish_loss<A>(job, row, losses);
  }
  if (then == Then::kLoss) {
    total = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
  }
}

// One thread per row: merges its segments in order, into what earlier chunks of classes left. A launch of its own,
// since blocks of one launch cannot wait for each other; a segment is 32 KiB, so there are few to merge.
template <typename A>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Job job) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= job.p.rows) return;
  const SegmentStats<A>* segments = static_cast<const SegmentStats<A>*>(job.partial) + row * job.segments;
  RowStats<A>& state = stats_of<A>(job.s, row);
  SegmentStats<A> all{0, 0, 0};
  if (job.c.first != 0) all = {state.peak, state.mass, job.s.sums == nullptr ? 0 : job.s.sums[row]};
  for (int i = 0; i < job.segments; ++i) all = merged(all, segments[i], static_cast<A>(job.p.focal.scale));
  state.peak = all.peak;
  state.mass = all.mass;
  if (job.s.sums != nullptr) job.s.sums[row] = all.sum;
}

// One thread per row: complete statistics to losses.
template <typename A>
__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ Job job, A* losses, Partial* partial) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Partial total{0, 0};
  if (row < job.p.rows) total = finish_loss<A>(job, row, losses);
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace facefast
