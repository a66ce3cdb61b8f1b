// The CUDA back end: which kernels run, with how many threads, on the caller's stream.
#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_backward.cuh"
#include "focal_cuda.h"

namespace facefast {
namespace {

// Threads per row, by its length in chunks alone: short rows share a warp, so that reductions and prologues are shared
// as well; long ones have a block per segment. The modes that scale do with two of the sizes.
template <Mode kMode, typename T, typename F>
void with_group(int64_t chunks, const F& run) {
  using std::integral_constant;
  if constexpr (kMode != Mode::kPlain) {
    return chunks <= 512 ? run(integral_constant<int, 32>{}) : run(integral_constant<int, kThreads>{});
  } else {
    if (chunks <= 4) return run(integral_constant<int, 1>{});
    if (chunks <= 32) return run(integral_constant<int, 8>{});
    if (chunks <= 256) return run(integral_constant<int, 16>{});
    if (chunks <= 512) return run(integral_constant<int, 32>{});
    if (chunks <= kSegmentChunks) return run(integral_constant<int, 128>{});
    return run(integral_constant<int, kThreads>{});
  }
}

template <typename T, typename F>
void with_mode(Mode mode, const F& run) {
  using std::integral_constant;
  if constexpr (!std::is_same_v<T, double>) {
    if (mode == Mode::kPlain) return run(integral_constant<Mode, Mode::kPlain>{});
  }
  mode == Mode::kAnywhere ? run(integral_constant<Mode, Mode::kAnywhere>{})
                          : run(integral_constant<Mode, Mode::kScaled>{});
}

// Tickets for the launches of one stream, which run one after the other and leave each ticket at 0. A captured launch
// may be replayed beside others: it gets tickets of its own, set to 0 in the graph.
constexpr int kStreams = 64;
__device__ unsigned stream_tickets[kStreams][kMostTickets];

unsigned* tickets_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::vector<std::pair<std::pair<int, cudaStream_t>, unsigned*>> known;
  const std::lock_guard lock(mutex);
  const std::pair place{device, stream};
  for (const auto& [key, tickets] : known) {
    if (key == place) return tickets;
  }
  const auto same_device = [&](const auto& entry) { return entry.first.first == device; };
  const auto used = std::count_if(known.begin(), known.end(), same_device);
  if (used == kStreams) return nullptr;
  void* all = nullptr;
  check(cudaGetSymbolAddress(&all, stream_tickets), "tickets");
  known.emplace_back(place, static_cast<unsigned*>(all) + used * kMostTickets);
  return known.back().second;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, void* stream, std::function<void*(int64_t)> scratch)
      : scratch_(std::move(scratch)),
        tickets_([this, device](int64_t count) { return fresh_tickets(device, count); }),
        queue_{{static_cast<cudaStream_t>(stream)}, scratch_, tickets_} {
    // The runtime linked into this library has a current device of its own.
    check(cudaSetDevice(device), "device");
  }

  void forward(const Problem& p, const Columns& c, const RowState& s, void* loss, void* count) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      Job job = make_job<T>(p, c, s);
      set_targets<T>(job, c);
      run_stats<T>(job, Then::kLoss, loss, count);
    });
  }

  void backward(const Problem& p, const Columns& c, const RowState& s, const Upstream& up, void* grad) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      Job job = make_job<T>(p, c, s);
      set_targets<T>(job, {});
      run_gradient<T>(job, up, nullptr, static_cast<T*>(grad), c.width);
    });
  }

  void accumulate(const Problem& p, const Columns& c, const RowState& s) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      Job job = make_job<T>(p, c, s);
      run_stats<T>(job, Then::kMerge, nullptr, nullptr);
    });
  }

  void finish(const Problem& p, const RowState& s, void* loss, void* count) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      using A = Acc<T>;
      Job job{p, {}, s};
      set_targets<T>(job, {});
      job.parts = blocks_for(p.rows, kThreads);
      job.sums = queue_.template sums<A>(job.parts, p.reduction, loss, count);
      job.sums.ticket = tickets_(1);
      queue_.launch(loss_kernel<A>, job.parts, "losses", job, losses_of<A>(p, loss));
    });
  }

  int64_t row_gradient_bytes(Type type) const override {
    return type == Type::kDouble ? sizeof(RowGradient<double>) : sizeof(RowGradient<float>);
  }

  void row_gradients(const Problem& p, const RowState& s, const Upstream& up, void* rows) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      using A = Acc<T>;
      Job job{p, {}, s};
      set_targets<T>(job, {});
      queue_.launch(row_gradient_kernel<A>, blocks_for(p.rows, kThreads), "row gradients", job, up,
                    static_cast<RowGradient<A>*>(rows));
    });
  }

  void write_gradient(const Problem& p, const Columns& c, const void* rows, void* out, int64_t stride) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      run_gradient<T>(make_job<T>(p, c, {}), {}, static_cast<const RowGradient<Acc<T>>*>(rows), static_cast<T*>(out),
                      stride);
    });
  }

  void inverse_norms(Type type, const void* x, int64_t rows, int64_t dim, void* inverse) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      with_width(dim % kPerChunk<T> == 0 && is_aligned(x), [&](auto wide) {
        queue_.launch(norm_kernel<T, wide>, blocks_for(rows, kThreads / 32), "norms", static_cast<const T*>(x), rows,
                      dim, static_cast<Acc<T>*>(inverse));
      });
    });
  }

  void project(Type type, const void* x, int64_t rows, int64_t dim, const void* inverse, const void* grad, void* out,
               bool wide) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      using A = Acc<T>;
      const auto run = [&](const auto* from) {
        using U = std::remove_cvref_t<decltype(*from)>;
        const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(out);
        with_width(dim % kPerChunk<T> == 0 && aligned, [&](auto chunks) {
          queue_.launch(project_kernel<T, U, chunks>, blocks_for(rows, kThreads / 32), "projection",
                        static_cast<const T*>(x), rows, dim, static_cast<const A*>(inverse), from,
                        static_cast<T*>(out));
        });
      };
      wide ? run(static_cast<const A*>(grad)) : run(static_cast<const T*>(grad));
    });
  }

  void prepare(void*, int64_t) override {}

  void add(Type type, const void* parts, int64_t count, int64_t n, void* total) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      with_width(n % kPerChunk<T> == 0 && is_aligned(parts) && is_aligned(total), [&](auto wide) {
        queue_.launch(add_kernel<T, wide>, blocks_for(n, kThreads * kStep<wide, T>), "addition",
                      static_cast<const T*>(parts), count, n, static_cast<Acc<T>*>(total));
      });
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

  template <typename F>
  static void with_width(bool wide, const F& run) {
    wide ? run(std::true_type{}) : run(std::false_type{});
  }

  template <typename A>
  static A* losses_of(const Problem& p, void* loss) {
    return p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr;
  }

  unsigned* fresh_tickets(int device, int64_t count) {
    // What is queued on the legacy stream is never captured, and it must not be asked while another stream is.
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (queue_.stream != nullptr) check(cudaStreamIsCapturing(queue_.stream, &capture), "capture");
    unsigned* known = capture == cudaStreamCaptureStatusNone ? tickets_of(device, queue_.stream) : nullptr;
    if (known != nullptr) return known;
    auto* fresh = static_cast<unsigned*>(scratch_(count * int64_t{sizeof(unsigned)}));
    check(cudaMemsetAsync(fresh, 0, count * sizeof(unsigned), queue_.stream), "tickets");
    return fresh;
  }

  // Rows that begin in the same place of a chunk as those that lie at `to`.
  template <typename T>
  static bool alike(const Columns& c, const T* to, int64_t stride) {
    const auto place = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16; };
    return place(c.data) == place(to) && (c.stride - stride) % kPerChunk<T> == 0;
  }

  // Scaled columns are read in chunks as well where those of the rows begin with their first.
  template <typename T>
  static Mode mode_of(const Job& job, bool anywhere) {
    const Columns& c = job.c;
    const bool whole = is_aligned(c.data) && c.stride % kPerChunk<T> == 0 && is_aligned(c.col_scale);
    if (anywhere || (c.col_scale != nullptr && !whole)) return Mode::kAnywhere;
    return job.s.sums != nullptr || c.col_scale != nullptr ? Mode::kScaled : Mode::kPlain;
  }

  template <typename T>
  Job make_job(const Problem& p, const Columns& c, const RowState& s) {
    if (c.width > (1 << 30)) throw std::runtime_error("facefast: more than 2^30 classes in one matrix");
    Job job{p, c, s};
    const int64_t chunks = chunks_of<T>(c);
    job.segments = static_cast<int>(std::max<int64_t>(1, (chunks + kSegmentChunks - 1) / kSegmentChunks));
    // Of one length, in whole turns of a block, so that none is a short rest.
    const int64_t turns = (chunks + int64_t{job.segments} * kThreads - 1) / (int64_t{job.segments} * kThreads);
    job.segment_chunks = static_cast<int>(turns * kThreads);
    return job;
  }

  // Runs target_kernel where the margin needs the angle itself; `c` is empty once the forward pass is done.
  template <typename T>
  void set_targets(Job& job, const Columns& c) {
    if (!job.p.focal.margin.active || job.p.focal.margin.m1 == 1) return;
    job.targets = static_cast<Target*>(scratch_(job.p.rows * int64_t{sizeof(Target)}));
    Job reads = job;
    reads.c = c;
    queue_.launch(target_kernel<T>, blocks_for(job.p.rows, kThreads), "margin", reads);
  }

  // `loss` and `count` are for Then::kLoss.
  template <typename T>
  void run_stats(Job& job, Then then, void* loss, void* count) {
    using A = Acc<T>;
    const Problem& p = job.p;
    int64_t bundles = 0;
    if (job.segments > 1) {
      job.partial = scratch_(p.rows * job.segments * int64_t{sizeof(SegmentStats<A>)});
      job.bundle = 32;
      while ((p.rows + job.bundle - 1) / job.bundle >= kMostTickets) job.bundle *= 2;
      bundles = (p.rows + job.bundle - 1) / job.bundle;
    }
    with_mode<T>(mode_of<T>(job, false), [&](auto mode) {
      with_group<mode, T>(chunks_of<T>(job.c), [&](auto group) {
        const unsigned blocks = blocks_for(p.rows * job.segments, kThreads / group);
        job.parts = job.segments > 1 ? static_cast<unsigned>(bundles) : blocks;
        if (then == Then::kLoss) job.sums = queue_.template sums<A>(job.parts, p.reduction, loss, count);
        if (blocks > 0 && (then == Then::kLoss || bundles > 0)) {
          job.sums.ticket = tickets_(1 + bundles);
          job.bundles = job.sums.ticket + 1;
        }
        queue_.launch(stats_kernel<T, group, mode>, blocks, "forward", job, then,
                      then == Then::kLoss ? losses_of<A>(p, loss) : nullptr);
      });
    });
  }

  template <typename T>
  void run_gradient(const Job& job, const Upstream& up, const RowGradient<Acc<T>>* ready, T* out, int64_t stride) {
    with_mode<T>(mode_of<T>(job, !alike(job.c, out, stride)), [&](auto mode) {
      with_group<mode, T>(chunks_of<T>(job.c), [&](auto group) {
        const unsigned blocks = blocks_for(job.p.rows * job.segments, kThreads / group);
        queue_.launch(gradient_kernel<T, group, mode>, blocks, "backward", job, up, ready, out, stride);
      });
    });
  }

  std::function<void*(int64_t)> scratch_;
  std::function<unsigned*(int64_t)> tickets_;
  Queue queue_;
};

}  // namespace

std::unique_ptr<Backend> cuda_backend(int device, void* stream, std::function<void*(int64_t)> scratch) {
  return std::make_unique<CudaBackend>(device, stream, std::move(scratch));
}

}  // namespace facefast
