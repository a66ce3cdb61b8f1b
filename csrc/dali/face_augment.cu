// FaceAugment on the GPU: one kernel for the batch, one thread per output pixel, 32 x 8 pixels per
// block, a picture for each step of the grid's third axis. Everything that is not about threads is
// in augment_math.h.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "augment_math.h"

namespace facefast {
namespace {

constexpr int kBlockWidth = 32;  // one warp per row of a block, so that a warp writes one stretch of memory
constexpr int kBlockHeight = 8;

__device__ __forceinline__ void Convert(float value, float* out) { *out = value; }
__device__ __forceinline__ void Convert(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void Convert(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

template <typename T, bool kReduced>
__global__ void __launch_bounds__(kBlockWidth* kBlockHeight) FaceAugmentKernel(const Plan* plans, Target target) {
  __shared__ Plan shared;
  __shared__ T lines[kBlockHeight][3 * kBlockWidth];
  // The plan is read by every thread many times: one copy of it per block.
  const int thread = threadIdx.y * kBlockWidth + threadIdx.x;
  static_assert(sizeof(Plan) % sizeof(uint32_t) == 0 && sizeof(Plan) / sizeof(uint32_t) <= kBlockWidth * kBlockHeight);
  if (thread < sizeof(Plan) / sizeof(uint32_t)) {
    reinterpret_cast<uint32_t*>(&shared)[thread] = reinterpret_cast<const uint32_t*>(plans + blockIdx.z)[thread];
  }
  __syncthreads();
  const Plan& plan = shared;

  const int x0 = blockIdx.x * kBlockWidth, x = x0 + threadIdx.x;
  const int y = blockIdx.y * kBlockHeight + threadIdx.y;
  // A warp is one line of the block and leaves as a whole, so that __syncwarp below finds all of its
  // lanes. Pixels beside the picture stay until then for the same reason.
  if (y >= target.height) return;
  float color[3] = {0.0f, 0.0f, 0.0f};
  if (x < target.width && !Erased(plan, x, y)) {
    float rgb[3];
    Sample<kReduced>(plan, x, y, rgb);
    for (int c = 0; c < 3; ++c) color[c] = Color(plan.color + 4 * c, rgb);
  }

  T* output = static_cast<T*>(plan.output);
  if (!target.channels_last) {
    if (x >= target.width) return;
    for (int c = 0; c < 3; ++c) {
      Convert(color[c], output + (static_cast<size_t>(c) * target.height + y) * target.width + x);
    }
    return;
  }
  // A warp's pixels are interleaved in shared memory first, so that each store of the warp is one
  // stretch.
  T* line = lines[threadIdx.y];
  for (int c = 0; c < 3; ++c) Convert(color[c], line + 3 * threadIdx.x + c);
  __syncwarp();
  const int count = 3 * (target.width - x0 < kBlockWidth ? target.width - x0 : kBlockWidth);
  T* row = output + (static_cast<size_t>(y) * target.width + x0) * 3;
  for (int i = threadIdx.x; i < count; i += kBlockWidth) row[i] = line[i];
}

template <typename T>
void Launch(const Plan* plans, int count, const Target& target, bool reduces, cudaStream_t stream) {
  const dim3 block(kBlockWidth, kBlockHeight);
  const dim3 tiles((target.width + kBlockWidth - 1) / kBlockWidth, (target.height + kBlockHeight - 1) / kBlockHeight);
  constexpr int kMostSamples = 65535;  // of a grid's third axis
  for (int first = 0; first < count; first += kMostSamples) {
    const int samples = count - first < kMostSamples ? count - first : kMostSamples;
    const dim3 grid(tiles.x, tiles.y, samples);
    if (reduces) {
      FaceAugmentKernel<T, true><<<grid, block, 0, stream>>>(plans + first, target);
    } else {
      FaceAugmentKernel<T, false><<<grid, block, 0, stream>>>(plans + first, target);
    }
  }
}

}  // namespace

void LaunchFaceAugment(const Plan* plans, int count, const Target& target, bool reduces, cudaStream_t stream) {
  switch (target.dtype) {
    case Dtype::kFloat:
      return Launch<float>(plans, count, target, reduces, stream);
    case Dtype::kHalf:
      return Launch<__half>(plans, count, target, reduces, stream);
    case Dtype::kBfloat16:
      return Launch<__nv_bfloat16>(plans, count, target, reduces, stream);
  }
}

}  // namespace facefast
