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

// Selects, so that NaN goes through.
template <typename A>
FACEFAST_CORE A activated(A z, A slope, Activation activation) {
  const A below = activation == Activation::kPReLU ? slope * z : activation == Activation::kReLU ? A(0) : z;
  return z <= A(0) ? below : z;
}

// The gradient in front of the activation, and in `by_slope` that of a PReLU's slope.
template <Mask kMask, typename A>
FACEFAST_CORE A masked(A grad, A x, A output, const Channel<A>& c, A& by_slope) {
  by_slope = A(0);
  if constexpr (kMask == Mask::kNone) return grad;
  if constexpr (kMask == Mask::kOutput) return output <= A(0) ? A(0) : grad;
  if constexpr (kMask == Mask::kReLU) return normalised(x, c) <= A(0) ? A(0) : grad;
  if constexpr (kMask == Mask::kPReLU) {
    const A z = normalised(x, c);
    by_slope = z <= A(0) ? grad * z : A(0);
    return z <= A(0) ? grad * c.slope : grad;
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
