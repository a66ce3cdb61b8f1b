// What the CUDA kernels share: element types, 16-byte chunks of a row whatever its alignment, fast exponentials, and
// sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <functional>
#include <stdexcept>
#include <string>

#include "focal.h"

namespace facefast {

constexpr int kThreads = 256;  // in every block

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(double* to, double x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("facefast: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Calls run(T{}) with the type of the matrix.
template <typename F>
void with_type(Type type, const F& run) {
  dispatch<__half, __nv_bfloat16>(type, run);
}

// The first axis of a grid takes 2^31 - 1 blocks, the others 65 535: every kernel here uses the first alone.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw std::runtime_error("facefast: too many rows or classes for one launch");
  return static_cast<unsigned>(blocks);
}

// -----------------------------------------------------------------------------------------------
// A row seen as chunks of 16 bytes that are aligned in memory, so that a thread loads each at once. The row may start
// anywhere (a slice of a matrix, or 10 177 values of 2 bytes): its first and last chunk can be partial, and those alone
// are read element by element. Neighbouring threads take neighbouring chunks, so that a warp's loads are one stretch.

template <typename T>
struct alignas(16) Pack {
  T at[16 / sizeof(T)];
};

template <typename T>
struct Chunks {
  static constexpr int kSize = 16 / sizeof(T);
  const T* row;
  int head;   // elements of the first chunk that lie before the row
  int width;  // elements of the row
  int count;

  __device__ __forceinline__ Chunks(const T* row, int width)
      : row(row),
        head(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))),
        width(width),
        count((head + width + kSize - 1) / kSize) {}

  __device__ __forceinline__ int first(int chunk) const { return chunk * kSize - head; }
  __device__ __forceinline__ bool whole(int chunk) const { return first(chunk) >= 0 && first(chunk) + kSize <= width; }

  // The chunk as it lies in memory, `fill` where it has no elements.
  __device__ __forceinline__ Pack<T> read(int chunk, T fill) const {
    const int begin = first(chunk);
    Pack<T> pack;
    if (chunk < count && whole(chunk)) {
      pack = *reinterpret_cast<const Pack<T>*>(row + begin);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.at[i] = begin + i >= 0 && begin + i < width ? row[begin + i] : fill;
    }
    return pack;
  }

  // Every `stride`-th chunk from `chunk` on, those from `end` on filled. The loads are issued together and none waits
  // for another: that many chunks of every thread are on their way at a time.
  template <int kCount>
  __device__ __forceinline__ void read(Pack<T> (&packs)[kCount], int chunk, int stride, int end, T fill) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int at = chunk + u * stride;
      packs[u] = read(at < end ? at : count, fill);
    }
  }

  // Writes the chunk to a row of the same width; in one piece if that row is aligned as this one is.
  __device__ __forceinline__ void write(int chunk, const Acc<T> (&x)[kSize], T* out, bool aligned) const {
    const int begin = first(chunk);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) store(&pack.at[i], x[i]);
    if (aligned && whole(chunk)) {
      *reinterpret_cast<Pack<T>*>(out + begin) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (begin + i >= 0 && begin + i < width) out[begin + i] = pack.at[i];
      }
    }
  }
};

__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// -----------------------------------------------------------------------------------------------
// exp(scale * (x - peak)) for x <= peak, by the hardware's exp2 but for double; exactly 0 for x = -inf.

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else  // on the host, under tests/support/cuda_on_host.h
  const float y = ::exp2f(x);
  return y < std::numeric_limits<float>::min() ? 0.f : y;
#endif
}

template <typename T>
struct Exponential {  // of 16-bit values: the rounding of the product is far below theirs
  float factor;
  __device__ __forceinline__ explicit Exponential(double scale)
      : factor(static_cast<float>(scale * 1.44269504088896341)) {}
  __device__ __forceinline__ float operator()(float x, float peak) const { return exp2_fast((x - peak) * factor); }
};
template <>
struct Exponential<float> {  // the product is never rounded: it is split into an integer and an exact rest
  float factor, least;
  __device__ __forceinline__ explicit Exponential(double scale)
      : factor(static_cast<float>(scale * 1.44269504088896341)), least(-127.f / factor) {}
  __device__ __forceinline__ float operator()(float x, float peak) const {
    float d = x - peak;
    d = d < least ? least : d;
    const float shifted = fmaf(d, factor, kShift);
    return exp2_fast(fmaf(d, factor, kShift - shifted)) * float_of(bits_of(shifted) << 23);
  }
};
template <>
struct Exponential<double> {
  double scale;
  __device__ __forceinline__ explicit Exponential(double scale) : scale(scale) {}
  __device__ __forceinline__ double operator()(double x, double peak) const { return ::exp(scale * (x - peak)); }
};

// -----------------------------------------------------------------------------------------------
// Sums of losses and counts: a tree inside a block, then one block over the partial sums. No atomics: the order is
// fixed.

struct Partial {
  double loss, count;
};

// The sum over the block, in thread 0; every thread of the block must come here.
__device__ __forceinline__ Partial block_sum(Partial value) {
  __shared__ Partial sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x].loss += sums[threadIdx.x + half].loss;
      sums[threadIdx.x].count += sums[threadIdx.x + half].count;
    }
  }
  return sums[0];
}

// Turns partial sums into the reduced loss (where there is a reduction) and the count. One block, whose threads take
// fixed sums: the order of adding depends on the number of partial sums alone.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const Partial* partial, int64_t blocks, Reduction reduction, A* loss, A* count) {
  Partial sum{0, 0};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum.loss += partial[i].loss;
    sum.count += partial[i].count;
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  *count = static_cast<A>(sum.count);
  const double divisor = reduction == Reduction::kMean && sum.count > 1 ? sum.count : 1;
  if (reduction != Reduction::kNone) *loss = static_cast<A>(sum.loss / divisor);
}

// What the losses share of their launches.
struct Queue {
  cudaStream_t stream;
  const std::function<void*(int64_t)>& scratch;

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), unsigned blocks, const char* what, Arguments... arguments) const {
    if (blocks == 0) return;  // an empty matrix: a grid without blocks is an error to CUDA
#if defined(__CUDACC__)
    kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
#else
    on_host::launch(kernel, blocks, kThreads, arguments...);
#endif
    check(cudaGetLastError(), what);  // of the launch; what the kernel does wrong shows at a later call
  }

  template <typename A>
  void reduce(const Partial* partial, int64_t blocks, Reduction reduction, void* loss, void* count) const {
    launch(reduce_kernel<A>, 1, "reduction", partial, blocks, reduction, static_cast<A*>(loss), static_cast<A*>(count));
  }
};

// sigmoid_cuda.cu
void sigmoid_cuda_forward(const Queue& queue, const Sigmoid& p, void* loss, void* count);
void sigmoid_cuda_backward(const Queue& queue, const Sigmoid& p, const Upstream& up, void* grad);

}  // namespace facefast
