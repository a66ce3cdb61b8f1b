// Runs CUDA kernels on the host, for test_cuda_on_host.py: `c++ -include cuda_on_host.h -x c++ kernels.cu`. Each thread
// of a block is a fiber; barriers and shuffles wait until every thread concerned has come to them. Blocks run one after
// the other, in an order that FACEFAST_BLOCK_ORDER can turn round.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static  // one block at a time
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define cudaSetDevice(device) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "no error"
#define cudaStreamIsCapturing(stream, status) cudaSuccess
#define cudaMemsetAsync(to, value, bytes, stream) (++::on_host::launches(), std::memset(to, value, bytes), cudaSuccess)
#define cudaGetSymbolAddress(to, symbol) (*(to) = (symbol), cudaSuccess)

namespace on_host {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 << 10;

// What was put on the stream so far, kernels and memory to be set; in cuda_on_host.cpp.
int64_t& launches();

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned round = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  ucontext_t scheduler;
  std::function<void()> body;
  Barrier all, warps[kMostThreads / kWarp];
  unsigned char exchange[2][kMostThreads][16];  // what a lane shows to its warp, in alternate rounds
  int current = 0;
  bool moved = false;  // whether any thread got past something in this turn
};

inline Block& block() {
  static Block one;
  return one;
}

inline Index& thread_index() {
  static Index index;
  return index;
}

inline Index& block_index() {
  static Index index;
  return index;
}

inline void wait(Barrier& barrier) {
  Block& b = block();
  const unsigned round = barrier.round;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.round;
    b.moved = true;
  }
  while (barrier.round == round) {
    const int me = b.current;
    swapcontext(&b.fibers[me].context, &b.scheduler);
  }
}

inline void enter() {
  Block& b = block();
  b.body();
  b.fibers[b.current].done = true;
  b.moved = true;
}

// A block whose threads cannot go on is a kernel that would hang or read garbage on a GPU.
inline void run_block(int threads) {
  Block& b = block();
  b.all = {threads};
  for (int w = 0; w < (threads + kWarp - 1) / kWarp; ++w) b.warps[w] = {std::min(kWarp, threads - w * kWarp)};
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = b.fibers[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &b.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    left = 0;
    b.moved = false;
    for (int t = 0; t < threads; ++t) {
      if (b.fibers[t].done) continue;
      b.current = t;
      thread_index().x = t;
      swapcontext(&b.scheduler, &b.fibers[t].context);
      left += b.fibers[t].done ? 0 : 1;
    }
    if (left > 0 && !b.moved) {
      std::fprintf(stderr, "%d threads wait for others that have left\n", left);
      std::abort();
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned blocks, int threads, Arguments... arguments) {
  const bool backwards = std::getenv("FACEFAST_BLOCK_ORDER") != nullptr;
  ++launches();
  block().body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < blocks; ++i) {
    block_index().x = backwards ? blocks - 1 - i : i;
    run_block(threads);
  }
}

// Shows `value` to the warp and returns what lane `from` of it shows.
template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 16);
  Block& b = block();
  const int me = b.current;
  Barrier& warp = b.warps[me / kWarp];
  auto& shown = b.exchange[warp.round % 2];
  std::memcpy(shown[me], &value, sizeof(T));
  wait(warp);
  T found;
  std::memcpy(&found, shown[me / kWarp * kWarp + from], sizeof(T));
  return found;
}

}  // namespace on_host

#define threadIdx (::on_host::thread_index())
#define blockIdx (::on_host::block_index())

inline void __syncthreads() { ::on_host::wait(::on_host::block().all); }

// As in CUDA: `width` lanes form a group, and a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const int lane = threadIdx.x % 32;
  return ::on_host::exchange(value, lane / width * width + source % width);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned offset, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane + static_cast<int>(offset);
  return ::on_host::exchange(value, source / width == lane / width ? source : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane ^ mask;
  return ::on_host::exchange(value, source / width <= lane / width ? source : lane);
}

// A chunk must be aligned, as it must on a GPU.
inline void check_chunk(const void* address, size_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size == 0) return;
  std::fprintf(stderr, "%zu bytes at %p are not aligned\n", size, address);
  std::abort();
}

template <typename T>
T __ldcg(const T* from) {
  check_chunk(from, alignof(T));
  return *from;
}

template <typename T>
T __ldg(const T* from) {
  return __ldcg(from);
}

inline void __stcg(uint4* to, uint4 value) {
  check_chunk(to, sizeof(uint4));
  *to = value;
}

// Blocks run one after the other: what one has written, the next can read.
inline void __threadfence() {}

inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}
