// The softmax losses on the GPU. Forward: groups of threads read each row once, online, and one thread finishes it.
// Backward: the same groups stream the row once more. A row longer than a segment is divided among blocks, always in
// the same way, so that results do not depend on the grid.
#include <cassert>

#include "cuda_common.cuh"
#include "focal_cuda.h"

namespace facefast {
namespace {

constexpr int kUnroll = 4;            // chunks that a thread has in flight
constexpr int kSegmentChunks = 2048;  // 32 KiB of a row

template <typename A>
struct SegmentStats {
  A peak, mass;
  double sum;
};

// What to do with the statistics of a row.
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

// The values of a chunk, scaled by row and column where linear_focal_loss normalises.
template <typename T>
__device__ __forceinline__ void unpack(const Chunks<T>& chunks, int chunk, const Pack<T>& pack, Acc<T> row_scale,
                                       const Acc<T>* cols, Acc<T> (&x)[Chunks<T>::kSize]) {
  const int first = chunks.first(chunk);
#pragma unroll
  for (int i = 0; i < Chunks<T>::kSize; ++i) {
    x[i] = load(pack.at[i]);
    if (cols != nullptr && first + i >= 0 && first + i < chunks.width) x[i] *= row_scale * cols[first + i];
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

// Every lane of the group gets a value; lane 0's is the group's, combined in a fixed order.
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
template <typename T, int kGroup>
__device__ __forceinline__ SegmentStats<Acc<T>> scan(const Chunks<T>& chunks, int begin, int end, int own,
                                                     Acc<T> row_scale, const Acc<T>* cols, double scale,
                                                     bool with_sum) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize;
  constexpr A kNone = static_cast<A>(-kInf);
  const Exponential<T> exponential(scale);
  const int lane = threadIdx.x % kGroup;
  A peak = kNone, mass = 0;
  double sum = 0;
  for (int chunk = begin + lane; chunk < end; chunk += kUnroll * kGroup) {
    Pack<T> packs[kUnroll];
    A x[kUnroll][kSize];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + u * kGroup;
      packs[u] = chunks.read(at < end ? at : chunks.count, typed<T>(kNone));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack(chunks, chunk + u * kGroup, packs[u], row_scale, cols, x[u]);
    A highest = kNone;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int inside = own - chunks.first(chunk + u * kGroup);
      if (inside >= 0 && inside < kSize) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[u][i] = i == inside ? kNone : x[u][i];
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) highest = x[u][i] > highest ? x[u][i] : highest;
    }
    if (with_sum) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int first = chunks.first(chunk + u * kGroup);
        A part = 0;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const bool counts =
              chunk + u * kGroup < end && first + i >= 0 && first + i < chunks.width && first + i != own;
          part += counts ? x[u][i] : A(0);
        }
        sum += double(part);
      }
    }
    const A higher = highest > peak ? highest : peak;
    const A at = higher == kNone ? A(0) : higher;
    A added = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) added += exponential(x[u][i], at);
    }
    mass = (mass == A(0) ? A(0) : mass * exponential(peak, at)) + added;
    peak = higher;
  }
  const SegmentStats<A> mine{peak == kNone ? A(0) : peak, mass, sum};
  return combine<kGroup>(mine, static_cast<A>(scale));
}

struct Finished {
  Row row;
  double slope;  // d (target's logit) / d x
};

// The terms of a row whose statistics are complete. A label that is no class gives NaN where assertions are compiled out.
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
__global__ void __launch_bounds__(kThreads) target_kernel(const Job job) {
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

// One group of threads per row and segment.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const Job job, const Then then, Acc<T>* losses, Partial* partial) {
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
  const int own = place >= 0 && place < c.width ? static_cast<int>(place) : -(1 << 30);
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = cols == nullptr || !counts ? A(1) : static_cast<const A*>(c.row_scale)[row];
  const int begin = segment * kSegmentChunks;
  const int end = job.segments == 1 || begin + kSegmentChunks > chunks.count ? chunks.count : begin + kSegmentChunks;
  const SegmentStats<A> found =
      scan<T, kGroup>(chunks, begin, end, own, row_scale, cols, p.focal.scale, job.s.sums != nullptr);
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

// One thread per row: merges its segments in order, into what earlier chunks of classes left.
template <typename A>
__global__ void __launch_bounds__(kThreads) merge_kernel(const Job job) {
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
__global__ void __launch_bounds__(kThreads) loss_kernel(const Job job, A* losses, Partial* partial) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Partial total{0, 0};
  if (row < job.p.rows) total = finish_loss<A>(job, row, losses);
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// -----------------------------------------------------------------------------------------------
// Gradients.

// The gradient of a row with everything folded in: column j gets others * exp(scale * (x_j - peak)) + constant.
template <typename A>
struct RowGradient {
  A others, constant, target, peak;
};

template <typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(const Problem& p, const RowState& s, const Upstream& up,
                                                       int64_t row, int64_t label) {
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
__global__ void __launch_bounds__(kThreads) row_gradient_kernel(const Job job, const Upstream up, RowGradient<A>* out) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= job.p.rows) return;
  const int64_t label = label_of(job.p, row);
  if (label != job.p.focal.ignore_index) out[row] = row_gradient<A>(job, up, row, label);
}

// One group of threads per row and segment. The row's numbers come from `ready`, or are computed by the group's first
// thread while the first chunks are on their way. `out` may be the matrix itself.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const Job job, const Upstream up, const RowGradient<Acc<T>>* ready, T* out, int64_t out_stride) {
  using A = Acc<T>;
  constexpr int kSize = Chunks<T>::kSize;
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

  Pack<T> packs[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = begin + lane + u * kGroup;
    packs[u] = chunks.read(at < end ? at : chunks.count, typed<T>(0));
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

  const Exponential<T> exponential(p.focal.scale);
  for (int chunk = begin + lane; chunk < end; chunk += kUnroll * kGroup) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + u * kGroup, first = chunks.first(at);
      if (at >= end) break;
      A x[kSize];
      unpack(chunks, at, packs[u], row_scale, cols, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const A other = g.others * exponential(x[i], g.peak) + g.constant;
        x[i] = counts ? (first + i == own ? g.target : other) : A(0);
        if (cols != nullptr && first + i >= 0 && first + i < chunks.width) x[i] *= row_scale * cols[first + i];
      }
      chunks.write(at, x, to, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = chunk + (kUnroll + u) * kGroup;
      packs[u] = chunks.read(at < end ? at : chunks.count, typed<T>(0));
    }
  }
}

// -----------------------------------------------------------------------------------------------
// Normalisation: one warp per row, products added in double.

template <typename T>
__device__ __forceinline__ double dot(const T* a, const T* b, int64_t dim) {
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
  if (threadIdx.x % 32 == 0) inverse[row] = static_cast<Acc<T>>(1 / (norm > 1e-12 ? norm : 1e-12));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const T* x, int64_t rows, int64_t dim, const Acc<T>* inverse, T* grad) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const double scale = double(inverse[row]);
  if (scale >= 0.999e12) return;  // the norm was floored: a constant, without a derivative
  const T* v = x + row * dim;
  T* g = grad + row * dim;
  const Acc<T> along = static_cast<Acc<T>>(dot(v, g, dim) * scale * scale);
  for (int64_t j = threadIdx.x % 32; j < dim; j += 32) store(g + j, load(g[j]) - along * load(v[j]));
}

// -----------------------------------------------------------------------------------------------
// Launches.

// Threads per row, by its length in chunks: short rows share a warp, long ones have a block per segment. Double is for
// checking gradients and does without the short groups.
template <typename T, typename F>
void with_group(int64_t chunks, const F& run) {
  if constexpr (!std::is_same_v<T, double>) {
    if (chunks <= 4) return run(std::integral_constant<int, 1>{});
    if (chunks <= 32) return run(std::integral_constant<int, 8>{});
  }
  if (chunks <= 1024) return run(std::integral_constant<int, 32>{});
  return run(std::integral_constant<int, kThreads>{});
}

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, void* stream, std::function<void*(int64_t)> scratch)
      : scratch_(std::move(scratch)), queue_{static_cast<cudaStream_t>(stream), scratch_} {
    // The runtime linked into this library has a current device of its own.
    check(cudaSetDevice(device), "device");
  }

  void forward(const Problem& p, const Columns& c, const RowState& s, void* loss, void* count) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      using A = Acc<T>;
      A* losses = p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr;
      Job job = make_job<T>(p, c, s);
      if (job.segments > 1) {
        run_stats<T>(job, Then::kStore, nullptr, nullptr);
        queue_.launch(merge_kernel<A>, blocks_for(p.rows, kThreads), "merge", job);
        run_loss<A>(job, losses, loss, count);
        return;
      }
      with_group<T>(chunks_of<T>(c), [&](auto group) {
        const int64_t blocks = blocks_for(p.rows, kThreads / group);
        auto* partial = static_cast<Partial*>(scratch_((blocks + 1) * sizeof(Partial)));
        run_stats<T>(job, Then::kLoss, losses, partial);
        queue_.template reduce<A>(partial, blocks, p.reduction, loss, count);
      });
    });
  }

  void backward(const Problem& p, const Columns& c, const RowState& s, const Upstream& up, void* grad) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      run_gradient<T>(make_job<T>(p, c, s), up, nullptr, static_cast<T*>(grad), c.width);
    });
  }

  void accumulate(const Problem& p, const Columns& c, const RowState& s) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      Job job = make_job<T>(p, c, s);
      run_stats<T>(job, job.segments > 1 ? Then::kStore : Then::kMerge, nullptr, nullptr);
      if (job.segments > 1) queue_.launch(merge_kernel<Acc<T>>, blocks_for(p.rows, kThreads), "merge", job);
    });
  }

  void finish(const Problem& p, const RowState& s, void* loss, void* count) override {
    with_type(p.type, [&](auto type) {
      using A = Acc<decltype(type)>;
      run_loss<A>(Job{p, {}, s}, p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr, loss, count);
    });
  }

  int64_t row_gradient_bytes(Type type) const override {
    return type == Type::kDouble ? sizeof(RowGradient<double>) : sizeof(RowGradient<float>);
  }

  void row_gradients(const Problem& p, const RowState& s, const Upstream& up, void* rows) override {
    with_type(p.type, [&](auto type) {
      using A = Acc<decltype(type)>;
      queue_.launch(row_gradient_kernel<A>, blocks_for(p.rows, kThreads), "row gradients", Job{p, {}, s}, up,
                    static_cast<RowGradient<A>*>(rows));
    });
  }

  void overwrite(const Problem& p, const Columns& c, const void* rows) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      T* out = static_cast<T*>(const_cast<void*>(c.data));
      run_gradient<T>(make_job<T>(p, c, {}), {}, static_cast<const RowGradient<Acc<T>>*>(rows), out, c.stride);
    });
  }

  void inverse_norms(Type type, const void* x, int64_t rows, int64_t dim, void* inverse) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      queue_.launch(norm_kernel<T>, blocks_for(rows, kThreads / 32), "norms", static_cast<const T*>(x), rows, dim,
                    static_cast<Acc<T>*>(inverse));
    });
  }

  void project(Type type, const void* x, int64_t rows, int64_t dim, const void* inverse, void* grad) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      queue_.launch(project_kernel<T>, blocks_for(rows, kThreads / 32), "projection", static_cast<const T*>(x), rows,
                    dim, static_cast<const Acc<T>*>(inverse), static_cast<T*>(grad));
    });
  }

  void sigmoid_forward(const Sigmoid& p, void* loss, void* count) override {
    sigmoid_cuda_forward(queue_, p, loss, count);
  }

  void sigmoid_backward(const Sigmoid& p, const Upstream& up, void* grad) override {
    sigmoid_cuda_backward(queue_, p, up, grad);
  }

 private:
  // Chunks of a row at most: one more than its length, for a row that starts inside one.
  template <typename T>
  static int64_t chunks_of(const Columns& c) {
    return (c.width + 2 * Chunks<T>::kSize - 2) / Chunks<T>::kSize;
  }

  template <typename T>
  Job make_job(const Problem& p, const Columns& c, const RowState& s) {
    if (c.width > (1 << 30)) throw std::runtime_error("facefast: more than 2^30 classes in one matrix");
    Job job{p, c, s};
    job.segments = static_cast<int>((chunks_of<T>(c) + kSegmentChunks - 1) / kSegmentChunks);
    if (job.segments == 0) job.segments = 1;
    return job;
  }

  template <typename T>
  void run_stats(Job& job, Then then, Acc<T>* losses, Partial* partial) {
    if (job.segments > 1) {
      job.partial = scratch_(job.p.rows * job.segments * int64_t{sizeof(SegmentStats<Acc<T>>)});
    }
    with_group<T>(chunks_of<T>(job.c), [&](auto group) {
      const unsigned blocks = blocks_for(job.p.rows * job.segments, kThreads / group);
      queue_.launch(stats_kernel<T, group>, blocks, "forward", job, then, losses, partial);
    });
  }

  template <typename A>
  void run_loss(const Job& job, A* losses, void* loss, void* count) {
    const unsigned blocks = blocks_for(job.p.rows, kThreads);
    auto* partial = static_cast<Partial*>(scratch_((int64_t{blocks} + 1) * sizeof(Partial)));
    queue_.launch(loss_kernel<A>, blocks, "losses", job, losses, partial);
    queue_.template reduce<A>(partial, blocks, job.p.reduction, loss, count);
  }

  template <typename T>
  void run_gradient(const Job& job, const Upstream& up, const RowGradient<Acc<T>>* ready, T* out, int64_t stride) {
    with_group<T>(chunks_of<T>(job.c), [&](auto group) {
      const unsigned blocks = blocks_for(job.p.rows * job.segments, kThreads / group);
      queue_.launch(gradient_kernel<T, group>, blocks, "backward", job, up, ready, out, stride);
    });
  }

  std::function<void*(int64_t)> scratch_;
  Queue queue_;
};

}  // namespace

std::unique_ptr<Backend> cuda_backend(int device, void* stream, std::function<void*(int64_t)> scratch) {
  return std::make_unique<CudaBackend>(device, stream, std::move(scratch));
}

}  // namespace facefast
