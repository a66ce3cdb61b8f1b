// What stands in for the CPU back ends when the CUDA ones run on the host (test_cuda_on_host.py).
#include <deque>
#include <vector>

#include "../norm/norm.h"
#include "focal_cuda.h"

namespace on_host {

int64_t& launches() {
  static int64_t count = 0;
  return count;
}

}  // namespace on_host

namespace facefast {

namespace {

// An operator asks for scratch memory a few times; it holds NaN, so that a value read before it is written shows.
void* scratch(int64_t bytes) {
  static std::deque<std::vector<uint64_t>> kept;
  if (kept.size() == 16) kept.pop_front();
  kept.emplace_back(bytes / sizeof(uint64_t) + 2, ~uint64_t{0});
  const auto address = reinterpret_cast<uintptr_t>(kept.back().data());
  return reinterpret_cast<void*>((address + 15) / 16 * 16);
}

}  // namespace

Backend& cpu_backend() {
  static const std::unique_ptr<Backend> backend = cuda_backend(0, nullptr, scratch);
  return *backend;
}

NormBackend& norm_cpu() {
  static const std::unique_ptr<NormBackend> backend = norm_cuda(0, nullptr, scratch);
  return *backend;
}

}  // namespace facefast

// For cuda_on_host.py: what the kernels' launchers put on the stream since the library was loaded.
extern "C" __attribute__((visibility("default"))) int64_t facefast_launches() { return on_host::launches(); }
