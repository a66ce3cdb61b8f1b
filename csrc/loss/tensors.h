// What ops.cpp and linear_focal.cpp share: LibTorch tensors (stable ABI) in, the back ends' plain
// structs out.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <memory>
#include <optional>

#include "focal.h"

// Raised with every change of a schema; facefast/ops/native.py holds the same number.
#define FACEFAST_KERNEL_VERSION 6

namespace facefast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor without values on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);

Type type_of(const Tensor& matrix, const char* name);
ScalarType acc_of(Type type);

// The options of the softmax losses, in the order of their schemas.
struct Options {
  const std::optional<Tensor>& alphas;   // acc [C] or [N, 1]
  const std::optional<Tensor>& margins;  // float64 [N, 4]: m2, cos m2, sin m2, m3
  double gamma, smoothing, scale, alpha;
  int64_t ignore_index;
  double m1, m2, m3;
  bool detached;
  int64_t reduction;
};

// Checks everything that a kernel would otherwise trust. `logits` gives the type and the device.
Problem make_problem(const Tensor& logits, int64_t rows, int64_t classes, const Tensor& target, const Options& options);

// `grad` may be replaced by a contiguous copy, and must live as long as the result.
Upstream make_upstream(Tensor& grad, const Tensor& count, Type type, int64_t size, Reduction reduction);

void check_same_device(const Tensor& a, const Tensor& b, const char* name);

Tensor empty_loss(const Tensor& like, const Problem& problem);

// The row state of a forward pass; `sums` keeps its scratch memory alive.
RowState forward_state(const Tensor& like, const Tensor& stats, const Problem& problem, std::optional<Tensor>& sums);

// The back end of a tensor's device, ready to launch on its current stream. Scratch memory that it
// asks for lives as long as this object.
class Device {
 public:
  explicit Device(const Tensor& tensor);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  Backend* operator->() const { return backend_; }

 private:
  struct Gpu;
  std::unique_ptr<Gpu> gpu_;
  Backend* backend_;
};

}  // namespace facefast
