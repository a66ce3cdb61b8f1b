// The operators of facefast._C, registered through LibTorch's stable ABI: schemas, checks, outputs.
// The arithmetic is in the back ends; autograd, fake tensors and the public functions are in
// facefast/ops.
#include <Python.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "linear_focal.h"

#if defined(FACEFAST_WITH_CUDA)
#include "focal_cuda.h"
// Weak: it lives in libtorch_cuda, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace facefast {

namespace {

Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType type) {
  std::vector<int64_t> strides(dims, 1);
  for (int64_t d = dims - 2; d >= 0; --d) strides[d] = strides[d + 1] * (sizes[d + 1] > 1 ? sizes[d + 1] : 1);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return allocate(like, sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

// The same for the sizes of `like`, whatever their number.
Tensor empty_as(const Tensor& like, ScalarType type) { return allocate(like, like.sizes().data(), like.dim(), type); }

Type type_of(const Tensor& matrix, const char* name) {
  switch (matrix.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

ScalarType acc_of(Type type) { return type == Type::kDouble ? ScalarType::Double : ScalarType::Float; }

void check_same_device(const Tensor& a, const Tensor& b, const char* name) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), name,
                  " is on another device than the logits");
}

namespace {

Reduction reduction_of(int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction is ", reduction, "; it must be 0 none, 1 mean or 2 sum");
  return static_cast<Reduction>(reduction);
}

}  // namespace

Problem make_problem(const Tensor& logits, int64_t rows, int64_t classes, const Tensor& target,
                     const Options& options) {
  Problem p;
  p.type = type_of(logits, "logits");
  p.rows = rows;
  p.reduction = reduction_of(options.reduction);
  p.focal.num_classes = classes;
  p.focal.gamma = options.gamma;
  p.focal.smoothing = options.smoothing;
  p.focal.scale = options.scale;
  p.focal.alpha = options.alpha;
  p.focal.ignore_index = options.ignore_index;
  STD_TORCH_CHECK(
      classes >= 1 && options.gamma >= 0 && options.scale > 0 && options.smoothing >= 0 && options.smoothing < 1,
      "at least one class, gamma >= 0, scale > 0 and smoothing in [0, 1) are needed");

  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == rows && target.is_contiguous(), "target must be contiguous [",
                  rows, "]");
  p.target_is_int64 = target.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(p.target_is_int64 || target.scalar_type() == ScalarType::Int, "target must be int64 or int32");
  check_same_device(target, logits, "target");
  p.target = target.const_data_ptr();

  if (options.alphas) {
    const Tensor& alphas = *options.alphas;
    const bool by_row = alphas.dim() == 2;
    STD_TORCH_CHECK(alphas.scalar_type() == acc_of(p.type) && alphas.is_contiguous() &&
                        alphas.size(0) == (by_row ? rows : classes) && alphas.numel() == alphas.size(0),
                    "alphas must be contiguous [", classes, "] or [", rows, ", 1] in the precision of the losses");
    check_same_device(alphas, logits, "alphas");
    p.alpha = alphas.const_data_ptr();
    p.alpha_by = by_row ? AlphaBy::kRow : AlphaBy::kClass;
  }

  Margin& margin = p.focal.margin;
  margin.m1 = options.m1;
  margin.all = {options.m2, std::cos(options.m2), std::sin(options.m2), options.m3};
  margin.detached = options.detached;
  margin.active = options.margins || options.m1 != 1 || options.m2 != 0 || options.m3 != 0;
  if (options.margins) {
    const Tensor& margins = *options.margins;
    STD_TORCH_CHECK(margins.scalar_type() == ScalarType::Double && margins.dim() == 2 && margins.size(0) == rows &&
                        margins.size(1) == 4 && margins.is_contiguous(),
                    "margins must be contiguous float64 [", rows, ", 4]");
    check_same_device(margins, logits, "margins");
    margin.rows = static_cast<const MarginNumbers*>(margins.const_data_ptr());
  }
  return p;
}

Upstream make_upstream(Tensor& grad, const Tensor& count, Type type, int64_t size, Reduction reduction) {
  STD_TORCH_CHECK(grad.scalar_type() == acc_of(type) && count.scalar_type() == acc_of(type) && count.numel() == 1,
                  "the upstream gradient must have the precision of the loss");
  STD_TORCH_CHECK(grad.numel() == (reduction == Reduction::kNone ? size : 1),
                  "the upstream gradient must have the shape of the loss");
  bool expanded = true;  // one number seen through strides of 0, as loss.sum().backward() gives
  for (int64_t d = 0; d < grad.dim(); ++d) expanded = expanded && (grad.stride(d) == 0 || grad.size(d) == 1);
  if (reduction != Reduction::kNone || expanded) return {grad.const_data_ptr(), 0, count.const_data_ptr()};
  if (grad.dim() != 1) grad = torch::stable::contiguous(grad);
  return {grad.const_data_ptr(), grad.dim() == 1 ? grad.stride(0) : 1, count.const_data_ptr()};
}

Tensor empty_loss(const Tensor& like, const Problem& p) {
  return p.reduction == Reduction::kNone ? empty(like, {p.rows}, acc_of(p.type)) : empty(like, {}, acc_of(p.type));
}

RowState forward_state(const Tensor& like, const Tensor& stats, const Problem& p, std::optional<Tensor>& sums) {
  RowState state{stats.data_ptr()};
  if (p.focal.smoothing > 0) {
    sums = empty(like, {p.rows}, ScalarType::Double);
    state.sums = static_cast<double*>(sums->data_ptr());
  }
  return state;
}

struct Device::Gpu {
#if defined(FACEFAST_WITH_CUDA)
  torch::stable::accelerator::DeviceGuard guard;
  Tensor like;
  std::vector<Tensor> scratch;
  std::unique_ptr<Backend> backend;

  explicit Gpu(const Tensor& tensor) : guard(tensor.get_device_index()), like(tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    backend = cuda_backend(tensor.get_device_index(), stream, [this](int64_t bytes) {
      scratch.push_back(empty(like, {bytes}, ScalarType::Byte));
      return scratch.back().mutable_data_ptr();
    });
  }
#endif
};

Device::Device(const Tensor& tensor) : backend_(&cpu_backend()) {
#if defined(FACEFAST_WITH_CUDA)
  if (tensor.is_cuda()) {
    gpu_ = std::make_unique<Gpu>(tensor);
    backend_ = gpu_->backend.get();
  }
#endif
}

Device::~Device() = default;

namespace {

// Logits as the kernels read them: rows may lie anywhere, the classes of a row are next to each
// other.
Columns columns_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [N, C]");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.size(0) == 0 || logits.stride(1) == 1,
                  "the classes of a row must be contiguous");
  Columns columns;
  columns.data = logits.const_data_ptr();
  columns.stride = logits.stride(0);
  columns.width = logits.size(1);
  return columns;
}

std::tuple<Tensor, Tensor, Tensor> focal_forward(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& alphas,
                                                 const std::optional<Tensor>& margins, double gamma, double smoothing,
                                                 double scale, double alpha, int64_t ignore_index, double m1, double m2,
                                                 double m3, bool detached, int64_t reduction) {
  const Columns columns = columns_of(logits);
  const int64_t rows = logits.size(0);
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  const Problem p = make_problem(logits, rows, columns.width, target, options);
  const ScalarType acc = acc_of(p.type);
  Tensor loss = empty_loss(logits, p), stats = empty(logits, {rows, 3}, acc), count = empty(logits, {}, acc);
  std::optional<Tensor> sums;
  const RowState state = forward_state(logits, stats, p, sums);
  Device(logits)->forward(p, columns, state, loss.mutable_data_ptr(), count.mutable_data_ptr());
  return {loss, stats, count};
}

Tensor focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                      const std::optional<Tensor>& alphas, const std::optional<Tensor>& margins, const Tensor& stats,
                      const Tensor& count, double gamma, double smoothing, double scale, double alpha,
                      int64_t ignore_index, double m1, double m2, double m3, bool detached, int64_t reduction) {
  const Columns columns = columns_of(logits);
  const int64_t rows = logits.size(0);
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  const Problem p = make_problem(logits, rows, columns.width, target, options);
  STD_TORCH_CHECK(stats.numel() == 3 * rows && stats.scalar_type() == acc_of(p.type) && stats.is_contiguous(),
                  "stats are not those of the forward pass");
  Tensor upstream = grad, out = empty(logits, {rows, columns.width}, logits.scalar_type());
  Device(logits)->backward(p, columns, RowState{stats.data_ptr()},
                           make_upstream(upstream, count, p.type, rows, p.reduction), out.mutable_data_ptr());
  return out;
}

Sigmoid make_sigmoid(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& alphas, double gamma,
                     double alpha, int64_t reduction) {
  Sigmoid p;
  p.type = type_of(logits, "logits");
  p.size = logits.numel();
  p.gamma = gamma;
  p.alpha = alpha;
  p.reduction = reduction_of(reduction);
  STD_TORCH_CHECK(gamma >= 0, "gamma must be at least 0");
  STD_TORCH_CHECK(logits.is_contiguous() && target.is_contiguous() && target.numel() == p.size &&
                      target.scalar_type() == acc_of(p.type),
                  "logits and target must be contiguous and of one shape, target in the precision of the loss");
  check_same_device(target, logits, "target");
  p.logits = logits.const_data_ptr();
  p.target = target.const_data_ptr();
  if (alphas) {
    p.columns = alphas->numel();
    STD_TORCH_CHECK(alphas->scalar_type() == acc_of(p.type) && alphas->is_contiguous() &&
                        (p.columns > 0 ? p.size % p.columns == 0 : p.size == 0),
                    "alphas must be contiguous, one per column, in the precision of the loss");
    check_same_device(*alphas, logits, "alphas");
    p.alphas = alphas->const_data_ptr();
  }
  return p;
}

std::tuple<Tensor, Tensor> sigmoid_focal_forward(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& alphas, double gamma, double alpha,
                                                 int64_t reduction) {
  const Sigmoid p = make_sigmoid(logits, target, alphas, gamma, alpha, reduction);
  const ScalarType acc = acc_of(p.type);
  Tensor loss = p.reduction == Reduction::kNone ? empty_as(logits, acc) : empty(logits, {}, acc);
  Tensor count = empty(logits, {}, acc);
  Device(logits)->sigmoid_forward(p, loss.mutable_data_ptr(), count.mutable_data_ptr());
  return {loss, count};
}

Tensor sigmoid_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& alphas, const Tensor& count, double gamma, double alpha,
                              int64_t reduction) {
  const Sigmoid p = make_sigmoid(logits, target, alphas, gamma, alpha, reduction);
  Tensor upstream = grad, out = empty_as(logits, logits.scalar_type());
  Device(logits)->sigmoid_backward(p, make_upstream(upstream, count, p.type, p.size, p.reduction),
                                   out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_focal_forward(
    const Tensor& x, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& alphas,
    const std::optional<Tensor>& margins, double gamma, double smoothing, double scale, double alpha,
    int64_t ignore_index, double m1, double m2, double m3, bool detached, int64_t reduction, bool normalize,
    int64_t chunk, bool keep) {
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  LinearForward f = linear_forward(x, weight, target, options, normalize, chunk, keep);
  return {f.loss, f.stats, f.count, f.row_scale, f.col_scale, f.logits};
}

std::tuple<Tensor, Tensor> linear_focal_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                 const Tensor& target, const std::optional<Tensor>& alphas,
                                                 const std::optional<Tensor>& margins, const Tensor& stats,
                                                 const Tensor& count, const Tensor& row_scale, const Tensor& col_scale,
                                                 const Tensor& logits, double gamma, double smoothing, double scale,
                                                 double alpha, int64_t ignore_index, double m1, double m2, double m3,
                                                 bool detached, int64_t reduction, bool, int64_t chunk, bool,
                                                 bool need_x, bool need_weight) {
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  return linear_backward(grad, x, weight, target, options, weight.size(0), stats, count, row_scale, col_scale, logits,
                         chunk, need_x, need_weight);
}

// The loss whose classes lie on several ranks, in the three parts between which these exchange a few numbers a row. A
// label counts from the first class of the weights at hand, around the end: those of other ranks lie behind them.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_statistics(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                            double smoothing, double scale, int64_t ignore_index,
                                                            int64_t classes, bool normalize, int64_t chunk) {
  const std::optional<Tensor> none;
  const Options options{none, none, 0, smoothing, scale, 1, ignore_index, 1, 0, 0, false, 0};
  LinearStatistics found = linear_statistics(x, weight, target, options, classes, normalize, chunk);
  return {found.stats, found.sums, found.row_scale, found.col_scale};
}

std::tuple<Tensor, Tensor> block_losses(const Tensor& stats, const Tensor& sums, const Tensor& target,
                                        const std::optional<Tensor>& alphas, const std::optional<Tensor>& margins,
                                        double gamma, double smoothing, double scale, double alpha,
                                        int64_t ignore_index, double m1, double m2, double m3, bool detached,
                                        int64_t reduction, int64_t classes) {
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(1) == 3 && stats.is_contiguous(), "stats must be contiguous [N, 3]");
  const int64_t rows = stats.size(0);
  const Problem p = make_problem(stats, rows, classes, target, options);
  STD_TORCH_CHECK(stats.scalar_type() == acc_of(p.type), "stats must be float32 or float64");
  STD_TORCH_CHECK(
      sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.numel() == (smoothing > 0 ? rows : 0),
      "sums must be contiguous float64 [N], or empty without label smoothing");
  check_same_device(sums, stats, "sums");
  Tensor loss = empty_loss(stats, p), count = empty(stats, {}, acc_of(p.type));
  RowState state{const_cast<void*>(stats.const_data_ptr())};
  if (smoothing > 0) state.sums = static_cast<double*>(const_cast<void*>(sums.const_data_ptr()));
  Device(stats)->finish(p, state, loss.mutable_data_ptr(), count.mutable_data_ptr());
  return {loss, count};
}

std::tuple<Tensor, Tensor> block_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          const Tensor& target, const std::optional<Tensor>& alphas,
                                          const std::optional<Tensor>& margins, const Tensor& stats,
                                          const Tensor& count, const Tensor& row_scale, const Tensor& col_scale,
                                          double gamma, double smoothing, double scale, double alpha,
                                          int64_t ignore_index, double m1, double m2, double m3, bool detached,
                                          int64_t reduction, int64_t classes, int64_t chunk, bool need_x,
                                          bool need_weight) {
  const Options options{alphas, margins, gamma, smoothing, scale, alpha, ignore_index, m1, m2, m3, detached, reduction};
  return linear_backward(grad, x, weight, target, options, classes, stats, count, row_scale, col_scale, std::nullopt,
                         chunk, need_x, need_weight);
}

// What every softmax loss takes after its tensors.
#define FACEFAST_NUMBERS                                                                           \
  "float gamma, float smoothing, float scale, float alpha, int ignore_index, float m1, float m2, " \
  "float m3, "                                                                                     \
  "bool detached, int reduction"

STABLE_TORCH_LIBRARY(facefast, m) {
  m.def(
      "focal_forward(Tensor logits, Tensor target, Tensor? alphas, Tensor? "
      "margins, " FACEFAST_NUMBERS ") -> (Tensor loss, Tensor stats, Tensor count)");
  m.def(
      "focal_backward(Tensor grad, Tensor logits, Tensor target, Tensor? alphas, Tensor? margins, "
      "Tensor stats, "
      "Tensor count, " FACEFAST_NUMBERS ") -> Tensor");
  m.def(
      "linear_focal_forward(Tensor x, Tensor weight, Tensor target, Tensor? alphas, Tensor? margins, " FACEFAST_NUMBERS
      ", bool normalize, int chunk, bool keep) -> (Tensor loss, Tensor stats, Tensor count, Tensor row_scale, "
      "Tensor col_scale, Tensor logits)");
  m.def(
      "linear_focal_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? alphas, Tensor? margins, "
      "Tensor stats, Tensor count, Tensor row_scale, Tensor col_scale, Tensor logits, " FACEFAST_NUMBERS
      ", bool normalize, int chunk, bool keep, bool need_x, bool need_weight) -> (Tensor x_grad, Tensor weight_grad)");
  m.def(
      "block_statistics(Tensor x, Tensor weight, Tensor target, float smoothing, float scale, int ignore_index, "
      "int classes, bool normalize, int chunk) -> (Tensor stats, Tensor sums, Tensor row_scale, Tensor col_scale)");
  m.def("block_losses(Tensor stats, Tensor sums, Tensor target, Tensor? alphas, Tensor? margins, " FACEFAST_NUMBERS
        ", int classes) -> (Tensor loss, Tensor count)");
  m.def(
      "block_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? alphas, Tensor? margins, "
      "Tensor stats, Tensor count, Tensor row_scale, Tensor col_scale, " FACEFAST_NUMBERS
      ", int classes, int chunk, bool need_x, bool need_weight) -> (Tensor x_grad, Tensor weight_grad)");
  m.def(
      "sigmoid_focal_forward(Tensor logits, Tensor target, Tensor? alphas, float gamma, float "
      "alpha, int reduction) "
      "-> (Tensor loss, Tensor count)");
  m.def(
      "sigmoid_focal_backward(Tensor grad, Tensor logits, Tensor target, Tensor? alphas, Tensor "
      "count, float gamma, "
      "float alpha, int reduction) -> Tensor");
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("focal_forward", TORCH_BOX(&focal_forward));
  m.impl("focal_backward", TORCH_BOX(&focal_backward));
  m.impl("linear_focal_forward", TORCH_BOX(&linear_focal_forward));
  m.impl("linear_focal_backward", TORCH_BOX(&linear_focal_backward));
  m.impl("block_statistics", TORCH_BOX(&block_statistics));
  m.impl("block_losses", TORCH_BOX(&block_losses));
  m.impl("block_backward", TORCH_BOX(&block_backward));
  m.impl("sigmoid_focal_forward", TORCH_BOX(&sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward", TORCH_BOX(&sigmoid_focal_backward));
}

STABLE_TORCH_LIBRARY_IMPL(facefast, CPU, m) { register_kernels(m); }
#if defined(FACEFAST_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(facefast, CUDA, m) { register_kernels(m); }
#endif

}  // namespace
}  // namespace facefast

// The module holds two facts; the operators register themselves when it is loaded.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#if defined(FACEFAST_WITH_CUDA)
  constexpr int kCuda = 1;
#else
  constexpr int kCuda = 0;
#endif
  if (PyModule_AddIntConstant(module, "cuda", kCuda) != 0 ||
      PyModule_AddIntConstant(module, "version", FACEFAST_KERNEL_VERSION) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
