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
// 16 bytes at a time. nvcc takes a copy of a struct apart into its elements when that suits it, which once cost two
// thirds of the bandwidth; these intrinsics are one instruction each, whatever stands around them
// (tests/ops/test_machine_code.py counts them).

template <typename T>
constexpr int kPerChunk = 16 / sizeof(T);

// Of memory that no kernel is writing to meanwhile.
__device__ __forceinline__ uint4 load_constant(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
// Of memory that this kernel may overwrite.
__device__ __forceinline__ uint4 load_chunk(const void* from) { return __ldcg(static_cast<const uint4*>(from)); }
__device__ __forceinline__ void store_chunk(void* to, uint4 chunk) { __stcg(static_cast<uint4*>(to), chunk); }

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// A word of the chunk holds two 16-bit values, the first in the low half.
__device__ __forceinline__ void widen(uint32_t word, __nv_bfloat16, float* x) {
  x[0] = float_of(static_cast<int32_t>(word << 16));
  x[1] = float_of(static_cast<int32_t>(word & 0xffff0000u));
}
__device__ __forceinline__ void widen(uint32_t word, __half, float* x) {
  __half2 both;
  memcpy(&both, &word, 4);
  x[0] = __low2float(both);
  x[1] = __high2float(both);
}
__device__ __forceinline__ uint32_t narrow(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}
__device__ __forceinline__ uint32_t narrow(float a, float b, __half) {
  const __half2 both = __floats2half2_rn(a, b);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}

// The values of a chunk, and the chunk of some values.
template <typename T>
__device__ __forceinline__ void unpack(uint4 chunk, Acc<T> (&x)[kPerChunk<T>]) {
  if constexpr (sizeof(T) == 2) {
    widen(chunk.x, T{}, x);
    widen(chunk.y, T{}, x + 2);
    widen(chunk.z, T{}, x + 4);
    widen(chunk.w, T{}, x + 6);
  } else {
    memcpy(x, &chunk, 16);
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack(const Acc<T> (&x)[kPerChunk<T>]) {
  uint4 chunk;
  if constexpr (sizeof(T) == 2) {
    chunk = {narrow(x[0], x[1], T{}), narrow(x[2], x[3], T{}), narrow(x[4], x[5], T{}), narrow(x[6], x[7], T{})};
  } else {
    memcpy(&chunk, x, 16);
  }
  return chunk;
}

// A chunk of one value.
template <typename T>
__device__ __forceinline__ uint4 filled(Acc<T> value) {
  Acc<T> x[kPerChunk<T>];
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) x[i] = value;
  return pack<T>(x);
}

// Neighbouring values of the accumulator's type, aligned to 16 bytes.
template <typename A, int kCount>
__device__ __forceinline__ void load_run(const A* from, A (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += kPerChunk<A>) {
    const uint4 chunk = load_constant(from + i);
    memcpy(x + i, &chunk, 16);
  }
}

// -----------------------------------------------------------------------------------------------
// A row seen as chunks of 16 bytes that are aligned in memory. The row may start anywhere (a slice of a matrix, or
// 10 177 values of 2 bytes), so its first and last chunk can be partial: those alone are read element by element.
// Neighbouring threads take neighbouring chunks, so that a warp's loads are one stretch.

template <typename T>
struct Chunks {
  static constexpr int kSize = kPerChunk<T>;
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
  // Chunks [whole_begin, whole_end) have all their elements.
  __device__ __forceinline__ int whole_begin() const { return head > 0 ? 1 : 0; }
  __device__ __forceinline__ int whole_end() const { return (head + width) / kSize; }
  __device__ __forceinline__ bool whole(int chunk) const { return chunk >= whole_begin() && chunk < whole_end(); }
  __device__ __forceinline__ int holding(int column) const { return (column + head) / kSize; }

  // The odd ones among chunks [begin, end), by number: 0 and 1 are the partial ones at the row's ends, 2 the one that
  // holds column `own`, if that is another; -1 where there is none.
  __device__ __forceinline__ int odd(int number, int begin, int end, int own) const {
    int chunk = 0;
    if (number == 0 && (head == 0 || count == 0)) return -1;
    if (number == 1) {
      chunk = count - 1;
      if ((head + width) % kSize == 0 || chunk < whole_begin()) return -1;
    }
    if (number == 2) {
      if (own < 0 || !whole(holding(own))) return -1;
      chunk = holding(own);
    }
    return number > 2 || chunk < begin || chunk >= end ? -1 : chunk;
  }

  // A chunk element by element, `fill` where it has none and at column `own`.
  __device__ __forceinline__ void read(int chunk, int own, Acc<T> fill, Acc<T> (&x)[kSize]) const {
    const int begin = first(chunk);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int column = begin + i;
      x[i] = column >= 0 && column < width && column != own ? load(row[column]) : fill;
    }
  }
};

__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// -----------------------------------------------------------------------------------------------
// Greatest values; NaN is never one, but makes the sum of the exponentials NaN.

__device__ __forceinline__ float greater(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double greater(double a, double b) { return ::fmax(a, b); }

// The greater of each half; two values for one instruction.
__device__ __forceinline__ uint32_t greater_pair(uint32_t a, uint32_t b, __nv_bfloat16 type) {
#if defined(__CUDACC__)
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
#else
  float x[2], y[2];
  widen(a, type, x);
  widen(b, type, y);
  return narrow(greater(x[0], y[0]), greater(x[1], y[1]), type);
#endif
}
__device__ __forceinline__ uint32_t greater_pair(uint32_t a, uint32_t b, __half type) {
#if defined(__CUDACC__)
  asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
#else
  float x[2], y[2];
  widen(a, type, x);
  widen(b, type, y);
  return narrow(greater(x[0], y[0]), greater(x[1], y[1]), type);
#endif
}

// The greatest value of some chunks.
template <typename T, int kCount>
__device__ __forceinline__ Acc<T> greatest(const uint4 (&chunks)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    uint4 high = chunks[0];
#pragma unroll
    for (int u = 1; u < kCount; ++u) {
      high.x = greater_pair(high.x, chunks[u].x, T{});
      high.y = greater_pair(high.y, chunks[u].y, T{});
      high.z = greater_pair(high.z, chunks[u].z, T{});
      high.w = greater_pair(high.w, chunks[u].w, T{});
    }
    float both[2];
    widen(greater_pair(greater_pair(high.x, high.y, T{}), greater_pair(high.z, high.w, T{}), T{}), T{}, both);
    return greater(both[0], both[1]);
  } else {
    Acc<T> x[kPerChunk<T>], high = static_cast<Acc<T>>(-kInf);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      unpack<T>(chunks[u], x);
#pragma unroll
      for (int i = 0; i < kPerChunk<T>; ++i) high = greater(high, x[i]);
    }
    return high;
  }
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

// x, but no less than `least`; NaN stays NaN.
__device__ __forceinline__ float at_least(float x, float least) {
#if defined(__CUDACC__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(least));
  return x;
#else
  return x < least ? least : x;
#endif
}

template <typename T>
struct Exponential {  // of 16-bit values: the rounding of the product is far below theirs
  float factor;
  __device__ __forceinline__ explicit Exponential(double scale)
      : factor(static_cast<float>(scale * 1.44269504088896341)) {}
  __device__ __forceinline__ float operator()(float x, float peak) const { return exp2_fast((x - peak) * factor); }

  // Relative to one peak an exponential is one multiply-add and one exp2: 2^(x * factor + shift). What rounding took
  // from the shift is the same for all x, and `correction` puts it back into their sum.
  struct Relative {
    float factor, shift, correction;
    __device__ __forceinline__ float operator()(float x) const { return exp2_fast(fmaf(x, factor, shift)); }
  };
  __device__ __forceinline__ Relative relative_to(float peak) const {
    const float shift = -peak * factor;
    return {factor, shift, exp2_fast(-fmaf(peak, factor, shift))};
  }
  // A peak so great that its product overflows: x * factor + shift would be nonsense.
  __device__ __forceinline__ bool far(const Relative& r) const { return !(::fabsf(r.shift) <= 1e38f); }
};
template <>
struct Exponential<float> {  // the product is never rounded: it is split into an integer and an exact rest
  float factor, least;
  __device__ __forceinline__ explicit Exponential(double scale)
      : factor(static_cast<float>(scale * 1.44269504088896341)), least(-127.f / factor) {}
  __device__ __forceinline__ float operator()(float x, float peak) const {
    const float d = at_least(x - peak, least);
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
// Sums of losses and counts, in the launch that computes the losses: a tree inside each block, and the block that comes
// last adds up what all have left, always in the same order, whichever block that is. No sum is an atomic one.

struct Partial {
  double loss, count;
};

// The sum of the first kCount threads' values, in thread 0; every thread of the block must come here.
template <int kCount = kThreads>
__device__ __forceinline__ Partial block_sum(Partial value) {
  if constexpr (kCount > 32) {
    __shared__ Partial sums[kCount];
    if (threadIdx.x < kCount) sums[threadIdx.x] = value;
    for (int half = kCount / 2; half >= 32; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) {
        value.loss += sums[threadIdx.x + half].loss;
        value.count += sums[threadIdx.x + half].count;
        sums[threadIdx.x] = value;
      }
    }
  }
  if (threadIdx.x < 32) {  // in a warp by halves: lane i takes in lane i + 16, then i + 8 and so on
    constexpr int kLanes = kCount < 32 ? kCount : 32;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      value.loss += __shfl_down_sync(0xffffffffu, value.loss, offset);
      value.count += __shfl_down_sync(0xffffffffu, value.count, offset);
    }
  }
  return value;
}

// Whether this block is the last of `expected` that come to the ticket, which is then 0 again; what the others wrote
// before they came is there to be read, past the first cache, which may hold older values.
__device__ __forceinline__ bool comes_last(unsigned* ticket, unsigned expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, expected - 1) == expected - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ __forceinline__ Partial load_shared(const Partial* from) {
  const double2 both = __ldcg(reinterpret_cast<const double2*>(from));
  return {both.x, both.y};
}

// Where a launch puts its sums.
struct Sums {
  Partial* partial = nullptr;  // [parts]
  unsigned* ticket = nullptr;
  Reduction reduction = Reduction::kNone;
  void* loss = nullptr;   // acc [1]; written where there is a reduction
  void* count = nullptr;  // acc [1]
};

// Hands in part `part` of `parts`, known to thread 0; the last block to do so turns them into the reduced loss and the
// count. Its threads take fixed sums: the order of adding depends on the number of parts alone.
template <typename A>
__device__ __forceinline__ void add_up(const Sums& sums, Partial mine, unsigned part, unsigned parts) {
  if (threadIdx.x == 0) sums.partial[part] = mine;
  if (!comes_last(sums.ticket, parts)) return;
  Partial sum{0, 0};
  for (unsigned i = threadIdx.x; i < parts; i += kThreads) {
    const Partial value = load_shared(sums.partial + i);
    sum.loss += value.loss;
    sum.count += value.count;
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  *static_cast<A*>(sums.count) = static_cast<A>(sum.count);
  const double divisor = sums.reduction == Reduction::kMean && sum.count > 1 ? sum.count : 1;
  if (sums.reduction != Reduction::kNone) *static_cast<A*>(sums.loss) = static_cast<A>(sum.loss / divisor);
}

// An empty matrix has no block to do it.
template <typename A>
__global__ void __launch_bounds__(kThreads) zero_kernel(A* loss, A* count) {
  if (threadIdx.x != 0) return;
  if (loss != nullptr) *loss = 0;
  *count = 0;
}

constexpr int kMostTickets = 1024;  // in one launch

// How kernels are launched, and what the losses share of it.
struct Launcher {
  cudaStream_t stream;

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
};

struct Queue : Launcher {
  const std::function<void*(int64_t)>& scratch;
  const std::function<unsigned*(int64_t)>& tickets;  // so many of them, all 0, that no other launch uses meanwhile

  // For a launch whose blocks hand in `parts` sums; where there are none the results are zero at once.
  template <typename A>
  Sums sums(int64_t parts, Reduction reduction, void* loss, void* count) const {
    if (parts == 0) {
      launch(zero_kernel<A>, 1, "empty loss", reduction == Reduction::kNone ? nullptr : static_cast<A*>(loss),
             static_cast<A*>(count));
      return {};
    }
    auto* partial = static_cast<Partial*>(scratch(parts * int64_t{sizeof(Partial)}));
    return {partial, nullptr, reduction, loss, count};
  }
};

// sigmoid_cuda.cu
void sigmoid_cuda_forward(const Queue& queue, const Sigmoid& p, void* loss, void* count);
void sigmoid_cuda_backward(const Queue& queue, const Sigmoid& p, const Upstream& up, void* grad);

}  // namespace facefast
