// The CPU kernels: loops over fixed blocks of rows, vectorised by the compiler and compiled for
// three generations of x86, chosen when the library loads. The result does not depend on the number
// of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_rows.h"

namespace facefast {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // elements that are worth a thread

// -----------------------------------------------------------------------------------------------
// Blocks of rows, one compiled version per type and processor generation.

template <typename T>
FACEFAST_INLINE double forward_block(const Problem& p, const Columns& c, const RowState& s,
                                     int64_t begin, int64_t rows, void* loss) {
  accumulate_rows<T>(p, c, s, begin, rows);
  return finish_rows<Acc<T>>(p, s, begin, rows, static_cast<Acc<T>*>(loss));
}

template <typename T>
FACEFAST_INLINE void backward_block(const Problem& p, const Columns& c, const RowState& s,
                                    const Upstream& up, int64_t begin, int64_t rows, void* grad) {
  RowGradient<Acc<T>> g[kMaxRows];
  gradient_rows<Acc<T>>(p, s, up, begin, rows, g);
  for (int64_t r = 0; r < rows; ++r) {
    write_row<T>(p, c, g[r], begin + r, static_cast<T*>(grad) + (begin + r) * c.width);
  }
}

template <typename T>
FACEFAST_INLINE void overwrite_block(const Problem& p, const Columns& c, int64_t begin,
                                     int64_t rows, const void* gradients) {
  for (int64_t row = begin; row < begin + rows; ++row) {
    write_row<T>(p, c, static_cast<const RowGradient<Acc<T>>*>(gradients)[row], row,
                 const_cast<T*>(row_of<T>(c, row)));
  }
}

template <typename T>
FACEFAST_INLINE void norms_block(const T* x, int64_t begin, int64_t rows, int64_t dim,
                                 Acc<T>* inverse) {
  for (int64_t row = begin; row < begin + rows; ++row) {
    const T* v = x + row * dim;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < dim; ++j) sum += double(load(v[j])) * double(load(v[j]));
    inverse[row] = static_cast<Acc<T>>(1 / std::max(std::sqrt(sum), 1e-12));
  }
}

template <typename T>
FACEFAST_INLINE void project_block(const T* x, int64_t begin, int64_t rows, int64_t dim,
                                   const Acc<T>* inverse, T* grad) {
  for (int64_t row = begin; row < begin + rows; ++row) {
    const T* v = x + row * dim;
    T* g = grad + row * dim;
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < dim; ++j) dot += double(load(v[j])) * double(load(g[j]));
    // A row shorter than 1e-12 was divided by the constant 1e-12, which has no derivative.
    const Acc<T> along =
        inverse[row] < Acc<T>(1e12) ? Acc<T>(dot * double(inverse[row]) * double(inverse[row])) : 0;
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) store(g + j, load(g[j]) - along * load(v[j]));
  }
}

struct Kernels {
  double (*forward)(const Problem&, const Columns&, const RowState&, int64_t, int64_t, void*);
  void (*backward)(const Problem&, const Columns&, const RowState&, const Upstream&, int64_t,
                   int64_t, void*);
  void (*accumulate)(const Problem&, const Columns&, const RowState&, int64_t, int64_t);
  void (*overwrite)(const Problem&, const Columns&, int64_t, int64_t, const void*);
  void (*norms)(const void*, int64_t, int64_t, int64_t, void*);
  void (*project)(const void*, int64_t, int64_t, int64_t, const void*, void*);
};

#define FACEFAST_VERSIONS(Name, T)                                                                 \
  FACEFAST_CLONES double forward_##Name(const Problem& p, const Columns& c, const RowState& s,     \
                                        int64_t begin, int64_t rows, void* loss) {                 \
    return forward_block<T>(p, c, s, begin, rows, loss);                                           \
  }                                                                                                \
  FACEFAST_CLONES void backward_##Name(const Problem& p, const Columns& c, const RowState& s,      \
                                       const Upstream& up, int64_t begin, int64_t rows,            \
                                       void* grad) {                                               \
    backward_block<T>(p, c, s, up, begin, rows, grad);                                             \
  }                                                                                                \
  FACEFAST_CLONES void accumulate_##Name(const Problem& p, const Columns& c, const RowState& s,    \
                                         int64_t begin, int64_t rows) {                            \
    accumulate_rows<T>(p, c, s, begin, rows);                                                      \
  }                                                                                                \
  FACEFAST_CLONES void overwrite_##Name(const Problem& p, const Columns& c, int64_t begin,         \
                                        int64_t rows, const void* gradients) {                     \
    overwrite_block<T>(p, c, begin, rows, gradients);                                              \
  }                                                                                                \
  FACEFAST_CLONES void norms_##Name(const void* x, int64_t begin, int64_t rows, int64_t dim,       \
                                    void* inverse) {                                               \
    norms_block(static_cast<const T*>(x), begin, rows, dim, static_cast<Acc<T>*>(inverse));        \
  }                                                                                                \
  FACEFAST_CLONES void project_##Name(const void* x, int64_t begin, int64_t rows, int64_t dim,     \
                                      const void* inverse, void* grad) {                           \
    project_block(static_cast<const T*>(x), begin, rows, dim, static_cast<const Acc<T>*>(inverse), \
                  static_cast<T*>(grad));                                                          \
  }                                                                                                \
  const Kernels k##Name{forward_##Name,   backward_##Name, accumulate_##Name,                      \
                        overwrite_##Name, norms_##Name,    project_##Name};
FACEFAST_VERSIONS(Float, float)
FACEFAST_VERSIONS(Double, double)
FACEFAST_VERSIONS(Half, Half)
FACEFAST_VERSIONS(BFloat16, BFloat16)
#undef FACEFAST_VERSIONS

const Kernels& kernels_for(Type type) {
  switch (type) {
    case Type::kDouble:
      return kDouble;
    case Type::kHalf:
      return kHalf;
    case Type::kBFloat16:
      return kBFloat16;
    case Type::kFloat:
      break;
  }
  return kFloat;
}

// -----------------------------------------------------------------------------------------------
// Threads over blocks. The size of a block depends on the shape alone, so that sums are added in
// the same order by any number of threads.

struct Blocks {
  int64_t rows, size, count, grain;
  Blocks(int64_t rows, int64_t columns)
      : rows(rows),
        size(std::clamp<int64_t>(kMaxRows * 1024 / std::max<int64_t>(columns, 1) / 8 * 8, 8,
                                 kMaxRows)),
        count((rows + size - 1) / size),
        grain(std::max<int64_t>(1, kGrain / (size * std::max<int64_t>(columns, 1)))) {}

  template <typename F>
  void each(const F& run) const {  // run(block, first row, rows)
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run(block, block * size, std::min(size, rows - block * size));
      }
    });
  }
};

void write_acc(Type type, void* to, double value) {
  if (type == Type::kDouble) {
    *static_cast<double*>(to) = value;
  } else {
    *static_cast<float*>(to) = static_cast<float>(value);
  }
}

// Rows that count. Labels are checked before any kernel uses one as an index.
double count_rows(const Problem& p) {
  int64_t count = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t label = label_of(p, row);
    if (label == p.focal.ignore_index) continue;
    if (label < 0 || label >= p.focal.num_classes) {
      throw std::out_of_range("label " + std::to_string(label) + " of row " + std::to_string(row) +
                              " is outside [0, " + std::to_string(p.focal.num_classes) +
                              ") and is not ignore_index " + std::to_string(p.focal.ignore_index) +
                              "; correct the label or the number of classes");
    }
    ++count;
  }
  return static_cast<double>(count);
}

void write_reduced(const Problem& p, const std::vector<double>& partial, double count, void* loss) {
  if (p.reduction == Reduction::kNone) return;
  double sum = 0;
  for (const double part : partial) sum += part;
  write_acc(p.type, loss, p.reduction == Reduction::kMean ? sum / std::max(1.0, count) : sum);
}

class CpuBackend : public Backend {
 public:
  void forward(const Problem& p, const Columns& c, const RowState& s, void* loss,
               void* count) override {
    const double rows = count_rows(p);
    const Blocks blocks(p.rows, c.width);
    std::vector<double> partial(blocks.count);
    const auto run = kernels_for(p.type).forward;
    void* losses = p.reduction == Reduction::kNone ? loss : nullptr;
    blocks.each([&](int64_t block, int64_t begin, int64_t n) {
      partial[block] = run(p, c, s, begin, n, losses);
    });
    write_reduced(p, partial, rows, loss);
    write_acc(p.type, count, rows);
  }

  void backward(const Problem& p, const Columns& c, const RowState& s, const Upstream& up,
                void* grad) override {
    const auto run = kernels_for(p.type).backward;
    Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
      run(p, c, s, up, begin, n, grad);
    });
  }

  void accumulate(const Problem& p, const Columns& c, const RowState& s) override {
    if (c.first == 0) count_rows(p);
    const auto run = kernels_for(p.type).accumulate;
    Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
      run(p, c, s, begin, n);
    });
  }

  void finish(const Problem& p, const RowState& s, void* loss, void* count) override {
    const double rows = count_rows(p);
    const Blocks blocks(p.rows, p.focal.num_classes);
    std::vector<double> partial(blocks.count);
    void* losses = p.reduction == Reduction::kNone ? loss : nullptr;
    blocks.each([&](int64_t block, int64_t begin, int64_t n) {
      partial[block] = p.type == Type::kDouble
                           ? finish_rows<double>(p, s, begin, n, static_cast<double*>(losses))
                           : finish_rows<float>(p, s, begin, n, static_cast<float*>(losses));
    });
    write_reduced(p, partial, rows, loss);
    write_acc(p.type, count, rows);
  }

  void row_gradients(const Problem& p, const RowState& s, const Upstream& up, void* rows) override {
    Blocks(p.rows, p.focal.num_classes).each([&](int64_t, int64_t begin, int64_t n) {
      if (p.type == Type::kDouble) {
        gradient_rows<double>(p, s, up, begin, n, static_cast<RowGradient<double>*>(rows) + begin);
      } else {
        gradient_rows<float>(p, s, up, begin, n, static_cast<RowGradient<float>*>(rows) + begin);
      }
    });
  }

  void overwrite(const Problem& p, const Columns& c, const void* rows) override {
    const auto run = kernels_for(p.type).overwrite;
    Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
      run(p, c, begin, n, rows);
    });
  }

  void inverse_norms(Type type, const void* x, int64_t rows, int64_t dim, void* inverse) override {
    const auto run = kernels_for(type).norms;
    Blocks(rows, dim).each(
        [&](int64_t, int64_t begin, int64_t n) { run(x, begin, n, dim, inverse); });
  }

  void project(Type type, const void* x, int64_t rows, int64_t dim, const void* inverse,
               void* grad) override {
    const auto run = kernels_for(type).project;
    Blocks(rows, dim).each(
        [&](int64_t, int64_t begin, int64_t n) { run(x, begin, n, dim, inverse, grad); });
  }

  void sigmoid_forward(const Sigmoid& p, void* loss, void* count) override {
    sigmoid_cpu_forward(p, loss, count);
  }

  void sigmoid_backward(const Sigmoid& p, const Upstream& up, void* grad) override {
    sigmoid_cpu_backward(p, up, grad);
  }
};

}  // namespace

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace facefast
