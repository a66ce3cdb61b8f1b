// The sigmoid focal loss on the GPU: elementwise, and for a reduction one partial sum per block.
#include <cassert>

#include "cuda_common.cuh"

namespace facefast {
namespace {

constexpr int64_t kPerBlock = 4 * kThreads;  // elements

template <typename T>
__device__ __forceinline__ Element<Acc<T>> element(const Sigmoid& p, int64_t i, bool* counts) {
  using A = Acc<T>;
  const A target = static_cast<const A*>(p.target)[i];
  *counts = target == target;
  const bool valid = !*counts || (target >= A(0) && target <= A(1));
  assert(valid && "facefast: a target is outside [0, 1]");
  if (!*counts) return {A(0), A(0)};
  const A x = load(static_cast<const T*>(p.logits)[i]);
  Element<A> found = sigmoid_element(x, target, static_cast<A>(p.gamma));
  A weight = A(1);
  if (p.alphas != nullptr || p.alpha >= 0) {
    const A alpha = p.alphas != nullptr ? static_cast<const A*>(p.alphas)[i % p.columns] : static_cast<A>(p.alpha);
    weight = target * alpha + (A(1) - target) * (A(1) - alpha);
  }
  if (!valid) weight = static_cast<A>(kNaN);
  return {found.loss * weight, found.grad * weight};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sigmoid_forward_kernel(const Sigmoid p, Acc<T>* losses, Partial* partial) {
  Partial total{0, 0};
  const int64_t begin = int64_t{blockIdx.x} * kPerBlock;
#pragma unroll
  for (int64_t step = threadIdx.x; step < kPerBlock; step += kThreads) {
    const int64_t i = begin + step;
    if (i >= p.size) break;
    bool counts;
    const Element<Acc<T>> found = element<T>(p, i, &counts);
    if (losses != nullptr) losses[i] = found.loss;
    total.loss += double(found.loss);
    total.count += counts ? 1 : 0;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sigmoid_backward_kernel(const Sigmoid p, const Upstream up, T* grad) {
  using A = Acc<T>;
  A share = A(1);
  if (p.reduction == Reduction::kMean) {
    const A count = *static_cast<const A*>(up.count);
    share = A(1) / (count > A(1) ? count : A(1));
  }
  const int64_t begin = int64_t{blockIdx.x} * kPerBlock;
#pragma unroll
  for (int64_t step = threadIdx.x; step < kPerBlock; step += kThreads) {
    const int64_t i = begin + step;
    if (i >= p.size) break;
    bool counts;
    const A found = element<T>(p, i, &counts).grad;
    store(grad + i, counts ? found * (share * static_cast<const A*>(up.data)[i * up.stride]) : A(0));
  }
}

}  // namespace

void sigmoid_cuda_forward(const Queue& queue, const Sigmoid& p, void* loss, void* count) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const unsigned blocks = blocks_for(p.size, kPerBlock);
    auto* partial = static_cast<Partial*>(queue.scratch((int64_t{blocks} + 1) * sizeof(Partial)));
    A* losses = p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr;
    queue.launch(sigmoid_forward_kernel<T>, blocks, "sigmoid forward", p, losses, partial);
    queue.template reduce<A>(partial, blocks, p.reduction, loss, count);
  });
}

void sigmoid_cuda_backward(const Queue& queue, const Sigmoid& p, const Upstream& up, void* grad) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    queue.launch(sigmoid_backward_kernel<T>, blocks_for(p.size, kPerBlock), "sigmoid backward", p, up,
                 static_cast<T*>(grad));
  });
}

}  // namespace facefast
