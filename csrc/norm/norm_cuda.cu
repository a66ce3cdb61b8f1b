// Batch normalisation with an activation on the GPU, channels last: [rows, channels] of 16-byte chunks. A thread keeps
// one chunk of channels and walks down the rows, so that what a channel is normalised by stays in registers, and every
// load and store of x, y and their gradients is one of 16 bytes. Sums are taken in a fixed order: over a thread's rows,
// over the threads of a block, over the blocks; how rows are divided depends on the shape alone.
#include "norm_cuda.cuh"

namespace facefast {
namespace {

// -----------------------------------------------------------------------------------------------
// Statistics: mean and sum of squared distances from it, first by block, then of all.

struct Moments {
  float mean, square;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const T* x, const Grid grid, Moments* partial) {
  constexpr int kSize = kPerChunk<T>;
  __shared__ float means[kSize][kThreads], squares[kSize][kThreads];
  __shared__ int counts[kThreads];
  const Place place(grid);
  float shift[kSize], sum[kSize], square[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) shift[i] = sum[i] = square[i] = 0.f;
  // Differences from a value of the thread's own: what cancels below is at most its rows times what is left.
  const int n = place.active ? place.rows() : 0;
  if (n > 0) unpack<T>(*chunk_at(x, place.begin + place.depth, grid, place.column), shift);
  place.each([&](int64_t row, auto number_of) {
    constexpr int kCount = decltype(number_of)::value;
    uint4 chunks[kCount];
    load_rows(chunks, x, row, grid, place);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float values[kSize];
      unpack<T>(chunks[u], values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float d = values[i] - shift[i];
        sum[i] += d;
        square[i] = fmaf(d, d, square[i]);
      }
    }
  });
  const float part = n > 0 ? 1.f / static_cast<float>(n) : 0.f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float away = sum[i] * part;
    means[i][threadIdx.x] = shift[i] + away;
    const float left = fmaf(-away, sum[i], square[i]);
    squares[i][threadIdx.x] = left < 0.f ? 0.f : left;
  }
  counts[threadIdx.x] = n;
  for (int half = place.step / 2; half > 0; half /= 2) {
    __syncthreads();
    const int other = static_cast<int>(threadIdx.x) + half * grid.lanes;
    if (place.depth < half && counts[other] > 0) {
      const float mine = static_cast<float>(counts[threadIdx.x]), theirs = static_cast<float>(counts[other]);
      const float share = theirs / (mine + theirs);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float d = means[i][other] - means[i][threadIdx.x];
        means[i][threadIdx.x] = fmaf(d, share, means[i][threadIdx.x]);
        squares[i][threadIdx.x] += squares[i][other] + d * d * mine * share;
      }
      counts[threadIdx.x] += counts[other];
    }
  }
  if (place.depth > 0 || !place.active) return;
  Moments* to = partial + int64_t{place.slice} * grid.columns * kSize + place.column * kSize;
#pragma unroll
  for (int i = 0; i < kSize; ++i) to[i] = {means[i][threadIdx.x], squares[i][threadIdx.x]};
}

// Sums over the slices: kGroup channels a block, the other threads share the slices.
constexpr int kGroup = 8, kShares = kThreads / kGroup;

// Adds kCount numbers of the threads of a channel; the first of them has the sums.
template <int kCount>
__device__ __forceinline__ void share_sum(double (&sums)[kCount]) {
  __shared__ double shown[kCount][kThreads];
#pragma unroll
  for (int k = 0; k < kCount; ++k) shown[k][threadIdx.x] = sums[k];
  for (int half = kShares / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x / kGroup < half) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) shown[k][threadIdx.x] += shown[k][threadIdx.x + half * kGroup];
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = shown[k][threadIdx.x];
}

__global__ void __launch_bounds__(kThreads) statistics_kernel(const Moments* partial, const Grid grid, int channels,
                                                              float* mean, float* var, const Running running) {
  const int channel = static_cast<int>(blockIdx.x) * kGroup + static_cast<int>(threadIdx.x) % kGroup;
  const bool active = channel < channels;
  const double shift = active ? partial[channel].mean : 0;  // in double, what cancels counts for nothing
  double sums[2] = {0, 0};
  if (active) {
#pragma unroll 4
    for (int s = threadIdx.x / kGroup; s < grid.slices; s += kShares) {
      const Moments found = partial[int64_t{s} * channels + channel];
      const double d = found.mean - shift, n = static_cast<double>(grid.rows_of(s));
      sums[0] += n * d;
      sums[1] += found.square + n * d * d;
    }
  }
  share_sum(sums);
  if (blockIdx.x == 0 && threadIdx.x == 0 && running.batches != nullptr) ++*running.batches;
  if (!active || threadIdx.x >= kGroup) return;
  const double n = static_cast<double>(grid.rows), away = sums[0] / n;
  const double left = sums[1] / n - away * away, spread = left < 0 ? 0 : left;
  mean[channel] = static_cast<float>(shift + away);
  var[channel] = static_cast<float>(spread);
  if (running.mean == nullptr) return;
  float *was_mean = static_cast<float*>(running.mean) + channel, *was_var = static_cast<float*>(running.var) + channel;
  *was_mean = moved(*was_mean, shift + away, running.momentum);
  *was_var = moved(*was_var, unbiased(spread, n), running.momentum);
}

// -----------------------------------------------------------------------------------------------

template <typename T, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3)
    norm_forward_kernel(const Norm norm, const Grid grid, const T* residual, T* y) {
  constexpr int kSize = kPerChunk<T>;
  const Place place(grid);
  if (!place.active) return;
  Channel<float> channels[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) channels[i] = channel_of(norm, place.column * kSize + i);
  const T* x = static_cast<const T*>(norm.x);
  place.each([&](int64_t row, auto number_of) {
    constexpr int kCount = decltype(number_of)::value;
    uint4 chunks[kCount];
    [[maybe_unused]] uint4 added[kCount];
    load_rows(chunks, x, row, grid, place);
    if constexpr (kResidual) load_rows(added, residual, row, grid, place);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float values[kSize];
      [[maybe_unused]] float more[kSize];
      unpack<T>(chunks[u], values);
      if constexpr (kResidual) unpack<T>(added[u], more);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float z = normalised(values[i], channels[i]);
        if constexpr (kResidual) z += more[i];
        values[i] = activated(z, channels[i].slope, kActivation);
      }
      store_row(y, row + u * place.step, grid, place, values);
    }
  });
}

// Of a slice and channel, of all rows: the gradient, it times x - mean, the slope's.
struct GradientSums {
  float grad, product, slope;
};

template <typename T, Mask kMask>
__global__ void __launch_bounds__(kThreads, 2)
    norm_sums_kernel(const Norm norm, const Grid grid, const T* grad, const T* output, GradientSums* partial) {
  constexpr int kSize = kPerChunk<T>, kSums = kMask == Mask::kPReLU ? 3 : 2;
  __shared__ float shown[kSums][kSize][kThreads];
  const Place place(grid);
  Channel<float> channels[kSize];
  float sums[3][kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    channels[i] = place.active ? channel_of(norm, place.column * kSize + i) : Channel<float>{};
    sums[0][i] = sums[1][i] = sums[2][i] = 0.f;
  }
  const T* x = static_cast<const T*>(norm.x);
  place.each([&](int64_t row, auto number_of) {
    constexpr int kCount = decltype(number_of)::value;
    uint4 values[kCount], upstream[kCount];
    [[maybe_unused]] uint4 known[kCount];
    load_rows(values, x, row, grid, place);
    load_rows(upstream, grad, row, grid, place);
    if constexpr (kMask == Mask::kOutput) load_rows(known, output, row, grid, place);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float value[kSize], g[kSize], out[kSize] = {};
      unpack<T>(values[u], value);
      unpack<T>(upstream[u], g);
      if constexpr (kMask == Mask::kOutput) unpack<T>(known[u], out);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Masked<float> behind = masked<kMask>(g[i], value[i], out[i], channels[i]);
        sums[0][i] += behind.grad;
        sums[1][i] = fmaf(behind.grad, value[i] - channels[i].mean, sums[1][i]);
        if constexpr (kMask == Mask::kPReLU) sums[2][i] += behind.slope;
      }
    }
  });
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) shown[k][i][threadIdx.x] = sums[k][i];
  }
  for (int half = place.step / 2; half > 0; half /= 2) {
    __syncthreads();
    if (place.depth < half) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) shown[k][i][threadIdx.x] += shown[k][i][threadIdx.x + half * grid.lanes];
      }
    }
  }
  if (place.depth > 0 || !place.active) return;
  GradientSums* to = partial + int64_t{place.slice} * grid.columns * kSize + place.column * kSize;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i] = {shown[0][i][threadIdx.x], shown[1][i][threadIdx.x], kSums == 3 ? shown[kSums - 1][i][threadIdx.x] : 0.f};
  }
}

// What an element's gradient takes of the sums: see norm_gradient_kernel.
struct Shares {
  float share, along;
};

__global__ void __launch_bounds__(kThreads)
    norm_settle_kernel(const Norm norm, const Grid grid, const GradientSums* partial, const NormGradients to,
                       Shares* shares) {
  const int channel = static_cast<int>(blockIdx.x) * kGroup + static_cast<int>(threadIdx.x) % kGroup;
  const bool active = channel < norm.channels;
  double sums[3] = {0, 0, 0};
  if (active) {
#pragma unroll 4
    for (int s = threadIdx.x / kGroup; s < grid.slices; s += kShares) {
      const GradientSums found = partial[int64_t{s} * norm.channels + channel];
      sums[0] += found.grad;
      sums[1] += found.product;
      sums[2] += found.slope;
    }
  }
  share_sum(sums);
  if (!active || threadIdx.x >= kGroup) return;
  const double n = static_cast<double>(grid.rows), inverse = inverse_deviation(norm, channel);
  static_cast<float*>(to.bias)[channel] = static_cast<float>(sums[0]);
  static_cast<float*>(to.weight)[channel] = static_cast<float>(sums[1] * inverse);
  static_cast<float*>(to.slope)[channel] = static_cast<float>(sums[2]);
  if (shares != nullptr) {
    shares[channel] = {static_cast<float>(sums[0] / n), static_cast<float>(sums[1] * inverse * inverse / n)};
  }
}

// dx = scale * (g - share - (x - mean) * along), g being the gradient behind the activation.
template <typename T, Mask kMask>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient_kernel(const Norm norm, const Grid grid, const T* grad, const T* output, const Shares* shares, T* dx,
                         T* dresidual) {
  constexpr int kSize = kPerChunk<T>;
  const Place place(grid);
  if (!place.active) return;
  Channel<float> channels[kSize];
  Shares share[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    channels[i] = channel_of(norm, place.column * kSize + i);
    share[i] = shares == nullptr ? Shares{0.f, 0.f} : shares[place.column * kSize + i];
  }
  const T* x = static_cast<const T*>(norm.x);
  place.each([&](int64_t row, auto number_of) {
    constexpr int kCount = decltype(number_of)::value;
    uint4 values[kCount], upstream[kCount];
    [[maybe_unused]] uint4 known[kCount];
    load_rows(values, x, row, grid, place);
    load_rows(upstream, grad, row, grid, place);
    if constexpr (kMask == Mask::kOutput) load_rows(known, output, row, grid, place);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float value[kSize], g[kSize], out[kSize] = {};
      unpack<T>(values[u], value);
      unpack<T>(upstream[u], g);
      if constexpr (kMask == Mask::kOutput) unpack<T>(known[u], out);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        g[i] = masked<kMask>(g[i], value[i], out[i], channels[i]).grad;
        const float away = value[i] - channels[i].mean;
        value[i] = channels[i].scale * (g[i] - share[i].share - away * share[i].along);
      }
      if (dx != nullptr) store_row(dx, row + u * place.step, grid, place, value);
      if (dresidual != nullptr) store_row(dresidual, row + u * place.step, grid, place, g);
    }
  });
}

template <typename F>
void with_half(Type type, const F& run) {
  switch (type) {
    case Type::kFloat:
      return run(float{});
    case Type::kHalf:
      return run(__half{});
    case Type::kBFloat16:
      return run(__nv_bfloat16{});
    case Type::kDouble:
      throw std::runtime_error("facefast: batch normalisation of float64 has no GPU kernel");
  }
}

class CudaNorm : public NormBackend {
 public:
  CudaNorm(int device, void* stream, std::function<void*(int64_t)> scratch)
      : scratch_(std::move(scratch)), launcher_{static_cast<cudaStream_t>(stream)} {
    check(cudaSetDevice(device), "device");  // the runtime linked into this library has a current device of its own
  }

  void statistics(const Norm& norm, void* mean, void* var, const Running& running) override {
    typed(norm, [&](auto type) {
      using T = decltype(type);
      const Grid grid = Grid::of<T>(norm, kSumBlocks);
      auto* partial = static_cast<Moments*>(scratch_(grid.slices * norm.channels * int64_t{sizeof(Moments)}));
      launcher_.launch(moments_kernel<T>, grid.blocks(), "moments", static_cast<const T*>(norm.x), grid, partial);
      launcher_.launch(statistics_kernel, blocks_for(norm.channels, kGroup), "statistics",
                       static_cast<const Moments*>(partial), grid, static_cast<int>(norm.channels),
                       static_cast<float*>(mean), static_cast<float*>(var), running);
    });
  }

  void forward(const Norm& norm, const void* residual, void* y) override {
    typed(norm, [&](auto type) {
      using T = decltype(type);
      const Grid grid = Grid::of<T>(norm, kPassBlocks);
      const auto run = [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        auto kernel = norm_forward_kernel<T, kActivation, false>;
        if constexpr (kActivation != Activation::kPReLU) {  // in front of which no residual goes
          if (residual != nullptr) kernel = norm_forward_kernel<T, kActivation, true>;
        }
        launcher_.launch(kernel, grid.blocks(), "normalisation", norm, grid, static_cast<const T*>(residual),
                         static_cast<T*>(y));
      };
      switch (norm.activation) {
        case Activation::kNone:
          return run(std::integral_constant<Activation, Activation::kNone>{});
        case Activation::kReLU:
          return run(std::integral_constant<Activation, Activation::kReLU>{});
        case Activation::kPReLU:
          return run(std::integral_constant<Activation, Activation::kPReLU>{});
      }
    });
  }

  void backward(const Norm& norm, const void* grad, const void* output, bool batch, const NormGradients& to) override {
    typed(norm, [&](auto type) {
      using T = decltype(type);
      const T *upstream = static_cast<const T*>(grad), *known = static_cast<const T*>(output);
      with_mask(mask_of(norm, output), [&](auto mask) {
        Shares* shares = nullptr;
        if (to.weight != nullptr) {
          const Grid grid = Grid::of<T>(norm, kSumBlocks);
          auto* partial =
              static_cast<GradientSums*>(scratch_(grid.slices * norm.channels * int64_t{sizeof(GradientSums)}));
          if (batch) shares = static_cast<Shares*>(scratch_(norm.channels * int64_t{sizeof(Shares)}));
          launcher_.launch(norm_sums_kernel<T, decltype(mask)::value>, grid.blocks(), "gradient sums", norm, grid,
                           upstream, known, partial);
          launcher_.launch(norm_settle_kernel, blocks_for(norm.channels, kGroup), "parameters", norm, grid,
                           static_cast<const GradientSums*>(partial), to, shares);
        }
        if (to.x == nullptr && to.residual == nullptr) return;
        const Grid grid = Grid::of<T>(norm, kPassBlocks);
        launcher_.launch(norm_gradient_kernel<T, decltype(mask)::value>, grid.blocks(), "gradient", norm, grid,
                         upstream, known, static_cast<const Shares*>(shares), static_cast<T*>(to.x),
                         static_cast<T*>(to.residual));
      });
    });
  }

 private:
  template <typename F>
  static void typed(const Norm& norm, const F& run) {
    if (norm.count() == 0) return;
    with_half(norm.type, [&](auto type) {
      if (norm.inner != 1 || norm.channels % kPerChunk<decltype(type)> != 0 || norm.channels > (1 << 20)) {
        throw std::runtime_error("facefast: batch normalisation on a GPU takes channels last, a multiple of " +
                                 std::to_string(kPerChunk<decltype(type)>) + " of them");
      }
      run(type);
    });
  }

  std::function<void*(int64_t)> scratch_;
  Launcher launcher_;
};

}  // namespace

std::unique_ptr<NormBackend> norm_cuda(int device, void* stream, std::function<void*(int64_t)> scratch) {
  return std::make_unique<CudaNorm>(device, stream, std::move(scratch));
}

}  // namespace facefast
