// The sigmoid focal loss on the CPU: elementwise, in fixed blocks that threads share out.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_types.h"
#include "focal.h"

namespace facefast {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kGrain = 8;  // blocks that are worth a thread

// What a block adds to the reductions; `bad` is the first element whose target is not in [0, 1], or
// -1.
struct Partial {
  double loss = 0, count = 0;
  int64_t bad = -1;
};

// Losses and gradients (without upstream) of elements [begin, begin + n); n is at most kBlock.
template <typename T>
FACEFAST_INLINE Partial elements(const Sigmoid& p, int64_t begin, int64_t n, Acc<T>* loss, Acc<T>* grad) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.logits) + begin;
  const A* target = static_cast<const A*>(p.target) + begin;
  const A gamma = static_cast<A>(p.gamma);
  A value[kBlock], weight[kBlock];
  int soft = 0, wrong = 0, count = 0;
#pragma omp simd reduction(+ : soft, wrong, count)
  for (int64_t i = 0; i < n; ++i) {
    value[i] = load(x[i]);
    const A t = target[i];
    count += t == t;
    soft += (t == t) & (t != A(0)) & (t != A(1));
    wrong += (t < A(0)) | (t > A(1));
  }
  Partial partial;
  partial.count = count;
  if (wrong > 0) {
    partial.bad = begin;
    while (!(target[partial.bad - begin] < A(0) || target[partial.bad - begin] > A(1))) ++partial.bad;
    return partial;
  }
  if (soft == 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Element<A> element = sigmoid_hard(value[i], target[i] == A(1), gamma);
      loss[i] = element.loss;
      grad[i] = element.grad;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Element<A> element = sigmoid_element(value[i], target[i], gamma);
      loss[i] = element.loss;
      grad[i] = element.grad;
    }
  }
  const A alpha = static_cast<A>(p.alpha);
  if (p.alphas != nullptr) {
    const A* alphas = static_cast<const A*>(p.alphas);
    for (int64_t i = 0, column = begin % p.columns; i < n; ++i) {
      weight[i] = target[i] * alphas[column] + (A(1) - target[i]) * (A(1) - alphas[column]);
      column = column + 1 == p.columns ? 0 : column + 1;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = alpha < A(0) ? A(1) : target[i] * alpha + (A(1) - target[i]) * (A(1) - alpha);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = target[i] == target[i];
    loss[i] = counts ? loss[i] * weight[i] : A(0);
    grad[i] = counts ? grad[i] * weight[i] : A(0);
  }
  return partial;
}

template <typename T>
FACEFAST_INLINE Partial forward_block(const Sigmoid& p, int64_t begin, int64_t n, void* out) {
  using A = Acc<T>;
  A loss[kBlock], grad[kBlock];
  Partial partial = elements<T>(p, begin, n, loss, grad);
  if (partial.bad >= 0) return partial;
  if (p.reduction == Reduction::kNone) {
    std::copy_n(loss, n, static_cast<A*>(out) + begin);
  } else {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += double(loss[i]);
    partial.loss = sum;
  }
  return partial;
}

template <typename T>
FACEFAST_INLINE void backward_block(const Sigmoid& p, const Upstream& up, int64_t begin, int64_t n, void* out) {
  using A = Acc<T>;
  A loss[kBlock], grad[kBlock];
  elements<T>(p, begin, n, loss, grad);
  const A share = p.reduction == Reduction::kMean ? A(1) / std::max(A(1), *static_cast<const A*>(up.count)) : A(1);
  const A* upstream = static_cast<const A*>(up.data) + begin * up.stride;
  T* to = static_cast<T*>(out) + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to + i, grad[i] * (share * upstream[i * up.stride]));
}

struct Kernels {
  Partial (*forward)(const Sigmoid&, int64_t, int64_t, void*);
  void (*backward)(const Sigmoid&, const Upstream&, int64_t, int64_t, void*);
};

#define FACEFAST_VERSIONS(Name, T)                                                                                  \
  FACEFAST_CLONES Partial forward_##Name(const Sigmoid& p, int64_t begin, int64_t n, void* out) {                   \
    return forward_block<T>(p, begin, n, out);                                                                      \
  }                                                                                                                 \
  FACEFAST_CLONES void backward_##Name(const Sigmoid& p, const Upstream& up, int64_t begin, int64_t n, void* out) { \
    backward_block<T>(p, up, begin, n, out);                                                                        \
  }                                                                                                                 \
  const Kernels k##Name{forward_##Name, backward_##Name};
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

template <typename F>
void each_block(int64_t size, const F& run) {  // run(block, first element, elements)
  torch::stable::parallel_for(0, (size + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      run(block, block * kBlock, std::min(kBlock, size - block * kBlock));
    }
  });
}

template <typename A>
std::string text_of(const void* target, int64_t i) {
  return std::to_string(static_cast<const A*>(target)[i]);
}

}  // namespace

void sigmoid_cpu_forward(const Sigmoid& p, void* loss, void* count) {
  std::vector<Partial> partial((p.size + kBlock - 1) / kBlock);
  const auto run = kernels_for(p.type).forward;
  each_block(p.size, [&](int64_t block, int64_t begin, int64_t n) { partial[block] = run(p, begin, n, loss); });
  Partial total;
  for (const Partial& part : partial) {
    if (part.bad >= 0) {
      throw std::out_of_range(
          "target " +
          (p.type == Type::kDouble ? text_of<double>(p.target, part.bad) : text_of<float>(p.target, part.bad)) +
          " of element " + std::to_string(part.bad) + " is outside [0, 1]; NaN marks an unknown target");
    }
    total.loss += part.loss;
    total.count += part.count;
  }
  const double value = p.reduction == Reduction::kMean ? total.loss / std::max(1.0, total.count) : total.loss;
  if (p.type == Type::kDouble) {
    *static_cast<double*>(count) = total.count;
    if (p.reduction != Reduction::kNone) *static_cast<double*>(loss) = value;
  } else {
    *static_cast<float*>(count) = static_cast<float>(total.count);
    if (p.reduction != Reduction::kNone) *static_cast<float*>(loss) = static_cast<float>(value);
  }
}

void sigmoid_cpu_backward(const Sigmoid& p, const Upstream& up, void* grad) {
  const auto run = kernels_for(p.type).backward;
  each_block(p.size, [&](int64_t, int64_t begin, int64_t n) { run(p, up, begin, n, grad); });
}

}  // namespace facefast
