// What the CPU kernels share: element types and their conversions, and the compilation of one
// function for several generations of processors.
#pragma once

#include <cstdint>

#include "focal_math.h"

#if defined(__x86_64__) && defined(__linux__)
#define FACEFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define FACEFAST_CLONES
#endif

#define FACEFAST_INLINE inline __attribute__((always_inline))

namespace facefast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FACEFAST_INLINE float load(float x) { return x; }
FACEFAST_INLINE double load(double x) { return x; }
FACEFAST_INLINE float load(BFloat16 x) { return float_of(static_cast<int32_t>(uint32_t{x.bits} << 16)); }
FACEFAST_INLINE float load(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = static_cast<uint32_t>(bits_of(float_of(int32_t(magnitude)) * 0x1p112f));
  return float_of(int32_t(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite)));
}

FACEFAST_INLINE void store(float* to, float x) { *to = x; }
FACEFAST_INLINE void store(double* to, double x) { *to = x; }
FACEFAST_INLINE void store(BFloat16* to, float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
FACEFAST_INLINE void store(Half* to, float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t tiny = static_cast<uint32_t>(bits_of(float_of(int32_t(magnitude)) + 0.5f)) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t big = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  to->bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? big : finite));
}

}  // namespace facefast
