// linear_focal_loss: the logits x W^T exist one chunk of classes at a time, in a buffer that stays in the cache.
// Forward adds each chunk to the softmax statistics; backward computes it again, overwrites it with its gradient, and
// multiplies that into the gradients of x and W. Every sum is taken in a fixed order.
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
  Tensor buffer;  // [rows, width]

  Chunks(const Tensor& x, const Tensor& weight, const Tensor& row_scale, const Tensor& col_scale, int64_t wish)
      : x(x),
        weight(weight),
        row_scale(row_scale),
        col_scale(col_scale),
        rows(x.size(0)),
        classes(weight.size(0)),
        dim(x.size(1)),
        width(width_for(x, classes, wish)),
        type(type_of(x, "x")),
        buffer(empty(x, {rows, width}, x.scalar_type())) {}

  static int64_t width_for(const Tensor& x, int64_t classes, int64_t wish) {
    const int64_t row_bytes = std::max<int64_t>(1, x.size(0)) * static_cast<int64_t>(x.element_size());
    const int64_t fits = (x.is_cuda() ? kGpuChunkBytes : kCpuChunkBytes) / row_bytes / kChunkStep * kChunkStep;
    return std::min(classes, wish > 0 ? wish : std::max(fits, 4 * kChunkStep));
  }

  // Calls run(columns, logits [rows, n], weights [n, dim]) for each chunk, with its logits computed.
  template <typename F>
  void each(const F& run) {
    for (int64_t first = 0; first < classes; first += width) {
      const int64_t n = std::min(width, classes - first);
      Tensor all = weight;
      Tensor weights = torch::stable::narrow(all, 0, first, n), logits = torch::stable::narrow(buffer, 1, 0, n);
      multiply({whole_product(x, torch::stable::transpose(weights, 0, 1), logits)});
      Columns columns;
      columns.data = logits.data_ptr();
      columns.stride = width;
      columns.first = first;
      columns.width = n;
      if (row_scale.numel() > 0 || col_scale.numel() > 0) {
        columns.row_scale = row_scale.data_ptr();
        columns.col_scale = static_cast<const char*>(col_scale.data_ptr()) + first * col_scale.element_size();
      }
      run(columns, logits, weights);
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
                    const Tensor& weight, const Tensor& row_scale, const Tensor& col_scale, int64_t chunk) {
  if (row_scale.numel() > 0 || col_scale.numel() > 0) {
    device->inverse_norms(p.type, x.data_ptr(), x.size(0), x.size(1), row_scale.data_ptr());
    device->inverse_norms(p.type, weight.data_ptr(), weight.size(0), x.size(1), col_scale.data_ptr());
  }
  Chunks(x, weight, row_scale, col_scale, chunk).each([&](const Columns& columns, const Tensor&, const Tensor&) {
    device->accumulate(p, columns, state);
  });
}

}  // namespace

LinearForward linear_forward(const Tensor& x, const Tensor& weight, const Tensor& target, const Options& options,
                             bool normalize, int64_t chunk) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), classes = weight.size(0), dim = x.size(1);
  const Problem p = make_problem(x, rows, classes, target, options);
  const ScalarType acc = acc_of(p.type);
  LinearForward result{empty_loss(x, p), empty(x, {rows, 3}, acc), empty(x, {}, acc),
                       empty(x, {normalize ? rows : 0}, acc), empty(x, {normalize ? classes : 0}, acc)};
  Device device(x);
  std::optional<Tensor> sums;
  const RowState state = forward_state(x, result.stats, p, sums);
  accumulate_all(device, p, state, x, weight, result.row_scale, result.col_scale, chunk);
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
                                           const Tensor& col_scale, int64_t chunk, bool need_x, bool need_weight) {
  check_operands(x, weight);
  const int64_t rows = x.size(0), classes = weight.size(0), dim = x.size(1);
  const Problem p = make_problem(x, rows, total_classes, target, options);
  const ScalarType type = x.scalar_type(), acc = acc_of(p.type);
  const bool normalize = row_scale.numel() > 0 || col_scale.numel() > 0;
  STD_TORCH_CHECK(
      stats.numel() == 3 * rows && (!normalize || (row_scale.numel() == rows && col_scale.numel() == classes)),
      "stats and norms are not those of the forward pass");
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
  Chunks chunks(x, weight, row_scale, col_scale, chunk);
  const Tile tile = tile_for(x, rows, chunks.width, dim, true);
  const int64_t most = need_x ? divide_up(chunks.width, tile.inner) : 0;
  Tensor total = empty(x, {need_x ? rows : 0, dim}, acc), parts = empty(x, {most, rows, dim}, type);
  torch::stable::zero_(total);
  device->prepare(weight_grad.data_ptr(), weight_grad.numel() * static_cast<int64_t>(weight_grad.element_size()));
  chunks.each([&](const Columns& columns, Tensor logits, Tensor weights) {
    device->overwrite(p, columns, gradients.data_ptr());
    std::optional<Product> to_weight, to_x;
    if (need_weight) {
      to_weight = whole_product(torch::stable::transpose(logits, 0, 1), x,
                                torch::stable::narrow(weight_grad, 0, columns.first, columns.width));
    }
    if (need_x) {
      to_x = Product{logits, weights, torch::stable::narrow(parts, 0, 0, divide_up(columns.width, tile.inner)), tile};
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
