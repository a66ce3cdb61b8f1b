// The innermost loops of the CPU kernels, each compiled for several processor generations
// (cpu_loops.cpp). They are whole functions rather than templates inlined into their callers, where
// GCC gives up vectorising some of them.
#pragma once

#include "cpu_types.h"
#include "focal.h"

namespace facefast {

constexpr int64_t kMaxRows = 64;  // rows in one block of work
// Up to this many classes, lanes run over rows instead of columns.
constexpr int64_t kNarrow = 16;

// The terms of up to kMaxRows rows, as focal_row takes and gives them.
template <typename A>
struct RowBatch {
  int64_t rows;
  A peak[kMaxRows], mass[kMaxRows];
  double z[kMaxRows], sum[kMaxRows], alpha[kMaxRows];
  double loss[kMaxRows];                                          // from row_losses
  double others[kMaxRows], target[kMaxRows], constant[kMaxRows];  // from row_gradients
};

// The gradient of a row with everything folded in: column j gets others * exp(scale * (x_j - peak))
// + constant.
template <typename A>
struct RowGradient {
  A others, constant, target, peak;
};

#define FACEFAST_ACC_LOOPS(A)                                                                     \
  /* The statistics of columns [0, n) but for column `own`; -1 leaves none out. */                \
  Stats<A> block_stats(const A* x, int64_t n, int64_t own, double scale);                         \
  double block_sum(const A* x, int64_t n);                                                        \
  /* out = others * exp(scale * (x - peak)) + constant */                                         \
  void block_gradient(const A* x, int64_t n, double scale, A peak, A others, A constant, A* out); \
  /* x *= row * cols */                                                                           \
  void scale_columns(A* x, int64_t n, A row, const A* cols);                                      \
  void row_losses(RowBatch<A>& batch, const Focal& focal);                                        \
  void row_gradients(RowBatch<A>& batch, const Focal& focal);
FACEFAST_ACC_LOOPS(float)
FACEFAST_ACC_LOOPS(double)
#undef FACEFAST_ACC_LOOPS

#define FACEFAST_TYPE_LOOPS(T)                                                                                      \
  void read_block(const T* x, int64_t n, Acc<T>* out);                                                              \
  void write_block(const Acc<T>* x, int64_t n, T* out);                                                             \
  double dot_block(const T* a, const T* b, int64_t n);                                                              \
  double dot_wide_block(const T* a, const Acc<T>* b, int64_t n);                                                    \
  /* out = y - factor * x */                                                                                        \
  void subtract_block(const T* x, int64_t n, Acc<T> factor, const T* y, T* out);                                    \
  void subtract_wide_block(const T* x, int64_t n, Acc<T> factor, const Acc<T>* y, T* out);                          \
  /* total += x */                                                                                                  \
  void add_block(const T* x, int64_t n, Acc<T>* total);                                                             \
  /* The statistics of `rows` rows of at most kNarrow classes; label -1 is no class. */                             \
  void narrow_stats(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows, double scale,    \
                    Acc<T>* peak, Acc<T>* mass);                                                                    \
  /* The gradients of `rows` rows of at most kNarrow classes; label -1 gets zeros. */                               \
  void narrow_gradient(const T* x, int64_t stride, int64_t width, const int64_t* label, int64_t rows, double scale, \
                       const RowGradient<Acc<T>>* g, T* out);
FACEFAST_TYPE_LOOPS(float)
FACEFAST_TYPE_LOOPS(double)
FACEFAST_TYPE_LOOPS(Half)
FACEFAST_TYPE_LOOPS(BFloat16)
#undef FACEFAST_TYPE_LOOPS

}  // namespace facefast
