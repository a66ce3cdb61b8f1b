// One value of batch normalisation with its activation, the same on host and device, forward and backward.
#pragma once

#include "norm.h"

namespace facefast {

// How the derivative of the activation is known. kOutput: ReLU, from its output.
enum class Mask { kNone, kReLU, kPReLU, kOutput };

// What a channel is normalised by: (x - mean) * scale + bias, and the slope below 0.
template <typename A>
struct Channel {
  A mean, scale, bias, slope;
};

// Written with one rounding on either device, so that forward and backward agree on which side of 0 a value lies.
FACEFAST_CORE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FACEFAST_CORE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <typename A>
FACEFAST_CORE A normalised(A x, const Channel<A>& c) {
  return multiply_add(x - c.mean, c.scale, c.bias);
}

// `value` where `keep` is set, else 0, be it infinite or NaN. By its bits on the host: GCC would move the load of what
// only one side of a condition needs behind that condition, and then vectorise nothing.
FACEFAST_CORE float kept(bool keep, float value) {
#if defined(__CUDA_ARCH__)
  return keep ? value : 0.f;
#else
  return std::bit_cast<float>(std::bit_cast<int32_t>(value) & -int32_t(keep));
#endif
}
FACEFAST_CORE double kept(bool keep, double value) {
#if defined(__CUDA_ARCH__)
  return keep ? value : 0.0;
#else
  return std::bit_cast<double>(std::bit_cast<int64_t>(value) & -int64_t(keep));
#endif
}

// NaN goes through.
template <typename A>
FACEFAST_CORE A activated(A z, A slope, Activation activation) {
  const bool below = z <= A(0);
  if (activation == Activation::kNone) return z;
  if (activation == Activation::kReLU) return kept(!below, z);
  return kept(!below, z) + slope * kept(below, z);
}

// Gradients in front of an activation, and of a PReLU's slope.
template <typename A>
struct Masked {
  A grad, slope;
};

template <Mask kMask, typename A>
FACEFAST_CORE Masked<A> masked(A grad, A x, A output, const Channel<A>& c) {
  if constexpr (kMask == Mask::kNone) return {grad, A(0)};
  if constexpr (kMask == Mask::kOutput) return {kept(!(output <= A(0)), grad), A(0)};
  if constexpr (kMask == Mask::kReLU) return {kept(!(normalised(x, c) <= A(0)), grad), A(0)};
  if constexpr (kMask == Mask::kPReLU) {
    const A z = normalised(x, c);
    const bool below = z <= A(0);
    return {kept(!below, grad) + c.slope * kept(below, grad), grad * kept(below, z)};
  }
}

inline Mask mask_of(const Norm& norm, const void* output) {
  if (norm.activation == Activation::kPReLU) return Mask::kPReLU;
  if (norm.activation == Activation::kReLU) return output != nullptr ? Mask::kOutput : Mask::kReLU;
  return Mask::kNone;
}

// Calls run(std::integral_constant<Mask, ...>{}).
template <typename F>
void with_mask(Mask mask, const F& run) {
  switch (mask) {
    case Mask::kNone:
      return run(std::integral_constant<Mask, Mask::kNone>{});
    case Mask::kReLU:
      return run(std::integral_constant<Mask, Mask::kReLU>{});
    case Mask::kPReLU:
      return run(std::integral_constant<Mask, Mask::kPReLU>{});
    case Mask::kOutput:
      return run(std::integral_constant<Mask, Mask::kOutput>{});
  }
}

// The new running statistic, as torch has it.
template <typename A>
FACEFAST_CORE A moved(A running, double now, double momentum) {
  return static_cast<A>((1 - momentum) * double(running) + momentum * now);
}

// A variance of n values as running statistics hold it.
FACEFAST_CORE double unbiased(double var, double n) { return var * n / (n - 1); }

}  // namespace facefast
