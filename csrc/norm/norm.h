// What ops.cpp asks of the two back ends, norm_cpu.cpp and norm_cuda.cu: batch normalisation with an activation and a
// residual behind it. No PyTorch types cross this line.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "../loss/focal.h"

namespace facefast {

// In this order in facefast/ops/batch_norm_act.py.
enum class Activation : int64_t { kNone, kReLU, kPReLU };

// y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), by channel. What is null is left out: PReLU
// alone has no mean, var, weight and bias.
struct Norm {
  Type type = Type::kFloat;                    // of x and of everything of its size; the rest is acc
  int64_t outer = 0, channels = 0, inner = 1;  // x is [outer, channels, inner]; inner is 1 where channels are last
  const void* x = nullptr;
  const void* mean = nullptr;  // acc [channels], as all below
  const void* var = nullptr;   // biased
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* slope = nullptr;  // of PReLU
  double eps = 0;
  Activation activation = Activation::kNone;

  int64_t count() const { return outer * inner; }  // values of a channel
};

// What training moves along; null where it is not kept.
struct Running {
  void* mean = nullptr;        // acc [channels]
  void* var = nullptr;         // acc [channels], unbiased
  int64_t* batches = nullptr;  // [1]
  double momentum = 0;
};

// What a backward pass writes; null is not wanted.
struct NormGradients {
  void* x = nullptr;
  void* residual = nullptr;  // the gradient behind the activation
  void* weight = nullptr;    // acc [channels], as below: all three or none
  void* bias = nullptr;
  void* slope = nullptr;
};

class NormBackend {
 public:
  virtual ~NormBackend() = default;

  // Mean and biased variance of every channel; moves the running ones.
  virtual void statistics(const Norm&, void* mean, void* var, const Running&) = 0;
  virtual void forward(const Norm&, const void* residual, void* y) = 0;
  // `output` is y where there was a residual in front of a ReLU, whose sign x does not tell; else null. `batch`: mean
  // and var are those of x, and the gradient goes through them too. Without weight, bias and slope wanted, `batch` is
  // false.
  virtual void backward(const Norm&, const void* grad, const void* output, bool batch, const NormGradients&) = 0;
};

NormBackend& norm_cpu();
// As cuda_backend in focal_cuda.h.
std::unique_ptr<NormBackend> norm_cuda(int device, void* stream, std::function<void*(int64_t bytes)> scratch);

}  // namespace facefast
