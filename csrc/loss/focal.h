// What ops.cpp asks of the two back ends, focal_cpu.cpp and focal_cuda.cu. No PyTorch types cross
// this line: raw pointers, sizes in elements, and on the GPU a stream.
#pragma once

#include <cstdint>

#include "focal_math.h"

namespace facefast {

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };
// Calls run(T{}) with the C++ type; each back end has its own 16-bit ones.
template <typename Half, typename BFloat16, typename F>
void dispatch(Type type, const F& run) {
  switch (type) {
    case Type::kFloat:
      return run(float{});
    case Type::kDouble:
      return run(double{});
    case Type::kHalf:
      return run(Half{});
    case Type::kBFloat16:
      return run(BFloat16{});
  }
}

enum class AlphaBy { kNone, kClass, kRow };

// Statistics, losses, alpha and upstream gradients are float, or double where the matrix is double
// ("acc" below).
struct Problem {
  Focal focal;
  Type type = Type::kFloat;  // of the matrix
  int64_t rows = 0;
  const void* target = nullptr;  // int32 or int64, one per row
  bool target_is_int64 = true;
  const void* alpha = nullptr;  // acc
  AlphaBy alpha_by = AlphaBy::kNone;
  Reduction reduction = Reduction::kMean;
};

// Columns [first, first + width) of the logits: all of them, or one chunk of linear_focal's.
struct Columns {
  const void* data = nullptr;  // [rows, width] of Problem::type
  int64_t stride = 0;          // elements from row to row
  int64_t first = 0;
  int64_t width = 0;
  // The logit is data * row_scale * col_scale; acc, one per row and one per column here. Both null
  // or both given.
  const void* row_scale = nullptr;
  const void* col_scale = nullptr;
};

// What the forward pass leaves for the backward pass, per row: the statistics of the classes other
// than the target, and the target's own value before margin and scale.
template <typename Acc>
struct RowStats {
  Acc peak, mass, own;
};

struct RowState {
  void* stats = nullptr;   // RowStats [rows]
  double* sums = nullptr;  // [rows]: sum of the other values; null without label smoothing, and in
                           // the backward pass
};

struct Upstream {
  const void* data = nullptr;   // acc
  int64_t stride = 0;           // 0 when one number serves all rows
  const void* count = nullptr;  // acc [1]: rows that count; the mean divides by it
};

struct Sigmoid {
  double gamma = 2;
  double alpha = -1;             // weight of target 1, target 0 gets 1 - alpha; below 0 there is no weight
  const void* alphas = nullptr;  // acc [columns], instead of `alpha`
  int64_t columns = 1;
  Type type = Type::kFloat;  // of the logits
  int64_t size = 0;
  const void* logits = nullptr;
  const void* target = nullptr;  // acc, 0 to 1; NaN counts for nothing
  Reduction reduction = Reduction::kMean;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // focal_loss. `loss` is acc [rows], or acc [1] after a reduction; `count` is acc [1].
  virtual void forward(const Problem&, const Columns&, const RowState&, void* loss, void* count) = 0;
  virtual void backward(const Problem&, const Columns&, const RowState&, const Upstream&, void* grad) = 0;

  // linear_focal_loss: add each chunk to the statistics, then turn them into losses; for the
  // backward pass turn them into one RowGradient a row, then write each chunk's gradient to rows
  // `stride` elements apart, which may be the chunk itself.
  virtual void accumulate(const Problem&, const Columns&, const RowState&) = 0;
  virtual void finish(const Problem&, const RowState&, void* loss, void* count) = 0;
  virtual int64_t row_gradient_bytes(Type) const = 0;
  virtual void row_gradients(const Problem&, const RowState&, const Upstream&, void* rows) = 0;
  virtual void write_gradient(const Problem&, const Columns&, const void* rows, void* out, int64_t stride) = 0;

  // Before the first write to a large result that is fresh memory.
  virtual void prepare(void* data, int64_t bytes) = 0;

  // total (acc) [n] += parts [count, n], one part after the other.
  virtual void add(Type, const void* parts, int64_t count, int64_t n, void* total) = 0;

  // Normalisation: inverse[i] = 1 / max(norm of row i, 1e-12). project writes grad_i without its part along x_i, or
  // just grad_i where inverse is null; `grad` is acc if `wide`, else of the type of x, and may then be `out` itself.
  virtual void inverse_norms(Type, const void* x, int64_t rows, int64_t dim, void* inverse) = 0;
  virtual void project(Type, const void* x, int64_t rows, int64_t dim, const void* inverse, const void* grad, void* out,
                       bool wide) = 0;

  virtual void sigmoid_forward(const Sigmoid&, void* loss, void* count) = 0;
  virtual void sigmoid_backward(const Sigmoid&, const Upstream&, void* grad) = 0;
};

Backend& cpu_backend();
void sigmoid_cpu_forward(const Sigmoid&, void* loss, void* count);
void sigmoid_cpu_backward(const Sigmoid&, const Upstream&, void* grad);

}  // namespace facefast
