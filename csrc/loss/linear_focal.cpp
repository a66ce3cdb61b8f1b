// linear_focal_loss: the logits x W^T exist one chunk of classes at a time, in a buffer that stays in the cache.
// Forward adds each chunk to the softmax statistics; backward computes it again, overwrites it with its gradient, and
// multiplies that into the gradients of x and W. Where the logits are kept instead, backward reads them, and their
// gradient alone goes through the buffer. Norms are factors of rows and columns in the kernels that read the logits:
// nothing is ever divided by them. Every sum is taken in a fixed order.
#include "linear_focal.h"

#include <algorithm>

#include "products.h"

namespace facefast {
namespace {

constexpr int64_t kCpuChunkBytes = 2 << 20;   // a chunk of logits: a core's share of the cache
constexpr int64_t kGpuChunkBytes = 32 << 20;  // well within the L2 cache
constexpr int64_t kChunkStep = 64;            // classes; whole tiles for the matrix products

// The chunks of classes and what each one needs.
struct Chunks {
  const Tensor &x, &weight, &row_scale, &col_scale;
  int64_t rows, classes, dim, width;
  Type type;
  bool ready;     // the logits are those of the forward pass
  Tensor logits;  // [rows, padded(classes)] where they are kept, or the buffer
  Tensor buffer;  // [rows, padded(width)], for the gradient

  // `kept` is for all logits, which are there already if `ready`; without it a chunk takes the place of the one before.
  Chunks(const Tensor& x, const Tensor& weight, const Tensor& row_scale, const Tensor& col_scale, int64_t wish,
         const std::optional<Tensor>& kept = std::nullopt, bool ready = false)
      : x(x),
        weight(weight),
        row_scale(row_scale),
        col_scale(col_scale),
        rows(x.size(0)),
        classes(weight.size(0)),
        dim(x.size(1)),
        width(width_for(x, classes, wish)),
        type(type_of(x, "x")),
        ready(ready),
        logits(kept ? *kept : empty(x, {rows, padded(x, width)}, x.scalar_type())),
        buffer(kept && ready ? empty(x, {rows, padded(x, width)}, x.scalar_type()) : logits) {}

  // Columns of a matrix whose rows all begin at 16 bytes on a GPU, for its kernels to read whole chunks.
  static int64_t padded(const Tensor& x, int64_t columns) {
    const int64_t step = x.is_cuda() ? 16 / static_cast<int64_t>(x.element_size()) : 1;
    return divide_up(columns, step) * step;
  }

  static int64_t width_for(const Tensor& x, int64_t classes, int64_t wish) {
    const int64_t row_bytes = std::max<int64_t>(1, x.size(0)) * static_cast<int64_t>(x.element_size());
    const int64_t fits = (x.is_cuda() ? kGpuChunkBytes : kCpuChunkBytes) / row_bytes / kChunkStep * kChunkStep;
    return std::min(classes, wish > 0 ? wish : std::max(fits, 4 * kChunkStep));
  }

  // Calls run(columns, gradient [rows, n], weights [n, dim]) for each chunk, with its logits computed, in `columns`;
  // the place for its gradient is their own or the buffer.
  template <typename F>
  void each(const F& run) {
    for (int64_t first = 0; first < classes; first += width) {
      const int64_t n = std::min(width, classes - first);
      Tensor all = weight;
      const bool in_place = logits.size(1) == padded(x, classes);
      Tensor weights = torch::stable::narrow(all, 0, first, n);
      Tensor chunk = torch::stable::narrow(logits, 1, in_place ? first : 0, n);
      if (!ready) multiply({whole_product(x, torch::stable::transpose(weights, 0, 1), chunk)});
      Columns columns;
      columns.data = chunk.data_ptr();
      columns.stride = logits.stride(0);
      columns.first = first;
      columns.width = n;
      if (row_scale.numel() > 0 || col_scale.numel() > 0) {
        columns.row_scale = row_scale.data_ptr();
        columns.col_scale = static_cast<const char*>(col_scale.data_ptr()) + first * col_scale.element_size();
      }
      run(columns, ready ? torch::stable::narrow(buffer, 1, 0, n) : chunk, weights);
    }
  }
};

void check_operands(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.is_contiguous() &&
                      weight.is_contiguous() && x.scalar_type() == weight.scalar_type(),
                  "x and weight must be contiguous [N, D] and [C, D] of one type");
  check_same_device(weight, x, "weight");
}

// Norms where they are wanted, and the statistics of every row over all of `weight`.
void accumulate_all(const Device& device, const Problem& p, const RowState& state, const Tensor& x,
                    const Tensor& weight, const Tensor& row_scale, const Tensor& col_scale, int64_t chunk,
                    const std::optional<Tensor>& kept = std::nullopt) {
  if (row_scale.numel() > 0 || col_scale.numel() > 0) {
    device->inverse_norms(p.type, x.data_ptr(), x.size(0), x.size(1), row_scale.data_ptr());
    device->inverse_norms(p.type, weight.data_ptr(), weight.size(0), x.size(1), col_scale.data_ptr());
  }
  Chunks chunks(x, weight, row_scale, col_scale, chunk, kept);
  chunks.each([&](const Columns& columns, const Tensor&, const Tensor&) { device->accumulate(p, columns, state); });
}

}  // namespace

LinearForward linear_forward(const Tensor& x, const Tensor& weight, const Tensor& target, const Options& options,
                             bool normalize, int64_t chunk, bool keep) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), classes = weight.size(0);
  const Problem p = make_problem(x, rows, classes, target, options);
  const ScalarType acc = acc_of(p.type);
  LinearForward result{empty_loss(x, p),
                       empty(x, {rows, 3}, acc),
                       empty(x, {}, acc),
                       empty(x, {normalize ? rows : 0}, acc),
                       empty(x, {normalize ? classes : 0}, acc),
                       empty(x, {keep ? rows : 0, Chunks::padded(x, classes)}, x.scalar_type())};
  Device device(x);
  std::optional<Tensor> sums, kept;
  if (keep) kept = result.logits;
  const RowState state = forward_state(x, result.stats, p, sums);
  accumulate_all(device, p, state, x, weight, result.row_scale, result.col_scale, chunk, kept);
  device->finish(p, state, result.loss.data_ptr(), result.count.data_ptr());
  return result;
}

LinearStatistics linear_statistics(const Tensor& x, const Tensor& weight, const Tensor& target, const Options& options,
                                   int64_t classes, bool normalize, int64_t chunk) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), own = weight.size(0);
  const Problem p = make_problem(x, rows, classes, target, options);
  const ScalarType acc = acc_of(p.type);
  LinearStatistics result{empty(x, {rows, 3}, acc), empty(x, {p.focal.smoothing > 0 ? rows : 0}, ScalarType::Double),
                          empty(x, {normalize ? rows : 0}, acc), empty(x, {normalize ? own : 0}, acc)};
  if (own == 0) {  // the first columns start the statistics, and here are none
    torch::stable::zero_(result.stats);
    torch::stable::zero_(result.sums);
  }
  RowState state{result.stats.data_ptr()};
  if (p.focal.smoothing > 0) state.sums = static_cast<double*>(result.sums.data_ptr());
  Device device(x);
  accumulate_all(device, p, state, x, weight, result.row_scale, result.col_scale, chunk);
  return result;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                           const Tensor& target, const Options& options, int64_t total_classes,
                                           const Tensor& stats, const Tensor& count, const Tensor& row_scale,
                                           const Tensor& col_scale, const std::optional<Tensor>& logits, int64_t chunk,
                                           bool need_x, bool need_weight) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), classes = weight.size(0), dim = x.size(1);
  const Problem p = make_problem(x, rows, total_classes, target, options);
  const ScalarType type = x.scalar_type(), acc = acc_of(p.type);
  const bool normalize = row_scale.numel() > 0 || col_scale.numel() > 0;
  STD_TORCH_CHECK(
      stats.numel() == 3 * rows && (!normalize || (row_scale.numel() == rows && col_scale.numel() == classes)),
      "stats and norms are not those of the forward pass");
  const bool kept = logits && logits->numel() > 0;
  STD_TORCH_CHECK(!kept || (logits->dim() == 2 && logits->size(0) == rows && logits->is_contiguous() &&
                            logits->size(1) == Chunks::padded(x, classes) && logits->scalar_type() == type),
                  "logits are not those of the forward pass");
  Tensor upstream = grad;
  Tensor x_grad = empty(x, {need_x ? rows : 0, dim}, type),
         weight_grad = empty(x, {need_weight ? classes : 0, dim}, type);
  if (classes == 0) {  // a rank without classes has no part in any gradient
    torch::stable::zero_(x_grad);
    return {x_grad, weight_grad};
  }

  Device device(x);
  Tensor gradients = empty(x, {rows, device->row_gradient_bytes(p.type)}, ScalarType::Byte);
  device->row_gradients(p, RowState{stats.data_ptr()}, make_upstream(upstream, count, p.type, rows, p.reduction),
                        gradients.data_ptr());
  Chunks chunks(x, weight, row_scale, col_scale, chunk, kept ? logits : std::nullopt, kept);
  const Tile tile = tile_for(x, rows, chunks.width, dim, true);
  const int64_t most = need_x ? divide_up(chunks.width, tile.inner) : 0;
  Tensor total = empty(x, {need_x ? rows : 0, dim}, acc), parts = empty(x, {most, rows, dim}, type);
  torch::stable::zero_(total);
  device->prepare(weight_grad.data_ptr(), weight_grad.numel() * static_cast<int64_t>(weight_grad.element_size()));
  chunks.each([&](const Columns& columns, Tensor gradient, Tensor weights) {
    device->write_gradient(p, columns, gradients.data_ptr(), gradient.data_ptr(), gradient.stride(0));
    std::optional<Product> to_weight, to_x;
    if (need_weight) {
      to_weight = whole_product(torch::stable::transpose(gradient, 0, 1), x,
                                torch::stable::narrow(weight_grad, 0, columns.first, columns.width));
    }
    if (need_x) {
      to_x = Product{gradient, weights, torch::stable::narrow(parts, 0, 0, divide_up(columns.width, tile.inner)), tile};
    }
    multiply({to_weight, to_x});
    if (need_weight && normalize) {
      device->project(p.type, weights.data_ptr(), columns.width, dim, columns.col_scale, to_weight->out.data_ptr(),
                      to_weight->out.data_ptr(), false);
    }
    if (need_x) device->add(p.type, parts.data_ptr(), to_x->out.size(0), rows * dim, total.data_ptr());
  });
  if (need_x) {
    device->project(p.type, x.data_ptr(), rows, dim, normalize ? row_scale.data_ptr() : nullptr, total.data_ptr(),
                    x_grad.data_ptr(), true);
  }
  return {x_grad, weight_grad};
}

}  // namespace facefast
