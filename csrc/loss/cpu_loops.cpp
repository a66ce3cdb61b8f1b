// The innermost loops of the CPU kernels. Each is written once, as a template, and compiled once
// per type and processor generation; the library picks the generation when it loads.
#include "cpu_loops.h"

#include <algorithm>
#include <cstring>

namespace facefast {
namespace {

#define FACEFAST_SIMD baseline
#define FACEFAST_TARGET
#define FACEFAST_BYTES 16
#include "cpu_simd.inc"
#undef FACEFAST_SIMD
#undef FACEFAST_TARGET
#undef FACEFAST_BYTES
#if defined(__x86_64__)
#define FACEFAST_SIMD avx2
#define FACEFAST_TARGET __attribute__((target("avx2,fma")))
#define FACEFAST_BYTES 32
#include "cpu_simd.inc"
#undef FACEFAST_SIMD
#undef FACEFAST_TARGET
#undef FACEFAST_BYTES
#define FACEFAST_SIMD avx512
#define FACEFAST_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,fma")))
#define FACEFAST_BYTES 64
#include "cpu_simd.inc"
#undef FACEFAST_SIMD
#undef FACEFAST_TARGET
#undef FACEFAST_BYTES
#endif

struct Simd {
  decltype(&baseline::block_stats) block_stats = baseline::block_stats;
  decltype(&baseline::block_gradient) block_gradient = baseline::block_gradient;
  Simd() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      *this = {avx512::block_stats, avx512::block_gradient};
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      *this = {avx2::block_stats, avx2::block_gradient};
    }
#endif
  }
  Simd(decltype(block_stats) stats, decltype(block_gradient) gradient) : block_stats(stats), block_gradient(gradient) {}
};
const Simd kSimd;

template <typename A>
FACEFAST_INLINE double sum_loop(const A* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += double(x[j]);
  return sum;
}

template <typename A>
FACEFAST_INLINE void scale_loop(A* x, int64_t n, A row, const A* cols) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= row * cols[j];
}

// Two loops rather than one: each leaves out what the other needs.
template <typename A>
FACEFAST_INLINE void losses_loop(RowBatch<A>& b, Focal focal) {
#pragma omp simd
  for (int64_t r = 0; r < b.rows; ++r) {
    b.loss[r] = focal_row<A>(b.z[r], Stats<A>{b.peak[r], b.mass[r]}, b.sum[r], b.alpha[r], focal).loss;
  }
}

template <typename A>
FACEFAST_INLINE void gradients_loop(RowBatch<A>& b, Focal focal) {
#pragma omp simd
  for (int64_t r = 0; r < b.rows; ++r) {
    const Row row = focal_row<A>(b.z[r], Stats<A>{b.peak[r], b.mass[r]}, 0, b.alpha[r], focal);
    b.others[r] = row.others;
    b.target[r] = row.target;
    b.constant[r] = row.constant;
  }
}

template <typename T>
FACEFAST_INLINE void read_loop(const T* x, int64_t n, Acc<T>* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = load(x[j]);
}

template <typename T>
FACEFAST_INLINE void write_loop(const Acc<T>* x, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(out + j, x[j]);
}

template <typename T, typename U>
FACEFAST_INLINE double dot_loop(const T* a, const U* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += double(load(a[j])) * double(load(b[j]));
  return sum;
}

template <typename T, typename U>
FACEFAST_INLINE void subtract_loop(const T* x, int64_t n, Acc<T> factor, const U* y, T* out) {
  const bool none = factor == Acc<T>(0);  // the x of an ignored row may be NaN
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(out + j, none ? Acc<T>(load(y[j])) : load(y[j]) - factor * load(x[j]));
}

template <typename T>
FACEFAST_INLINE void add_loop(const T* x, int64_t n, Acc<T>* total) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) total[j] += load(x[j]);
}

template <typename T>
FACEFAST_INLINE void narrow_stats_loop(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows,
                                       double scale_wide, Acc<T>* peak, Acc<T>* mass) {
  using A = Acc<T>;
  constexpr A kNone = static_cast<A>(-kInf);
  const A scale = static_cast<A>(scale_wide);
  A value[kNarrow][kMaxRows];
  int32_t own[kMaxRows];
  std::copy_n(label, rows, own);
  std::fill_n(peak, rows, kNone);
  std::fill_n(mass, rows, A(0));
  for (int32_t j = 0; j < width; ++j) {
    A* v = value[j];
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      const A loaded = load(x[r * stride + j]);
      v[r] = own[r] == j ? kNone : loaded;
      peak[r] = v[r] > peak[r] ? v[r] : peak[r];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) peak[r] = peak[r] == kNone ? A(0) : peak[r];
  for (int32_t j = 0; j < width; ++j) {
    const A* v = value[j];
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) mass[r] += exp_(scale * (v[r] - peak[r]));
  }
}

template <typename T>
FACEFAST_INLINE void narrow_gradient_loop(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows,
                                          double scale_wide, const RowGradient<Acc<T>>* g, T* out) {
  using A = Acc<T>;
  const A scale = static_cast<A>(scale_wide);
  A others[kMaxRows], constant[kMaxRows], target[kMaxRows], peak[kMaxRows];
  int32_t own[kMaxRows];
  std::copy_n(label, rows, own);
  for (int64_t r = 0; r < rows; ++r) {
    others[r] = g[r].others;
    constant[r] = g[r].constant;
    target[r] = g[r].target;
    peak[r] = g[r].peak;
  }
  for (int32_t j = 0; j < width; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      const A other = others[r] * exp_(scale * (load(x[r * stride + j]) - peak[r])) + constant[r];
      const A value = own[r] == j ? target[r] : other;
      store(out + r * width + j, own[r] < 0 ? A(0) : value);
    }
  }
}

}  // namespace

Stats<float> block_stats(const float* x, int64_t n, int64_t own, double scale) {
  return kSimd.block_stats(x, n, own, scale);
}

void block_gradient(const float* x, int64_t n, double scale, float peak, float others, float constant, float* out) {
  kSimd.block_gradient(x, n, scale, peak, others, constant, out);
}

// Double is for checking gradients: the library's exp, one at a time.
Stats<double> block_stats(const double* x, int64_t n, int64_t own, double scale) {
  double peak = -kInf, mass = 0;
  for (int64_t j = 0; j < n; ++j) peak = j != own && x[j] > peak ? x[j] : peak;
  peak = peak == -kInf ? 0 : peak;
  for (int64_t j = 0; j < n; ++j) mass += j == own ? 0 : ::exp(scale * (x[j] - peak));
  return {peak, mass};
}

void block_gradient(const double* x, int64_t n, double scale, double peak, double others, double constant,
                    double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = others * ::exp(scale * (x[j] - peak)) + constant;
}

#define FACEFAST_ACC_LOOPS(A)                                                                                \
  FACEFAST_CLONES double block_sum(const A* x, int64_t n) { return sum_loop(x, n); }                         \
  FACEFAST_CLONES void scale_columns(A* x, int64_t n, A row, const A* cols) { scale_loop(x, n, row, cols); } \
  FACEFAST_CLONES void row_losses(RowBatch<A>& batch, const Focal& focal) { losses_loop(batch, focal); }     \
  FACEFAST_CLONES void row_gradients(RowBatch<A>& batch, const Focal& focal) { gradients_loop(batch, focal); }
FACEFAST_ACC_LOOPS(float)
FACEFAST_ACC_LOOPS(double)

#define FACEFAST_TYPE_LOOPS(T)                                                                                        \
  FACEFAST_CLONES void read_block(const T* x, int64_t n, Acc<T>* out) { read_loop(x, n, out); }                       \
  FACEFAST_CLONES void write_block(const Acc<T>* x, int64_t n, T* out) { write_loop(x, n, out); }                     \
  FACEFAST_CLONES double dot_block(const T* a, const T* b, int64_t n) { return dot_loop(a, b, n); }                   \
  FACEFAST_CLONES double dot_wide_block(const T* a, const Acc<T>* b, int64_t n) { return dot_loop(a, b, n); }         \
  FACEFAST_CLONES void subtract_block(const T* x, int64_t n, Acc<T> factor, const T* y, T* out) {                     \
    subtract_loop(x, n, factor, y, out);                                                                              \
  }                                                                                                                   \
  FACEFAST_CLONES void subtract_wide_block(const T* x, int64_t n, Acc<T> factor, const Acc<T>* y, T* out) {           \
    subtract_loop(x, n, factor, y, out);                                                                              \
  }                                                                                                                   \
  FACEFAST_CLONES void add_block(const T* x, int64_t n, Acc<T>* total) { add_loop(x, n, total); }                     \
  FACEFAST_CLONES void narrow_stats(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows,    \
                                    double scale, Acc<T>* peak, Acc<T>* mass) {                                       \
    narrow_stats_loop(x, stride, width, label, rows, scale, peak, mass);                                              \
  }                                                                                                                   \
  FACEFAST_CLONES void narrow_gradient(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows, \
                                       double scale, const RowGradient<Acc<T>>* g, T* out) {                          \
    narrow_gradient_loop(x, stride, width, label, rows, scale, g, out);                                               \
  }
FACEFAST_TYPE_LOOPS(float)
FACEFAST_TYPE_LOOPS(double)
FACEFAST_TYPE_LOOPS(Half)
FACEFAST_TYPE_LOOPS(BFloat16)

}  // namespace facefast
