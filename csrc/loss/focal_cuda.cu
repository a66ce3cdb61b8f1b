// The CUDA back end: which kernels run, with how many threads, on the caller's stream.
#include "cuda_backward.cuh"
#include "focal_cuda.h"

namespace facefast {
namespace {

// Threads per row, by its length in chunks: short rows share a warp, long ones have a block per segment. The full
// kernels, and double, which is for checking gradients, do without the short groups.
template <typename T, typename F>
void with_group(int64_t chunks, bool full, const F& run) {
  constexpr std::bool_constant<true> kFull;
  if (full || std::is_same_v<T, double>) {
    return chunks <= 1024 ? run(std::integral_constant<int, 32>{}, kFull)
                          : run(std::integral_constant<int, kThreads>{}, kFull);
  }
  if constexpr (!std::is_same_v<T, double>) {
    constexpr std::bool_constant<false> kPlain;
    if (chunks <= 4) return run(std::integral_constant<int, 1>{}, kPlain);
    if (chunks <= 32) return run(std::integral_constant<int, 8>{}, kPlain);
    if (chunks <= 1024) return run(std::integral_constant<int, 32>{}, kPlain);
    return run(std::integral_constant<int, kThreads>{}, kPlain);
  }
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
      set_targets<T>(job, c);
      if (job.segments > 1) {
        run_stats<T>(job, Then::kStore, nullptr, nullptr);
        queue_.launch(merge_kernel<A>, blocks_for(p.rows, kThreads), "merge", job);
        run_loss<A>(job, losses, loss, count);
        return;
      }
      with_group<T>(chunks_of<T>(c), is_full(job), [&](auto group, auto) {
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
      Job job = make_job<T>(p, c, s);
      set_targets<T>(job, {});
      run_gradient<T>(job, up, nullptr, static_cast<T*>(grad), c.width);
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
      using T = decltype(type);
      using A = Acc<T>;
      Job job{p, {}, s};
      set_targets<T>(job, {});
      run_loss<A>(job, p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr, loss, count);
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

  void project(Type type, const void* x, int64_t rows, int64_t dim, const void* inverse, const void* grad, void* out,
               bool wide) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      using A = Acc<T>;
      const auto run = [&](const auto* from) {
        using U = std::remove_cvref_t<decltype(*from)>;
        queue_.launch(project_kernel<T, U>, blocks_for(rows, kThreads / 32), "projection", static_cast<const T*>(x),
                      rows, dim, static_cast<const A*>(inverse), from, static_cast<T*>(out));
      };
      wide ? run(static_cast<const A*>(grad)) : run(static_cast<const T*>(grad));
    });
  }

  void prepare(void*, int64_t) override {}

  void add(Type type, const void* parts, int64_t count, int64_t n, void* total) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      queue_.launch(add_kernel<T>, blocks_for(n, kThreads), "addition", static_cast<const T*>(parts), count, n,
                    static_cast<Acc<T>*>(total));
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

  static bool is_full(const Job& job) { return job.s.sums != nullptr || job.c.row_scale != nullptr; }

  template <typename T>
  Job make_job(const Problem& p, const Columns& c, const RowState& s) {
    if (c.width > (1 << 30)) throw std::runtime_error("facefast: more than 2^30 classes in one matrix");
    Job job{p, c, s};
    job.segments = static_cast<int>((chunks_of<T>(c) + kSegmentChunks - 1) / kSegmentChunks);
    if (job.segments == 0) job.segments = 1;
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

  template <typename T>
  void run_stats(Job& job, Then then, Acc<T>* losses, Partial* partial) {
    if (job.segments > 1) {
      job.partial = scratch_(job.p.rows * job.segments * int64_t{sizeof(SegmentStats<Acc<T>>)});
    }
    with_group<T>(chunks_of<T>(job.c), is_full(job), [&](auto group, auto full) {
      const unsigned blocks = blocks_for(job.p.rows * job.segments, kThreads / group);
      queue_.launch(stats_kernel<T, group, full>, blocks, "forward", job, then, losses, partial);
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
    with_group<T>(chunks_of<T>(job.c), is_full(job), [&](auto group, auto full) {
      const unsigned blocks = blocks_for(job.p.rows * job.segments, kThreads / group);
      queue_.launch(gradient_kernel<T, group, full>, blocks, "backward", job, up, ready, out, stride);
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
