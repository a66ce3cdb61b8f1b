// Batch normalisation with an activation on the CPU. Sums are taken over blocks of fixed size, in float within one and
// in double across them: the result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../loss/cpu_types.h"
#include "norm_math.h"

namespace facefast {
namespace {

constexpr int64_t kBlock = 32 * 1024;  // values of a block, which stay in L2 between two loops
constexpr int64_t kGrain = 4;          // blocks that are worth a thread
constexpr int64_t kLanes = 64;         // a plane is read as rows of so many values of one channel

// What a block is normalised by: an array each, one number a column.
template <typename A>
struct Columns {
  const A *mean, *scale, *bias, *slope;
  FACEFAST_INLINE Channel<A> operator[](int64_t j) const { return {mean[j], scale[j], bias[j], slope[j]}; }
};

// sums[j] += x - shift[j], squares[j] += the square of it
template <typename T>
FACEFAST_INLINE void moments_loop(const T* x, int64_t rows, int64_t width, const Acc<T>* shift, Acc<T>* sums,
                                  Acc<T>* squares) {
  for (int64_t r = 0; r < rows; ++r, x += width) {
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const Acc<T> d = load(x[j]) - shift[j];
      sums[j] += d;
      squares[j] += d * d;
    }
  }
}

template <Activation kActivation, bool kResidual, typename T>
FACEFAST_INLINE void forward_loop(const T* x, const T* residual, int64_t rows, int64_t width, Columns<Acc<T>> c, T* y) {
  for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      Acc<T> z = normalised(Acc<T>(load(x[j])), c[j]);
      if constexpr (kResidual) z += load(residual[j]);
      store(y + j, activated(z, c.slope[j], kActivation));
    }
    if constexpr (kResidual) residual += width;
  }
}

template <Activation kActivation, typename T>
FACEFAST_INLINE void forward_loops(const T* x, const T* residual, int64_t rows, int64_t width, Columns<Acc<T>> c,
                                   T* y) {
  residual != nullptr ? forward_loop<kActivation, true>(x, residual, rows, width, c, y)
                      : forward_loop<kActivation, false>(x, residual, rows, width, c, y);
}

// Sums over the rows of the gradient, of it times x - mean, and of the slope's.
template <typename A>
struct Sums {
  A *grad, *product, *slope;
};

template <Mask kMask, typename T>
FACEFAST_INLINE void sums_loop(const T* grad, const T* x, const T* output, int64_t rows, int64_t width,
                               Columns<Acc<T>> c, Sums<Acc<T>> sums) {
  for (int64_t r = 0; r < rows; ++r, x += width, grad += width) {
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const Acc<T> value = load(x[j]), out = kMask == Mask::kOutput ? Acc<T>(load(output[j])) : Acc<T>(0);
      const Masked<Acc<T>> g = masked<kMask>(Acc<T>(load(grad[j])), value, out, c[j]);
      sums.grad[j] += g.grad;
      sums.product[j] += g.grad * (value - c.mean[j]);
      if constexpr (kMask == Mask::kPReLU) sums.slope[j] += g.slope;
    }
    if constexpr (kMask == Mask::kOutput) output += width;
  }
}

// dx = scale * (g - share - (x - mean) * along)
template <Mask kMask, bool kX, bool kResidual, typename T>
FACEFAST_INLINE void gradient_loop(const T* grad, const T* x, const T* output, int64_t rows, int64_t width,
                                   Columns<Acc<T>> c, const Acc<T>* share, const Acc<T>* along, T* dx, T* dresidual) {
  for (int64_t r = 0; r < rows; ++r, x += width, grad += width) {
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const Acc<T> value = load(x[j]), out = kMask == Mask::kOutput ? Acc<T>(load(output[j])) : Acc<T>(0);
      const Masked<Acc<T>> g = masked<kMask>(Acc<T>(load(grad[j])), value, out, c[j]);
      if constexpr (kX) store(dx + j, c.scale[j] * (g.grad - share[j] - (value - c.mean[j]) * along[j]));
      if constexpr (kResidual) store(dresidual + j, g.grad);
    }
    if constexpr (kMask == Mask::kOutput) output += width;
    if constexpr (kX) dx += width;
    if constexpr (kResidual) dresidual += width;
  }
}

template <Mask kMask, typename T>
FACEFAST_INLINE void gradient_loops(const T* grad, const T* x, const T* output, int64_t rows, int64_t width,
                                    Columns<Acc<T>> c, const Acc<T>* share, const Acc<T>* along, T* dx, T* dresidual) {
  if (dx != nullptr && dresidual != nullptr) {
    gradient_loop<kMask, true, true>(grad, x, output, rows, width, c, share, along, dx, dresidual);
  } else if (dx != nullptr) {
    gradient_loop<kMask, true, false>(grad, x, output, rows, width, c, share, along, dx, dresidual);
  } else {
    gradient_loop<kMask, false, true>(grad, x, output, rows, width, c, share, along, dx, dresidual);
  }
}

// One function a loop and type, each compiled for several generations of processors.
#define FACEFAST_NORM_LOOPS(T)                                                                                      \
  FACEFAST_CLONES void moments(const T* x, int64_t rows, int64_t width, const Acc<T>* shift, Acc<T>* sums,          \
                               Acc<T>* squares) {                                                                   \
    moments_loop(x, rows, width, shift, sums, squares);                                                             \
  }                                                                                                                 \
  FACEFAST_CLONES void plain(const T* x, const T* residual, int64_t rows, int64_t width, Columns<Acc<T>> c, T* y) { \
    forward_loops<Activation::kNone>(x, residual, rows, width, c, y);                                               \
  }                                                                                                                 \
  FACEFAST_CLONES void relu(const T* x, const T* residual, int64_t rows, int64_t width, Columns<Acc<T>> c, T* y) {  \
    forward_loops<Activation::kReLU>(x, residual, rows, width, c, y);                                               \
  }                                                                                                                 \
  FACEFAST_CLONES void prelu(const T* x, const T* residual, int64_t rows, int64_t width, Columns<Acc<T>> c, T* y) { \
    forward_loops<Activation::kPReLU>(x, residual, rows, width, c, y);                                              \
  }                                                                                                                 \
  FACEFAST_NORM_MASK(T, kNone)                                                                                      \
  FACEFAST_NORM_MASK(T, kReLU)                                                                                      \
  FACEFAST_NORM_MASK(T, kPReLU)                                                                                     \
  FACEFAST_NORM_MASK(T, kOutput)
#define FACEFAST_NORM_MASK(T, MASK)                                                                                   \
  FACEFAST_CLONES void add_sums(std::integral_constant<Mask, Mask::MASK>, const T* grad, const T* x, const T* output, \
                                int64_t rows, int64_t width, Columns<Acc<T>> c, Sums<Acc<T>> sums) {                  \
    sums_loop<Mask::MASK>(grad, x, output, rows, width, c, sums);                                                     \
  }                                                                                                                   \
  FACEFAST_CLONES void gradient(std::integral_constant<Mask, Mask::MASK>, const T* grad, const T* x, const T* output, \
                                int64_t rows, int64_t width, Columns<Acc<T>> c, const Acc<T>* share,                  \
                                const Acc<T>* along, T* dx, T* dresidual) {                                           \
    gradient_loops<Mask::MASK>(grad, x, output, rows, width, c, share, along, dx, dresidual);                         \
  }
FACEFAST_NORM_LOOPS(float)
FACEFAST_NORM_LOOPS(double)
FACEFAST_NORM_LOOPS(Half)
FACEFAST_NORM_LOOPS(BFloat16)

template <typename A>
A or_else(const void* values, int64_t c, A value) {
  return values == nullptr ? value : static_cast<const A*>(values)[c];
}

template <typename A>
A inverse_deviation(const Norm& norm, int64_t c) {
  return norm.var == nullptr ? A(1) : A(1 / std::sqrt(double(static_cast<const A*>(norm.var)[c]) + norm.eps));
}

template <typename A>
struct Channels {
  std::vector<A> mean, scale, bias, slope;
  explicit Channels(const Norm& norm) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      mean.push_back(or_else(norm.mean, c, A(0)));
      scale.push_back(or_else(norm.weight, c, A(1)) * inverse_deviation<A>(norm, c));
      bias.push_back(or_else(norm.bias, c, A(0)));
      slope.push_back(or_else(norm.slope, c, A(0)));
    }
  }
};

// Blocks of work: some rows of all channels where these are last, else one picture's planes.
struct Blocks {
  bool planes;
  int64_t rows, count;
  explicit Blocks(const Norm& norm)
      : planes(norm.inner > 1),
        rows(planes ? 1 : std::max<int64_t>(8, kBlock / std::max<int64_t>(1, norm.channels))),
        count((norm.outer + rows - 1) / rows) {}

  // Calls run(block, first row, rows) for every block, on several threads.
  template <typename F>
  void each(const Norm& norm, const F& run) const {
    torch::stable::parallel_for(0, count, planes ? 1 : kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run(block, block * rows, std::min(rows, norm.outer - block * rows));
      }
    });
  }
};

// The same number in every column of a plane's rows.
template <typename A>
struct Lanes {
  A at[kLanes];
  Lanes& operator=(A value) {
    std::fill_n(at, kLanes, value);
    return *this;
  }
  double sum() const {
    double total = 0;
    for (const A value : at) total += value;
    return total;
  }
};

// Calls run(begin, rows, width) for the two parts of a plane: whole rows of kLanes values, and the rest.
template <typename F>
void each_part(int64_t plane, int64_t size, const F& run) {
  const int64_t whole = size / kLanes * kLanes;
  if (whole > 0) run(plane, whole / kLanes, kLanes);
  if (size > whole) run(plane + whole, int64_t{1}, size - whole);
}

// Calls run(begin, rows, width, columns, channel) over all of x; channel is -1 where a row holds all of them.
template <typename A, typename F>
void each_stretch(const Norm& norm, const Channels<A>& channels, const Blocks& blocks, const F& run) {
  blocks.each(norm, [&](int64_t, int64_t first, int64_t rows) {
    if (!blocks.planes) {
      const Columns<A> columns{channels.mean.data(), channels.scale.data(), channels.bias.data(),
                               channels.slope.data()};
      return run(first * norm.channels, rows, norm.channels, columns, int64_t{-1});
    }
    Lanes<A> mean, scale, bias, slope;
    for (int64_t c = 0; c < norm.channels; ++c) {
      mean = channels.mean[c], scale = channels.scale[c], bias = channels.bias[c], slope = channels.slope[c];
      each_part((first * norm.channels + c) * norm.inner, norm.inner,
                [&](int64_t begin, int64_t part_rows, int64_t width) {
                  run(begin, part_rows, width, Columns<A>{mean.at, scale.at, bias.at, slope.at}, c);
                });
    }
  });
}

class CpuNorm : public NormBackend {
 public:
  void statistics(const Norm& norm, void* mean, void* var, const Running& running) override {
    dispatch<Half, BFloat16>(norm.type, [&](auto type) { statistics_of<decltype(type)>(norm, mean, var, running); });
  }
  void forward(const Norm& norm, const void* residual, void* y) override {
    dispatch<Half, BFloat16>(norm.type, [&](auto type) { forward_of<decltype(type)>(norm, residual, y); });
  }
  void backward(const Norm& norm, const void* grad, const void* output, bool batch, const NormGradients& to) override {
    dispatch<Half, BFloat16>(norm.type, [&](auto type) {
      with_mask(mask_of(norm, output),
                [&](auto mask) { backward_of<decltype(type)>(mask, norm, grad, output, batch, to); });
    });
  }

 private:
  template <typename T>
  static void statistics_of(const Norm& norm, void* mean, void* var, const Running& running) {
    using A = Acc<T>;
    const Blocks blocks(norm);
    const T* x = static_cast<const T*>(norm.x);
    // Of a block and channel: the mean, and the sum of squared distances from it.
    std::vector<double> means(blocks.count * norm.channels), squares(means.size());
    blocks.each(norm, [&](int64_t block, int64_t first, int64_t rows) {
      double *block_mean = &means[block * norm.channels], *block_square = &squares[block * norm.channels];
      // Twice: the mean first, then squares of distances from it, which lose nothing. The block is in the cache by
      // then.
      if (!blocks.planes) {
        std::vector<A> shift(norm.channels), sum(norm.channels, A(0)), square(norm.channels, A(0));
        const T* from = x + first * norm.channels;
        for (int64_t c = 0; c < norm.channels; ++c) shift[c] = load(from[c]);
        moments(from, rows, norm.channels, shift.data(), sum.data(), square.data());
        for (int64_t c = 0; c < norm.channels; ++c) {
          shift[c] += sum[c] / A(rows);
          sum[c] = square[c] = A(0);
        }
        moments(from, rows, norm.channels, shift.data(), sum.data(), square.data());
        for (int64_t c = 0; c < norm.channels; ++c) {
          block_mean[c] = double(shift[c]) + double(sum[c]) / double(rows);
          block_square[c] = double(square[c]) - double(sum[c]) * double(sum[c]) / double(rows);
        }
        return;
      }
      Lanes<A> shift, sum, square;
      for (int64_t c = 0; c < norm.channels; ++c) {
        const int64_t plane = (first * norm.channels + c) * norm.inner;
        const auto take = [&](A from) {
          shift = from, sum = A(0), square = A(0);
          each_part(plane, norm.inner, [&](int64_t begin, int64_t part_rows, int64_t width) {
            moments(x + begin, part_rows, width, shift.at, sum.at, square.at);
          });
        };
        const double count = double(norm.inner);
        take(A(load(x[plane])));
        take(A(double(shift.at[0]) + sum.sum() / count));
        block_mean[c] = double(shift.at[0]) + sum.sum() / count;
        block_square[c] = square.sum() - sum.sum() * sum.sum() / count;
      }
    });
    const double n = double(norm.count());
    const auto values = [&](int64_t block) {
      return double(std::min(blocks.rows, norm.outer - block * blocks.rows)) * double(norm.inner);
    };
    std::vector<double> total(norm.channels, 0), spread(norm.channels, 0);
    for (int64_t block = 0; block < blocks.count; ++block) {
      for (int64_t c = 0; c < norm.channels; ++c) total[c] += values(block) * means[block * norm.channels + c];
    }
    for (int64_t block = 0; block < blocks.count; ++block) {
      for (int64_t c = 0; c < norm.channels; ++c) {
        const double away = means[block * norm.channels + c] - total[c] / n;
        spread[c] += squares[block * norm.channels + c] + values(block) * away * away;
      }
    }
    for (int64_t c = 0; c < norm.channels; ++c) {
      const double mean_c = total[c] / n, var_c = spread[c] / n;
      static_cast<A*>(mean)[c] = A(mean_c);
      static_cast<A*>(var)[c] = A(var_c);
      if (running.mean == nullptr) continue;
      A &was_mean = static_cast<A*>(running.mean)[c], &was_var = static_cast<A*>(running.var)[c];
      was_mean = moved(was_mean, mean_c, running.momentum);
      was_var = moved(was_var, unbiased(var_c, n), running.momentum);
    }
    if (running.batches != nullptr) ++*running.batches;
  }

  template <typename T>
  static void forward_of(const Norm& norm, const void* residual, void* y) {
    using A = Acc<T>;
    const auto loops = norm.activation == Activation::kPReLU  ? static_cast<Loop<T>>(prelu)
                       : norm.activation == Activation::kReLU ? static_cast<Loop<T>>(relu)
                                                              : static_cast<Loop<T>>(plain);
    each_stretch(norm, Channels<A>(norm), Blocks(norm),
                 [&](int64_t begin, int64_t rows, int64_t width, const Columns<A>& columns, int64_t) {
                   loops(static_cast<const T*>(norm.x) + begin, at<T>(residual, begin), rows, width, columns,
                         static_cast<T*>(y) + begin);
                 });
  }

  template <typename T, Mask kMask>
  static void backward_of(std::integral_constant<Mask, kMask> mask, const Norm& norm, const void* grad,
                          const void* output, bool batch, const NormGradients& to) {
    using A = Acc<T>;
    const Channels<A> channels(norm);
    const Blocks blocks(norm);
    std::vector<A> share(norm.channels, A(0)), along(norm.channels, A(0));
    if (to.weight != nullptr) {
      const std::vector<double> sums = sums_of<T>(mask, norm, channels, blocks, grad, output);
      for (int64_t c = 0; c < norm.channels; ++c) {
        const double by_bias = sums[3 * c], product = sums[3 * c + 1], inverse = inverse_deviation<A>(norm, c);
        static_cast<A*>(to.bias)[c] = A(by_bias);
        static_cast<A*>(to.weight)[c] = A(product * inverse);
        static_cast<A*>(to.slope)[c] = A(sums[3 * c + 2]);
        if (!batch) continue;
        share[c] = A(by_bias / double(norm.count()));
        along[c] = A(product * inverse * inverse / double(norm.count()));
      }
    }
    if (to.x == nullptr && to.residual == nullptr) return;
    each_stretch(norm, channels, blocks,
                 [&](int64_t begin, int64_t rows, int64_t width, const Columns<A>& columns, int64_t c) {
                   const auto run = [&](const A* shares, const A* alongs) {
                     gradient(mask, static_cast<const T*>(grad) + begin, static_cast<const T*>(norm.x) + begin,
                              at<T>(output, begin), rows, width, columns, shares, alongs, at<T>(to.x, begin),
                              at<T>(to.residual, begin));
                   };
                   if (c < 0) return run(share.data(), along.data());
                   Lanes<A> shares, alongs;
                   shares = share[c], alongs = along[c];
                   run(shares.at, alongs.at);
                 });
  }

  // [channels, 3]: of the gradient, of it times x - mean, of the slope's.
  template <typename T, Mask kMask>
  static std::vector<double> sums_of(std::integral_constant<Mask, kMask> mask, const Norm& norm,
                                     const Channels<Acc<T>>& channels, const Blocks& blocks, const void* grad,
                                     const void* output) {
    using A = Acc<T>;
    const int64_t wide = norm.channels * 3;
    std::vector<double> partial(blocks.count * wide, 0), total(wide, 0);
    each_stretch(norm, channels, blocks,
                 [&](int64_t begin, int64_t rows, int64_t width, const Columns<A>& columns, int64_t c) {
                   std::vector<A> sums(3 * width, A(0));
                   add_sums(mask, static_cast<const T*>(grad) + begin, static_cast<const T*>(norm.x) + begin,
                            at<T>(output, begin), rows, width, columns,
                            Sums<A>{sums.data(), sums.data() + width, sums.data() + 2 * width});
                   double* to = &partial[begin / (blocks.rows * norm.channels * norm.inner) * wide];
                   for (int64_t k = 0; k < 3; ++k) {
                     for (int64_t j = 0; j < width; ++j) to[3 * (c < 0 ? j : c) + k] += sums[k * width + j];
                   }
                 });
    for (int64_t block = 0; block < blocks.count; ++block) {
      for (int64_t i = 0; i < wide; ++i) total[i] += partial[block * wide + i];
    }
    return total;
  }

  template <typename T>
  using Loop = void (*)(const T*, const T*, int64_t, int64_t, Columns<Acc<T>>, T*);

  // Where a tensor that may be absent stands at `begin`.
  template <typename T>
  static const T* at(const void* data, int64_t begin) {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + begin;
  }
  template <typename T>
  static T* at(void* data, int64_t begin) {
    return data == nullptr ? nullptr : static_cast<T*>(data) + begin;
  }
};

}  // namespace

NormBackend& norm_cpu() {
  static CpuNorm backend;
  return backend;
}

}  // namespace facefast
