// The operators of batch normalisation with an activation: schemas, checks, outputs. Their autograd, fake tensors and
// public functions are in facefast/ops/batch_norm_act.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../loss/tensors.h"
#include "norm.h"

#if defined(FACEFAST_WITH_CUDA)
// Weak: it lives in libtorch_cuda, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace facefast {
namespace {

using Given = const std::optional<Tensor>&;

// Runs on the device of `tensor`, on its current stream; scratch memory lives until the work is queued.
template <typename F>
void on_device(const Tensor& tensor, const F& run) {
#if defined(FACEFAST_WITH_CUDA)
  if (tensor.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    std::vector<Tensor> scratch;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    run(*norm_cuda(tensor.get_device_index(), stream, [&](int64_t bytes) {
      scratch.push_back(empty(tensor, {bytes}, ScalarType::Byte));
      return scratch.back().mutable_data_ptr();
    }));
    return;
  }
#endif
  run(norm_cpu());
}

bool is_dense(const Tensor& x, bool channels_last) {
  int64_t expected = 1;
  const auto agrees = [&](int64_t d) {
    const bool same = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return same;
  };
  if (channels_last && !agrees(1)) return false;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (!(channels_last && d == 1) && !agrees(d)) return false;
  }
  return true;
}

// x as the back ends read it.
Norm make_norm(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) >= 1, "x must be [N, C, ...] with at least one channel");
  Norm norm;
  norm.type = type_of(x, "x");
  norm.channels = x.size(1);
  int64_t inner = 1;
  for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  const bool last = is_dense(x, true);
  STD_TORCH_CHECK(last || is_dense(x, false), "x must be dense, channels last or contiguous");
  norm.outer = last ? x.size(0) * inner : x.size(0);
  norm.inner = last ? 1 : inner;
  norm.x = x.const_data_ptr();
  STD_TORCH_CHECK(!x.is_cuda() || (last && norm.type != Type::kDouble),
                  "on a GPU x must be channels last and float32, float16 or bfloat16");
  return norm;
}

// A tensor with the shape of x, laid out as x is, 16-byte aligned on a GPU: itself or a copy, which `kept` holds.
const void* laid_out(const Tensor& tensor, const Tensor& x, std::vector<Tensor>& kept, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type(), name,
                  " must have the shape and dtype of x");
  check_same_device(tensor, x, name);
  bool same = !x.is_cuda() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), name, " must have the shape and dtype of x");
    same = same && (x.size(d) == 1 || tensor.stride(d) == x.stride(d));
  }
  if (same) return tensor.const_data_ptr();
  kept.push_back(torch::stable::empty_like(x));
  torch::stable::copy_(kept.back(), tensor);
  return kept.back().const_data_ptr();
}

const void* by_channel(Given tensor, const Tensor& x, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == acc_of(type_of(x, "x")) && tensor->dim() == 1 &&
                      tensor->size(0) == x.size(1) && tensor->is_contiguous(),
                  name, " must be contiguous [", x.size(1), "] and float32, or float64 where x is");
  check_same_device(*tensor, x, name);
  return tensor->const_data_ptr();
}

Norm make_norm(const Tensor& x, Given mean, Given var, Given weight, Given bias, Given slope, double eps,
               int64_t activation, std::vector<Tensor>& kept) {
  Norm norm = make_norm(x);
  norm.x = laid_out(x, x, kept, "x");
  norm.mean = by_channel(mean, x, "mean");
  norm.var = by_channel(var, x, "var");
  norm.weight = by_channel(weight, x, "weight");
  norm.bias = by_channel(bias, x, "bias");
  norm.slope = by_channel(slope, x, "slope");
  norm.eps = eps;
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation is ", activation,
                  "; it must be 0 none, 1 ReLU or 2 PReLU");
  norm.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK((norm.activation == Activation::kPReLU) == (norm.slope != nullptr),
                  "PReLU, and it alone, takes a slope");
  return norm;
}

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x, Given running_mean, Given running_var, Given batches,
                                            double momentum) {
  std::vector<Tensor> kept;
  Norm norm = make_norm(x);
  norm.x = laid_out(x, x, kept, "x");
  STD_TORCH_CHECK(norm.count() > 1, "a channel needs more than 1 value to have a variance; x has ", norm.count());
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var go together");
  Running running{const_cast<void*>(by_channel(running_mean, x, "running_mean")),
                  const_cast<void*>(by_channel(running_var, x, "running_var")), nullptr, momentum};
  if (batches) {
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1, "batches must be one int64");
    check_same_device(*batches, x, "batches");
    running.batches = static_cast<int64_t*>(batches->data_ptr());
  }
  const ScalarType acc = acc_of(norm.type);
  Tensor mean = empty(x, {norm.channels}, acc), var = empty(x, {norm.channels}, acc);
  on_device(x, [&](NormBackend& backend) {
    backend.statistics(norm, mean.mutable_data_ptr(), var.mutable_data_ptr(), running);
  });
  return {mean, var};
}

Tensor normalise_forward(const Tensor& x, Given mean, Given var, Given weight, Given bias, Given slope, Given residual,
                         double eps, int64_t activation, bool /*batch: for the backward pass*/) {
  std::vector<Tensor> kept;
  const Norm norm = make_norm(x, mean, var, weight, bias, slope, eps, activation, kept);
  STD_TORCH_CHECK(!residual || norm.activation != Activation::kPReLU, "no residual goes in front of a PReLU");
  const void* added = residual ? laid_out(*residual, x, kept, "residual") : nullptr;
  Tensor y = torch::stable::empty_like(x);
  on_device(x, [&](NormBackend& backend) { backend.forward(norm, added, y.mutable_data_ptr()); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalise_backward(const Tensor& grad, const Tensor& x, Given mean,
                                                                      Given var, Given weight, Given bias, Given slope,
                                                                      Given output, double eps, int64_t activation,
                                                                      bool batch, bool need_x, bool need_residual,
                                                                      bool need_parameters) {
  std::vector<Tensor> kept;
  const Norm norm = make_norm(x, mean, var, weight, bias, slope, eps, activation, kept);
  const void* upstream = laid_out(grad, x, kept, "grad");
  const void* known = output ? laid_out(*output, x, kept, "output") : nullptr;
  need_parameters = need_parameters || batch;
  const ScalarType acc = acc_of(norm.type);
  const int64_t size = need_parameters ? norm.channels : 0;
  Tensor dx = need_x ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
  Tensor dresidual = need_residual ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
  Tensor dweight = empty(x, {size}, acc), dbias = empty(x, {size}, acc), dslope = empty(x, {size}, acc);
  NormGradients to;
  if (need_x) to.x = dx.mutable_data_ptr();
  if (need_residual) to.residual = dresidual.mutable_data_ptr();
  if (need_parameters) {
    to.weight = dweight.mutable_data_ptr();
    to.bias = dbias.mutable_data_ptr();
    to.slope = dslope.mutable_data_ptr();
  }
  on_device(x, [&](NormBackend& backend) { backend.backward(norm, upstream, known, batch, to); });
  return {dx, dresidual, dweight, dbias, dslope};
}

STABLE_TORCH_LIBRARY_FRAGMENT(facefast, m) {
  m.def(
      "batch_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
      "float momentum) -> (Tensor mean, Tensor var)");
  m.def(
      "normalise_forward(Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? slope, "
      "Tensor? residual, float eps, int activation, bool batch) -> Tensor");
  m.def(
      "normalise_backward(Tensor grad, Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, "
      "Tensor? slope, Tensor? output, float eps, int activation, bool batch, bool need_x, bool need_residual, "
      "bool need_parameters) -> (Tensor x_grad, Tensor residual_grad, Tensor weight_grad, Tensor bias_grad, "
      "Tensor slope_grad)");
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics));
  m.impl("normalise_forward", TORCH_BOX(&normalise_forward));
  m.impl("normalise_backward", TORCH_BOX(&normalise_backward));
}

STABLE_TORCH_LIBRARY_IMPL(facefast, CPU, m) { register_kernels(m); }
#if defined(FACEFAST_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(facefast, CUDA, m) { register_kernels(m); }
#endif

}  // namespace
}  // namespace facefast
