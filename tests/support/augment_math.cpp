// The operator's arithmetic as plain functions, for test_augment_math.py: the CPU path as it is, and
// the CUDA kernel's pixels computed one by one on the host.

#include "augment_math.h"

#include "augment_cpu.h"

extern "C" {

void augment(const uint8_t* pixels, int width, int height, const float* numbers, int out_width, int out_height,
             int dtype, int channels_last, void* output) {
  const facefast::Target target{out_width, out_height, static_cast<facefast::Dtype>(dtype), channels_last != 0};
  facefast::Plan plan = facefast::MakePlan(numbers, width, height, target);
  plan.pixels = pixels;
  plan.output = output;
  facefast::Scratch scratch;
  facefast::AugmentPicture(plan, target, &scratch);
}

void augment_as_cuda(const uint8_t* pixels, int width, int height, const float* numbers, int out_width, int out_height,
                     float* output) {
  const facefast::Target target{out_width, out_height, facefast::Dtype::kFloat, true};
  facefast::Plan plan = facefast::MakePlan(numbers, width, height, target);
  plan.pixels = pixels;
  const bool reduced = plan.x.block > 1 || plan.y.block > 1;
  for (int y = 0; y < out_height; ++y) {
    for (int x = 0; x < out_width; ++x, output += 3) {
      output[0] = output[1] = output[2] = 0.0f;
      if (facefast::Erased(plan, x, y)) continue;
      float rgb[3];
      reduced ? facefast::Sample<true>(plan, x, y, rgb) : facefast::Sample<false>(plan, x, y, rgb);
      for (int c = 0; c < 3; ++c) output[c] = facefast::Color(plan.color + 4 * c, rgb);
    }
  }
}

void narrow(const float* values, int count, int dtype, uint16_t* bits) {
  for (int i = 0; i < count; ++i) {
    bits[i] = dtype == 1 ? facefast::HalfBits(values[i]) : facefast::Bfloat16Bits(values[i]);
  }
}
}
