// The sigmoid focal loss on the GPU: elementwise, and for a reduction one partial sum per block.
#include <cassert>

#include "cuda_common.cuh"

namespace facefast {
namespace {

// A thread takes one chunk of the logits, or one element where the tensors are not aligned alike, and in the rest that
// fills no chunk. kWide says which.
template <typename T, bool kWide>
constexpr int kEach = kWide ? kPerChunk<T> : 1;

template <typename T>
__device__ __forceinline__ Element<Acc<T>> element(const Sigmoid& p, Acc<T> x, Acc<T> target, int64_t column,
                                                   bool* counts) {
  using A = Acc<T>;
  *counts = target == target;
  const bool valid = !*counts || (target >= A(0) && target <= A(1));
  assert(valid && "facefast: a target is outside [0, 1]");
  if (!*counts) return {A(0), A(0)};
  Element<A> found = sigmoid_element(x, target, static_cast<A>(p.gamma));
  A weight = A(1);
  if (p.alphas != nullptr || p.alpha >= 0) {
    const A alpha = p.alphas != nullptr ? static_cast<const A*>(p.alphas)[column] : static_cast<A>(p.alpha);
    weight = target * alpha + (A(1) - target) * (A(1) - alpha);
  }
  if (!valid) weight = static_cast<A>(kNaN);
  return {found.loss * weight, found.grad * weight};
}

// Calls run(i, found, counts) for the thread's elements, `at` on.
template <typename T, int kCount, typename F>
__device__ __forceinline__ void each(const Sigmoid& p, int64_t at, const Acc<T> (&x)[kCount],
                                     const Acc<T> (&target)[kCount], const F& run) {
  int64_t column = p.alphas == nullptr ? 0 : at % p.columns;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bool counts;
    const Element<Acc<T>> found = element<T>(p, x[i], target[i], column, &counts);
    run(i, found, counts);
    if (++column == p.columns) column = 0;
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void load_elements(const Sigmoid& p, int64_t at, Acc<T> (&x)[kCount],
                                              Acc<T> (&target)[kCount]) {
  using A = Acc<T>;
  const T* logits = static_cast<const T*>(p.logits) + at;
  const A* targets = static_cast<const A*>(p.target) + at;
  if constexpr (kCount == kPerChunk<T>) {
    unpack<T>(load_constant(logits), x);
    load_run(targets, target);
  } else {
    x[0] = load(logits[0]);
    target[0] = targets[0];
  }
}

template <typename A, int kCount>
__device__ __forceinline__ void store_run(A* to, const A (&x)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerChunk<A>) {
      uint4 chunk;
      memcpy(&chunk, x + i, 16);
      store_chunk(to + i, chunk);
    }
  }
}

// The elements from `begin` on.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    sigmoid_forward_kernel(const Sigmoid p, Acc<T>* losses, const Sums sums, const unsigned parts) {
  using A = Acc<T>;
  Partial total{0, 0};
  const auto run = [&](int64_t at, auto number) {
    constexpr int kMany = decltype(number)::value;
    A x[kMany], target[kMany], loss[kMany];
    load_elements<T>(p, at, x, target);
    each<T>(p, at, x, target, [&](int i, Element<A> found, bool counts) {
      loss[i] = found.loss;
      total.loss += double(found.loss);
      total.count += counts ? 1 : 0;
    });
    if (losses != nullptr) store_run(losses + at, loss);
  };
  constexpr int kCount = kEach<T, kWide>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, chunks = p.size / kCount;
  if (thread < chunks) {
    run(thread * kCount, std::integral_constant<int, kCount>{});
  } else if (kWide && thread - chunks < p.size % kCount) {
    run(chunks * kCount + thread - chunks, std::integral_constant<int, 1>{});
  }
  add_up<A>(sums, block_sum(total), blockIdx.x, parts);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) sigmoid_backward_kernel(const Sigmoid p, const Upstream up, T* grad) {
  using A = Acc<T>;
  A share = A(1);
  if (p.reduction == Reduction::kMean) {
    const A count = *static_cast<const A*>(up.count);
    share = A(1) / (count > A(1) ? count : A(1));
  }
  const A* upstream = static_cast<const A*>(up.data);
  const auto run = [&](int64_t at, auto number) {
    constexpr int kMany = decltype(number)::value;
    A x[kMany], target[kMany], from[kMany];
    load_elements<T>(p, at, x, target);
    if constexpr (kMany > 1) {
      if (up.stride == 1) {
        load_run(upstream + at, from);
      } else {
#pragma unroll
        for (int i = 0; i < kMany; ++i) from[i] = *upstream;
      }
    } else {
      from[0] = upstream[at * up.stride];
    }
    each<T>(p, at, x, target,
            [&](int i, Element<A> found, bool counts) { x[i] = counts ? found.grad * (share * from[i]) : A(0); });
    if constexpr (kMany > 1) {
      store_chunk(grad + at, pack<T>(x));
    } else {
      store(grad + at, x[0]);
    }
  };
  constexpr int kCount = kEach<T, kWide>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, chunks = p.size / kCount;
  if (thread < chunks) {
    run(thread * kCount, std::integral_constant<int, kCount>{});
  } else if (kWide && thread - chunks < p.size % kCount) {
    run(chunks * kCount + thread - chunks, std::integral_constant<int, 1>{});
  }
}

// A thread for each chunk and for each element of the rest.
template <typename T, bool kWide>
unsigned blocks_of(const Sigmoid& p) {
  return blocks_for(p.size / kEach<T, kWide> + p.size % kEach<T, kWide>, kThreads);
}

template <typename F>
void with_width(bool wide, const F& run) {
  wide ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace

void sigmoid_cuda_forward(const Queue& queue, const Sigmoid& p, void* loss, void* count) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    A* losses = p.reduction == Reduction::kNone ? static_cast<A*>(loss) : nullptr;
    with_width(is_aligned(p.logits) && is_aligned(p.target) && is_aligned(losses), [&](auto wide) {
      const unsigned blocks = blocks_of<T, wide>(p);
      Sums sums = queue.template sums<A>(blocks, p.reduction, loss, count);
      if (blocks > 0) sums.ticket = queue.tickets(1);
      queue.launch(sigmoid_forward_kernel<T, wide>, blocks, "sigmoid forward", p, losses, sums, blocks);
    });
  });
}

void sigmoid_cuda_backward(const Queue& queue, const Sigmoid& p, const Upstream& up, void* grad) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    const bool upstream = up.stride == 0 || (up.stride == 1 && is_aligned(up.data));
    with_width(is_aligned(p.logits) && is_aligned(p.target) && is_aligned(grad) && upstream, [&](auto wide) {
      queue.launch(sigmoid_backward_kernel<T, wide>, blocks_of<T, wide>(p), "sigmoid backward", p, up,
                   static_cast<T*>(grad));
    });
  });
}

}  // namespace facefast
