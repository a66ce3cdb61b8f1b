// The focal loss on a block of rows, as always-inlined templates: focal_cpu.cpp compiles them for
// each type and processor generation. Loops run over columns, or over rows where those are few, and
// vectorise either way.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu_types.h"
#include "focal.h"

namespace facefast {

constexpr int64_t kBlock = 1024;  // columns in one step of the online softmax: a page of L1
constexpr int64_t kMaxRows = 64;  // rows in one block of work
constexpr int64_t kNarrow = 16;   // up to this many classes, lanes run over rows instead of columns

// -----------------------------------------------------------------------------------------------
// Loops over the columns of one block.

// exp(scale * (x - peak)) for x <= peak, prepared for a loop.
template <typename T>
struct Exponential;
template <>
struct Exponential<float> {
  float factor, least, peak;
  FACEFAST_INLINE Exponential(double scale, float peak)
      : factor(static_cast<float>(scale * 1.44269504088896341)),
        least(-127.f / factor),
        peak(peak) {}
  FACEFAST_INLINE float operator()(float x) const {
    float d = x - peak;
    d = d < least ? least : d;
    const float shifted = d * factor + kShift;
    return exp2_parts(shifted, d * factor - (shifted - kShift));
  }
};
template <>
struct Exponential<double> {
  double scale, peak;
  FACEFAST_INLINE Exponential(double scale, double peak) : scale(scale), peak(peak) {}
  FACEFAST_INLINE double operator()(double x) const { return std::exp(scale * (x - peak)); }
};

// Two interleaved halves: more of the loop in flight, and sums of at most 64 terms per lane.
template <typename A>
FACEFAST_INLINE A greatest(const A* x, int64_t n) {
  A a = -std::numeric_limits<A>::infinity(), b = a;
  const int64_t half = n / 2;
#pragma omp simd reduction(max : a, b)
  for (int64_t j = 0; j < half; ++j) {
    a = x[j] > a ? x[j] : a;
    b = x[j + half] > b ? x[j + half] : b;
  }
  if (n % 2 != 0) a = x[n - 1] > a ? x[n - 1] : a;
  return a > b ? a : b;
}

template <typename A>
FACEFAST_INLINE A mass_of(const A* x, int64_t n, const Exponential<A>& exponential) {
  A a = 0, b = 0;
  const int64_t half = n / 2;
#pragma omp simd reduction(+ : a, b)
  for (int64_t j = 0; j < half; ++j) {
    a += exponential(x[j]);
    b += exponential(x[j + half]);
  }
  if (n % 2 != 0) a += exponential(x[n - 1]);
  return a + b;
}

template <typename A>
FACEFAST_INLINE double sum_of(const A* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += double(x[j]);
  return sum;
}

template <typename T>
FACEFAST_INLINE void read(const T* x, int64_t n, Acc<T>* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = load(x[j]);
}

template <typename T>
FACEFAST_INLINE void read_scaled(const T* x, int64_t n, Acc<T> row, const Acc<T>* cols,
                                 Acc<T>* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = load(x[j]) * (row * cols[j]);
}

// -----------------------------------------------------------------------------------------------
// One row over the columns at hand.

FACEFAST_INLINE int64_t label_of(const Problem& p, int64_t row) {
  return p.target_is_int64 ? static_cast<const int64_t*>(p.target)[row]
                           : int64_t{static_cast<const int32_t*>(p.target)[row]};
}

template <typename T>
FACEFAST_INLINE const T* row_of(const Columns& c, int64_t row) {
  return static_cast<const T*>(c.data) + row * c.stride;
}

template <typename A>
FACEFAST_INLINE RowStats<A>* stats_of(const RowState& s, int64_t row) {
  return static_cast<RowStats<A>*>(s.stats) + row;
}

// The values of columns [j, j + n) of a row: where they are, when they can be read there, else in
// `buffer`.
template <typename T>
FACEFAST_INLINE const Acc<T>* values(const Columns& c, int64_t row, int64_t j, int64_t n, bool copy,
                                     Acc<T>* buffer) {
  using A = Acc<T>;
  const T* x = row_of<T>(c, row) + j;
  if (c.row_scale != nullptr) {
    read_scaled(x, n, static_cast<const A*>(c.row_scale)[row],
                static_cast<const A*>(c.col_scale) + j, buffer);
    return buffer;
  }
  if constexpr (std::is_same_v<T, A>) {
    if (!copy) return x;
  }
  read(x, n, buffer);
  return buffer;
}

template <typename T>
FACEFAST_INLINE void accumulate_row(const Problem& p, const Columns& c, const RowState& s,
                                    int64_t row) {
  using A = Acc<T>;
  const int64_t label = label_of(p, row), own = label - c.first;
  const bool starts = c.first == 0;
  RowStats<A>& state = *stats_of<A>(s, row);
  Stats<A, double> stats{starts ? A(0) : state.peak, starts ? 0.0 : double(state.mass)};
  double sum = starts || s.sums == nullptr ? 0 : s.sums[row];
  A own_value = starts ? A(0) : state.own;
  A buffer[kBlock];
  for (int64_t j = 0; label != p.focal.ignore_index && j < c.width; j += kBlock) {
    const int64_t n = std::min(kBlock, c.width - j);
    const bool holds_own = own >= j && own < j + n;
    const A* x = values<T>(c, row, j, n, holds_own, buffer);
    if (s.sums != nullptr) sum += sum_of(x, n);
    if (holds_own) {
      own_value = buffer[own - j];
      if (s.sums != nullptr) sum -= double(own_value);
      buffer[own - j] = -std::numeric_limits<A>::infinity();
    }
    A peak = greatest(x, n);
    peak = peak == -std::numeric_limits<A>::infinity() ? A(0) : peak;
    const A mass = mass_of(x, n, Exponential<A>(p.focal.scale, peak));
    stats = merge(stats, Stats<A, double>{peak, double(mass)}, static_cast<A>(p.focal.scale));
  }
  state = {stats.peak, static_cast<A>(stats.mass), own_value};
  if (s.sums != nullptr) s.sums[row] = sum;
}

// The same for a block of rows with few columns: lanes run over the rows.
template <typename T>
FACEFAST_INLINE void accumulate_narrow(const Problem& p, const Columns& c, const RowState& s,
                                       int64_t begin, int64_t rows) {
  using A = Acc<T>;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const A scale = static_cast<A>(p.focal.scale);
  const T* x = row_of<T>(c, begin);
  const int64_t stride = c.stride;
  int32_t label[kMaxRows];
  A value[kNarrow][kMaxRows], peak[kMaxRows], mass[kMaxRows];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = label_of(p, begin + r);
    label[r] = y == p.focal.ignore_index ? -1 : static_cast<int32_t>(y);
    peak[r] = -kInf;
    mass[r] = 0;
  }
  for (int32_t j = 0; j < c.width; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      const A v = load(x[r * stride + j]);
      value[j][r] = label[r] == j ? -kInf : v;
      peak[r] = value[j][r] > peak[r] ? value[j][r] : peak[r];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) peak[r] = peak[r] == -kInf ? A(0) : peak[r];
  for (int32_t j = 0; j < c.width; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) mass[r] += exp_(scale * (value[j][r] - peak[r]));
  }
  for (int64_t r = 0; r < rows; ++r) {
    *stats_of<A>(s, begin + r) = {peak[r], mass[r],
                                  label[r] < 0 ? A(0) : load(x[r * stride + label[r]])};
    if (s.sums != nullptr) {
      double sum = 0;
      for (int64_t j = 0; j < c.width; ++j)
        sum += j == label[r] ? 0 : double(load(x[r * stride + j]));
      s.sums[begin + r] = sum;
    }
  }
}

template <typename T>
FACEFAST_INLINE void accumulate_rows(const Problem& p, const Columns& c, const RowState& s,
                                     int64_t begin, int64_t rows) {
  if (c.width <= kNarrow && c.width == p.focal.num_classes && c.row_scale == nullptr) {
    accumulate_narrow<T>(p, c, s, begin, rows);
  } else {
    for (int64_t r = begin; r < begin + rows; ++r) accumulate_row<T>(p, c, s, r);
  }
}

// -----------------------------------------------------------------------------------------------
// The terms of a block of rows, lanes over rows.

template <typename A>
struct RowTerms {
  bool counts[kMaxRows];
  double slope[kMaxRows], loss[kMaxRows], others[kMaxRows], target[kMaxRows], constant[kMaxRows];

  FACEFAST_INLINE RowTerms(const Problem& p, const RowState& s, int64_t begin, int64_t rows) {
    const Focal focal = p.focal;
    double z[kMaxRows], sum[kMaxRows], alpha[kMaxRows];
    A peak[kMaxRows], mass[kMaxRows];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r, label = label_of(p, row);
      counts[r] = label != focal.ignore_index;
      const RowStats<A>& state = *stats_of<A>(s, row);
      const Target t = target_logit(double(state.own), focal, row);
      z[r] = t.z;
      slope[r] = t.slope;
      peak[r] = state.peak;
      mass[r] = state.mass;
      sum[r] = s.sums == nullptr ? 0 : focal.scale * s.sums[row];
      alpha[r] = focal.alpha;
      if (p.alpha_by != AlphaBy::kNone && counts[r]) {
        alpha[r] = static_cast<const A*>(p.alpha)[p.alpha_by == AlphaBy::kClass ? label : row];
      }
    }
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      const Row row = focal_row<A>(z[r], Stats<A>{peak[r], mass[r]}, sum[r], alpha[r], focal);
      loss[r] = row.loss;
      others[r] = row.others;
      target[r] = row.target;
      constant[r] = row.constant;
    }
  }
};

// Writes the losses of a block, or returns their sum after a reduction.
template <typename A>
FACEFAST_INLINE double finish_rows(const Problem& p, const RowState& s, int64_t begin, int64_t rows,
                                   A* loss) {
  const RowTerms<A> terms(p, s, begin, rows);
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double value = terms.counts[r] ? terms.loss[r] : 0;
    if (loss != nullptr) loss[begin + r] = static_cast<A>(value);
    sum += value;
  }
  return sum;
}

// The gradient of a row with everything folded in: column j gets others * exp(scale * (x_j - peak))
// + constant.
template <typename A>
struct RowGradient {
  A others, constant, target, peak;
};

template <typename A>
FACEFAST_INLINE void gradient_rows(const Problem& p, const RowState& s, const Upstream& up,
                                   int64_t begin, int64_t rows, RowGradient<A>* out) {
  const RowTerms<A> terms(p, s, begin, rows);
  const double share = p.reduction == Reduction::kMean
                           ? 1 / std::max(1.0, double(*static_cast<const A*>(up.count)))
                           : 1;
  const double scale = p.focal.scale;
  for (int64_t r = 0; r < rows; ++r) {
    const double factor = share * double(static_cast<const A*>(up.data)[(begin + r) * up.stride]);
    out[r] = {static_cast<A>(terms.others[r] * scale * factor),
              static_cast<A>(terms.constant[r] * scale * factor),
              static_cast<A>(terms.target[r] * terms.slope[r] * factor),
              stats_of<A>(s, begin + r)->peak};
  }
}

// Writes the gradient of one row with respect to the matrix; `out` may be the row itself.
template <typename T>
FACEFAST_INLINE void write_row(const Problem& p, const Columns& c, const RowGradient<Acc<T>>& g,
                               int64_t row, T* out) {
  using A = Acc<T>;
  const int64_t label = label_of(p, row), own = label - c.first;
  if (label == p.focal.ignore_index) {
    std::fill_n(out, c.width, T{});
    return;
  }
  const Exponential<A> exponential(p.focal.scale, g.peak);
  const bool scaled = c.row_scale != nullptr;
  const A row_scale = scaled ? static_cast<const A*>(c.row_scale)[row] : A(1);
  const A others = g.others, constant = g.constant;
  A buffer[kBlock], result[kBlock];
  for (int64_t j = 0; j < c.width; j += kBlock) {
    const int64_t n = std::min(kBlock, c.width - j);
    const A* x = values<T>(c, row, j, n, false, buffer);
    if (scaled) {
      const A* cols = static_cast<const A*>(c.col_scale) + j;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        result[i] = (others * exponential(x[i]) + constant) * (row_scale * cols[i]);
    } else if constexpr (std::is_same_v<T, A>) {
      T* to = out + j;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = others * exponential(x[i]) + constant;
      continue;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) result[i] = others * exponential(x[i]) + constant;
    }
    T* to = out + j;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(to + i, result[i]);
  }
  if (own >= 0 && own < c.width) {
    store(out + own,
          g.target * row_scale * (scaled ? static_cast<const A*>(c.col_scale)[own] : A(1)));
  }
}

}  // namespace facefast
