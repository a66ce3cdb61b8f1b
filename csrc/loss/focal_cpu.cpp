// The softmax losses on the CPU: blocks of rows shared out among threads, the loops of cpu_loops.h
// inside. The result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_loops.h"

namespace facefast {
namespace {

constexpr int64_t kBlock = 1024;       // columns in one step of the online softmax; they stay in L1
constexpr int64_t kGrain = 64 * 1024;  // elements that are worth a thread
constexpr int64_t kRowCost = 64;       // a row's own arithmetic, in elements

int64_t label_of(const Problem& p, int64_t row) {
  return p.target_is_int64 ? static_cast<const int64_t*>(p.target)[row]
                           : int64_t{static_cast<const int32_t*>(p.target)[row]};
}

// Some neighbouring rows and their labels, -1 where a row does not count.
struct RowBlock {
  int64_t begin, rows;
  int64_t label[kMaxRows];

  RowBlock(const Problem& p, int64_t begin, int64_t rows) : begin(begin), rows(rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = label_of(p, begin + r);
      label[r] = y == p.focal.ignore_index ? -1 : y;
    }
  }
};

template <typename T>
const T* row_of(const Columns& c, int64_t row) {
  return static_cast<const T*>(c.data) + row * c.stride;
}

template <typename A>
RowStats<A>& stats_of(const RowState& s, int64_t row) {
  return static_cast<RowStats<A>*>(s.stats)[row];
}

// The values of columns [j, j + n) of a row: where they are, or converted and scaled in `buffer`.
// `buffer`.
template <typename T>
const Acc<T>* values(const Columns& c, int64_t row, int64_t j, int64_t n, Acc<T>* buffer) {
  using A = Acc<T>;
  const T* x = row_of<T>(c, row) + j;
  if constexpr (std::is_same_v<T, A>) {
    if (c.row_scale == nullptr) return x;
  }
  read_block(x, n, buffer);
  if (c.row_scale != nullptr) {
    scale_columns(buffer, n, static_cast<const A*>(c.row_scale)[row], static_cast<const A*>(c.col_scale) + j);
  }
  return buffer;
}

// Adds these columns to the statistics of a row; the first columns start them.
template <typename T>
void accumulate_row(const Problem& p, const Columns& c, const RowState& s, int64_t row, int64_t label) {
  using A = Acc<T>;
  const int64_t own = label - c.first;
  RowStats<A>& state = stats_of<A>(s, row);
  if (c.first == 0) {
    state = {};
    if (s.sums != nullptr) s.sums[row] = 0;
  }
  if (label < 0) return;
  Stats<A, double> stats{state.peak, double(state.mass)};  // hundreds of blocks add up: their sum is wider
  A buffer[kBlock];
  for (int64_t j = 0; j < c.width; j += kBlock) {
    const int64_t n = std::min(kBlock, c.width - j);
    const bool holds_own = own >= j && own < j + n;
    const A* x = values<T>(c, row, j, n, buffer);
    if (s.sums != nullptr) s.sums[row] += block_sum(x, n);
    if (holds_own) {
      state.own = x[own - j];
      if (s.sums != nullptr) s.sums[row] -= double(state.own);
    }
    const Stats<A> block = block_stats(x, n, holds_own ? own - j : -1, p.focal.scale);
    const Stats<A, double> wide{block.peak, double(block.mass)};
    stats = stats.mass == 0 ? wide : merge(stats, wide, static_cast<A>(p.focal.scale));
  }
  state.peak = stats.peak;
  state.mass = static_cast<A>(stats.mass);
}

// The same for rows that have few columns, all of them here.
template <typename T>
void accumulate_narrow(const Problem& p, const Columns& c, const RowState& s, const RowBlock& block) {
  using A = Acc<T>;
  A peak[kMaxRows], mass[kMaxRows];
  narrow_stats(row_of<T>(c, block.begin), c.stride, c.width, block.label, block.rows, p.focal.scale, peak, mass);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.begin + r, label = block.label[r];
    const T* x = row_of<T>(c, row);
    stats_of<A>(s, row) = {peak[r], mass[r], label < 0 ? A(0) : load(x[label])};
    if (s.sums == nullptr) continue;
    s.sums[row] = 0;
    for (int64_t j = 0; j < c.width; ++j) s.sums[row] += j == label ? 0 : double(load(x[j]));
  }
}

template <typename T>
void accumulate_rows(const Problem& p, const Columns& c, const RowState& s, const RowBlock& block) {
  if (c.width <= kNarrow && c.width == p.focal.num_classes && c.row_scale == nullptr) {
    accumulate_narrow<T>(p, c, s, block);
  } else {
    for (int64_t r = 0; r < block.rows; ++r) accumulate_row<T>(p, c, s, block.begin + r, block.label[r]);
  }
}

Target target_logit(double x, const Focal& focal, int64_t row) {
  if (!focal.margin.active) return plain_logit(x, focal);
  return focal.margin.m1 == 1 ? shifted_logit(x, focal, row) : angular_logit(x, focal, row);
}

// What focal_row takes, for a block of rows; `slope` is d (target's logit) / d x.
template <typename A>
void gather_rows(const Problem& p, const RowState& s, const RowBlock& block, RowBatch<A>& batch, double* slope) {
  batch.rows = block.rows;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.begin + r, label = block.label[r];
    const RowStats<A> state = stats_of<A>(s, row);
    const Target target = target_logit(double(state.own), p.focal, row);
    batch.z[r] = target.z;
    slope[r] = target.slope;
    batch.peak[r] = state.peak;
    batch.mass[r] = state.mass;
    batch.sum[r] = s.sums == nullptr ? 0 : p.focal.scale * s.sums[row];
    batch.alpha[r] = p.focal.alpha;
    if (p.alpha_by != AlphaBy::kNone && label >= 0) {
      batch.alpha[r] = static_cast<const A*>(p.alpha)[p.alpha_by == AlphaBy::kClass ? label : row];
    }
  }
}

// Writes the losses of a block where there is room for them, and returns their sum.
template <typename A>
double finish_rows(const Problem& p, const RowState& s, const RowBlock& block, void* losses) {
  RowBatch<A> batch;
  double slope[kMaxRows], sum = 0;
  gather_rows(p, s, block, batch, slope);
  row_losses(batch, p.focal);
  for (int64_t r = 0; r < block.rows; ++r) {
    const double loss = block.label[r] < 0 ? 0 : batch.loss[r];
    if (losses != nullptr) static_cast<A*>(losses)[block.begin + r] = static_cast<A>(loss);
    sum += loss;
  }
  return sum;
}

template <typename A>
void gradient_rows(const Problem& p, const RowState& s, const Upstream& up, const RowBlock& block,
                   RowGradient<A>* out) {
  RowBatch<A> batch;
  double slope[kMaxRows];
  gather_rows(p, s, block, batch, slope);
  row_gradients(batch, p.focal);
  const double count = double(*static_cast<const A*>(up.count));
  const double share = p.reduction == Reduction::kMean ? 1 / std::max(1.0, count) : 1;
  const A* upstream = static_cast<const A*>(up.data) + block.begin * up.stride;
  for (int64_t r = 0; r < block.rows; ++r) {
    const double factor = share * double(upstream[r * up.stride]), scaled = factor * p.focal.scale;
    out[r] = {static_cast<A>(batch.others[r] * scaled), static_cast<A>(batch.constant[r] * scaled),
              static_cast<A>(batch.target[r] * slope[r] * factor), batch.peak[r]};
  }
}

// Writes the gradient of one row with respect to the matrix; `out` may be the row itself.
template <typename T>
void write_row(const Problem& p, const Columns& c, const RowGradient<Acc<T>>& g, int64_t row, int64_t label, T* out) {
  using A = Acc<T>;
  if (label < 0) {
    std::fill_n(out, c.width, T{});
    return;
  }
  const A* cols = static_cast<const A*>(c.col_scale);
  const A row_scale = c.row_scale == nullptr ? A(1) : static_cast<const A*>(c.row_scale)[row];
  A buffer[kBlock];
  for (int64_t j = 0; j < c.width; j += kBlock) {
    const int64_t n = std::min(kBlock, c.width - j);
    const A* x = values<T>(c, row, j, n, buffer);
    if constexpr (std::is_same_v<T, A>) {
      if (cols == nullptr) {
        block_gradient(x, n, p.focal.scale, g.peak, g.others, g.constant, out + j);
        continue;
      }
    }
    block_gradient(x, n, p.focal.scale, g.peak, g.others, g.constant, buffer);
    if (cols != nullptr) scale_columns(buffer, n, row_scale, cols + j);
    write_block(buffer, n, out + j);
  }
  const int64_t own = label - c.first;
  if (own >= 0 && own < c.width) store(out + own, g.target * row_scale * (cols == nullptr ? A(1) : cols[own]));
}

// -----------------------------------------------------------------------------------------------
// Threads over blocks. The size of a block depends on the shape alone, so that any number of
// threads adds in one order.

struct Blocks {
  int64_t rows, size, count, grain;
  Blocks(int64_t rows, int64_t columns)
      : rows(rows),
        size(std::clamp<int64_t>(kMaxRows * 1024 / std::max<int64_t>(columns, 1) / 8 * 8, 8, kMaxRows)),
        count((rows + size - 1) / size),
        grain(std::max<int64_t>(1, kGrain / (size * (columns + kRowCost)))) {}

  template <typename F>
  void each(const F& run) const {  // run(block, first row, rows)
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run(block, block * size, std::min(size, rows - block * size));
      }
    });
  }
};

// A large gradient is fresh memory every time, and its page faults would cost several times what the kernel does; pages
// of 2 MiB make them rare. Advice only: where it is refused nothing changes.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthwhile = 16 << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Calls run(T{}) with the type of the matrix.
template <typename F>
void with_type(Type type, const F& run) {
  dispatch<Half, BFloat16>(type, run);
}

template <typename F>
void with_acc(Type type, const F& run) {
  type == Type::kDouble ? run(double{}) : run(float{});
}

// Rows that count. Labels are checked before any kernel uses one as an index.
int64_t count_rows(const Problem& p) {
  int64_t count = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t label = label_of(p, row);
    if (label == p.focal.ignore_index) continue;
    if (label < 0 || label >= p.focal.num_classes) {  // PyTorch turns out_of_range into IndexError
      throw std::out_of_range("label " + std::to_string(label) + " of row " + std::to_string(row) + " is outside [0, " +
                              std::to_string(p.focal.num_classes) + ") and is not ignore_index " +
                              std::to_string(p.focal.ignore_index) + "; correct the label or the number of classes");
    }
    ++count;
  }
  return count;
}

class CpuBackend : public Backend {
 public:
  void forward(const Problem& p, const Columns& c, const RowState& s, void* loss, void* count) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      reduce<Acc<T>>(p, Blocks(p.rows, c.width), loss, count, [&](const RowBlock& block, void* losses) {
        accumulate_rows<T>(p, c, s, block);
        return finish_rows<Acc<T>>(p, s, block, losses);
      });
    });
  }

  void backward(const Problem& p, const Columns& c, const RowState& s, const Upstream& up, void* grad) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      advise_huge_pages(grad, p.rows * c.width * int64_t{sizeof(T)});
      Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
        const RowBlock block(p, begin, n);
        RowGradient<Acc<T>> g[kMaxRows];
        gradient_rows<Acc<T>>(p, s, up, block, g);
        T* out = static_cast<T*>(grad) + begin * c.width;
        if (c.width <= kNarrow) {
          narrow_gradient(row_of<T>(c, begin), c.stride, c.width, block.label, n, p.focal.scale, g, out);
        } else {
          for (int64_t r = 0; r < n; ++r) write_row<T>(p, c, g[r], begin + r, block.label[r], out + r * c.width);
        }
      });
    });
  }

  void accumulate(const Problem& p, const Columns& c, const RowState& s) override {
    if (c.first == 0) count_rows(p);
    with_type(p.type, [&](auto type) {
      Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
        accumulate_rows<decltype(type)>(p, c, s, RowBlock(p, begin, n));
      });
    });
  }

  void finish(const Problem& p, const RowState& s, void* loss, void* count) override {
    with_acc(p.type, [&](auto acc) {
      using A = decltype(acc);
      reduce<A>(p, Blocks(p.rows, 1), loss, count,
                [&](const RowBlock& block, void* losses) { return finish_rows<A>(p, s, block, losses); });
    });
  }

  int64_t row_gradient_bytes(Type type) const override {
    return type == Type::kDouble ? sizeof(RowGradient<double>) : sizeof(RowGradient<float>);
  }

  void row_gradients(const Problem& p, const RowState& s, const Upstream& up, void* rows) override {
    with_acc(p.type, [&](auto acc) {
      using A = decltype(acc);
      Blocks(p.rows, 1).each([&](int64_t, int64_t begin, int64_t n) {
        gradient_rows<A>(p, s, up, RowBlock(p, begin, n), static_cast<RowGradient<A>*>(rows) + begin);
      });
    });
  }

  void write_gradient(const Problem& p, const Columns& c, const void* rows, void* out, int64_t stride) override {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      const auto* g = static_cast<const RowGradient<Acc<T>>*>(rows);
      Blocks(p.rows, c.width).each([&](int64_t, int64_t begin, int64_t n) {
        const RowBlock block(p, begin, n);
        for (int64_t r = 0; r < n; ++r) {
          write_row<T>(p, c, g[begin + r], begin + r, block.label[r], static_cast<T*>(out) + (begin + r) * stride);
        }
      });
    });
  }

  void inverse_norms(Type type, const void* x, int64_t rows, int64_t dim, void* inverse) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      Blocks(rows, dim).each([&](int64_t, int64_t begin, int64_t n) {
        for (int64_t row = begin; row < begin + n; ++row) {
          const T* v = static_cast<const T*>(x) + row * dim;
          const double norm = std::sqrt(dot_block(v, v, dim));
          static_cast<Acc<T>*>(inverse)[row] = static_cast<Acc<T>>(1 / (norm > kNormFloor ? norm : kNormFloor));
        }
      });
    });
  }

  void project(Type type, const void* x, int64_t rows, int64_t dim, const void* inverse, const void* grad, void* out,
               bool wide) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      using A = Acc<T>;
      Blocks(rows, dim).each([&](int64_t, int64_t begin, int64_t n) {
        for (int64_t row = begin; row < begin + n; ++row) {
          const T *v = static_cast<const T*>(x) + row * dim, *g = static_cast<const T*>(grad) + row * dim;
          const A* wide_g = static_cast<const A*>(grad) + row * dim;
          double scale = inverse == nullptr ? 0 : double(static_cast<const A*>(inverse)[row]);
          if (scale >= kFlooredNorm) scale = 0;
          const double dot = scale == 0 ? 0 : (wide ? dot_wide_block(v, wide_g, dim) : dot_block(v, g, dim));
          const A along = static_cast<A>(dot * scale * scale);
          T* to = static_cast<T*>(out) + row * dim;
          wide ? subtract_wide_block(v, dim, along, wide_g, to) : subtract_block(v, dim, along, g, to);
        }
      });
    });
  }

  void prepare(void* data, int64_t bytes) override { advise_huge_pages(data, bytes); }

  void add(Type type, const void* parts, int64_t count, int64_t n, void* total) override {
    with_type(type, [&](auto value) {
      using T = decltype(value);
      torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / count), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kBlock) {  // a step's sums stay in L1
          const T* part = static_cast<const T*>(parts) + i;
          for (int64_t k = 0; k < count; ++k, part += n) {
            add_block(part, std::min(kBlock, end - i), static_cast<Acc<T>*>(total) + i);
          }
        }
      });
    });
  }

  void sigmoid_forward(const Sigmoid& p, void* loss, void* count) override { sigmoid_cpu_forward(p, loss, count); }

  void sigmoid_backward(const Sigmoid& p, const Upstream& up, void* grad) override {
    sigmoid_cpu_backward(p, up, grad);
  }

 private:
  // Losses of all blocks, and their sum in the order of the blocks; run(rows, losses or null) returns a block's sum.
  template <typename A, typename F>
  static void reduce(const Problem& p, const Blocks& blocks, void* loss, void* count, const F& run) {
    const double rows = static_cast<double>(count_rows(p));
    std::vector<double> partial(blocks.count);
    void* losses = p.reduction == Reduction::kNone ? loss : nullptr;
    blocks.each([&](int64_t i, int64_t begin, int64_t n) { partial[i] = run(RowBlock(p, begin, n), losses); });
    double sum = 0;
    for (const double part : partial) sum += part;
    if (p.reduction == Reduction::kMean) sum /= std::max(1.0, rows);
    if (p.reduction != Reduction::kNone) *static_cast<A*>(loss) = static_cast<A>(sum);
    *static_cast<A*>(count) = static_cast<A>(rows);
  }
};

}  // namespace

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace facefast
