// The arithmetic of FaceAugment, written once for g++ and nvcc: how the numbers of a row become a
// sampling plan, and what one output pixel is. facefast/data/oracle.py mirrors these definitions in
// numpy.
//
// Coordinates are continuous: pixel i covers [i, i + 1). A 2x3 matrix maps the centre of an output
// pixel to the source picture. Per source axis, R = max(1, length of the matrix row) is how many
// source pixels one output pixel steps over, so a rotation alone never blurs. The filter is a tent
// of radius R: exact bilinear interpolation at R = 1, area-correct antialiasing where the picture
// shrinks. From R = 4 on, the picture is first averaged over blocks of k = floor(R / 2) pixels, on
// the grid of the whole picture and rounded to bytes; a tent of radius R / k does the rest. Outside
// the picture is black, blended by the filter as cv2.warpAffine(BORDER_CONSTANT) does.

#ifndef FACEFAST_CSRC_DALI_AUGMENT_MATH_H_
#define FACEFAST_CSRC_DALI_AUGMENT_MATH_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FACEFAST_HD __host__ __device__ __forceinline__
#else
#define FACEFAST_HD inline
#endif

namespace facefast {

// The numbers of a row as they come from Python, all float32:
// matrix 2x3, colour 3x4, erased rectangle x0 y0 x1 y1, x y of the decoded region in the picture.
constexpr int kNumbers = 24;
constexpr int kColorAt = 6;
constexpr int kEraseAt = 18;
constexpr int kOriginAt = 22;

// R / k stays below 4, so an axis never has more taps than this.
constexpr int kMaxTaps = 8;

// The sum over a block of bytes of this size fits 32 bits; it is reached where 8192 pixels become
// one.
constexpr int kMaxBlock = 4096;

enum class Dtype { kFloat, kHalf, kBfloat16 };

struct Target {
  int width, height;
  Dtype dtype;
  bool channels_last;
};

// One source axis: output pixel (x, y) samples the reduced region at index map[0] x + map[1] y +
// map[2].
struct Axis {
  int size;     // decoded pixels
  int block;    // k: decoded pixels per reduced pixel
  int phase;    // where the region starts inside its first block: blocks lie on the grid of the whole picture
  int reduced;  // reduced pixels: the blocks that the region touches
  int taps;
  float radius;  // of the tent, in reduced pixels
  float map[3];
};

// The work of one picture, the same for the CPU and the GPU.
struct Plan {
  const uint8_t* pixels;  // RGB, interleaved, rows without padding
  void* output;
  Axis x, y;
  float color[12];
  int erase[4];
};

inline Axis MakeAxis(const float* row, float origin, int size) {
  const double a = row[0], b = row[1];
  const double shrink = std::fmax(1.0, std::hypot(a, b));
  const int start = static_cast<int>(origin);
  Axis axis;
  axis.size = size;
  // k = floor(R / 2) leaves a tent of 2 to 3 reduced pixels in radius, so of few taps, however much
  // the picture shrinks.
  axis.block = shrink < 4.0 ? 1 : static_cast<int>(std::fmin(shrink / 2.0, double{kMaxBlock}));
  axis.phase = start % axis.block;
  axis.reduced = (axis.phase + size + axis.block - 1) / axis.block;
  // A tap that could weigh at most 0.001 is not worth its cost: rounding makes |row| of a
  // rotation 1.0000001.
  axis.taps = static_cast<int>(std::fmin(std::ceil(2.0 * shrink / axis.block - 1e-3), double{kMaxTaps}));
  axis.radius = axis.taps == 2 ? 1.0f : static_cast<float>(shrink / axis.block);
  axis.map[0] = static_cast<float>(a / axis.block);
  axis.map[1] = static_cast<float>(b / axis.block);
  // Output pixel x has its centre at x + 0.5, reduced pixel i at i + 0.5; indices count from the region's first block.
  const int first_block = start / axis.block;
  axis.map[2] = static_cast<float>((0.5 * a + 0.5 * b + row[2]) / axis.block - first_block - 0.5);
  return axis;
}

// The plan for a decoded region of width x height; the caller fills in `pixels` and `output`.
inline Plan MakePlan(const float* numbers, int width, int height, const Target& target) {
  Plan plan = {};
  plan.x = MakeAxis(numbers, numbers[kOriginAt], width);
  plan.y = MakeAxis(numbers + 3, numbers[kOriginAt + 1], height);
  std::memcpy(plan.color, numbers + kColorAt, sizeof(plan.color));
  const float limits[4] = {static_cast<float>(target.width), static_cast<float>(target.height),
                           static_cast<float>(target.width), static_cast<float>(target.height)};
  for (int i = 0; i < 4; ++i) {
    plan.erase[i] = static_cast<int>(std::fmin(std::fmax(numbers[kEraseAt + i], 0.0f), limits[i]));
  }
  return plan;
}

FACEFAST_HD bool Erased(const Plan& plan, int x, int y) {
  return x >= plan.erase[0] && y >= plan.erase[1] && x < plan.erase[2] && y < plan.erase[3];
}

// Where an axis is sampled for one output pixel: taps first, first + 1, ... of weight At(i) / sum. The sum is over all
// taps, those outside the picture too, which count as black.
struct Tent {
  int first;
  float start, inverse, sum;

  FACEFAST_HD Tent(const Axis& axis, int x, int y) {
    const float far = 1e8f;  // keeps the conversion to int defined for any matrix, NaN included
    const float raw = axis.map[0] * static_cast<float>(x) + axis.map[1] * static_cast<float>(y) + axis.map[2];
    const float at = fminf(fmaxf(raw, -far), far);
    const float base = floorf(at - axis.radius) + 1.0f;
    first = static_cast<int>(base);
    start = base - at;
    inverse = 1.0f / axis.radius;
    sum = 0.0f;
    for (int i = 0; i < axis.taps; ++i) sum += At(i);
  }
  FACEFAST_HD float At(int i) const { return fmaxf(0.0f, 1.0f - fabsf(start + static_cast<float>(i)) * inverse); }
};

// Reduced pixel (x, y): the mean of its block, rounded half up, where what lies beyond the region
// counts as black.
FACEFAST_HD void BlockMean(const Plan& plan, int x, int y, float* rgb) {
  const int x0 = x * plan.x.block - plan.x.phase, y0 = y * plan.y.block - plan.y.phase;
  const int x1 = x0 + plan.x.block < plan.x.size ? x0 + plan.x.block : plan.x.size;
  const int y1 = y0 + plan.y.block < plan.y.size ? y0 + plan.y.block : plan.y.size;
  const uint32_t area = static_cast<uint32_t>(plan.x.block) * plan.y.block;
  uint32_t r = area / 2, g = area / 2, b = area / 2;  // half of the divisor rounds half up
  for (int j = y0 < 0 ? 0 : y0; j < y1; ++j) {
    const uint8_t* row = plan.pixels + static_cast<size_t>(j) * plan.x.size * 3;
    for (int i = x0 < 0 ? 0 : x0; i < x1; ++i) {
      r += row[3 * i];
      g += row[3 * i + 1];
      b += row[3 * i + 2];
    }
  }
  rgb[0] = static_cast<float>(r / area);
  rgb[1] = static_cast<float>(g / area);
  rgb[2] = static_cast<float>(b / area);
}

// Filtered RGB (0..255) of output pixel (x, y). kReduced says whether any axis has blocks larger
// than a pixel.
template <bool kReduced>
FACEFAST_HD void Sample(const Plan& plan, int x, int y, float* rgb) {
  const Tent across(plan.x, x, y), down(plan.y, x, y);
  float sum[3] = {0.0f, 0.0f, 0.0f};
  for (int j = 0; j < plan.y.taps; ++j) {
    const int sy = down.first + j;
    if (sy < 0 || sy >= plan.y.reduced) continue;
    float line[3] = {0.0f, 0.0f, 0.0f};
    for (int i = 0; i < plan.x.taps; ++i) {
      const int sx = across.first + i;
      if (sx < 0 || sx >= plan.x.reduced) continue;
      const float weight = across.At(i);
      float value[3];
      if (kReduced) {
        BlockMean(plan, sx, sy, value);
      } else {
        const uint8_t* pixel = plan.pixels + (static_cast<size_t>(sy) * plan.x.size + sx) * 3;
        value[0] = static_cast<float>(pixel[0]);
        value[1] = static_cast<float>(pixel[1]);
        value[2] = static_cast<float>(pixel[2]);
      }
      line[0] += weight * value[0];
      line[1] += weight * value[1];
      line[2] += weight * value[2];
    }
    const float weight = down.At(j);
    sum[0] += weight * line[0];
    sum[1] += weight * line[1];
    sum[2] += weight * line[2];
  }
  const float scale = 1.0f / (across.sum * down.sum);
  rgb[0] = sum[0] * scale;
  rgb[1] = sum[1] * scale;
  rgb[2] = sum[2] * scale;
}

// One channel of the colour matrix, which has normalisation and channel order folded in; nothing is
// clamped.
FACEFAST_HD float Color(const float* row, const float* rgb) {
  return row[0] * rgb[0] + row[1] * rgb[1] + row[2] * rgb[2] + row[3];
}

// Bits of the nearest bfloat16, ties to even.
FACEFAST_HD uint16_t Bfloat16Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Bits of the nearest float16, ties to even, for processors without the instruction.
FACEFAST_HD uint16_t HalfBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round at 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &shifted, sizeof(rounded));
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace facefast

#endif  // FACEFAST_CSRC_DALI_AUGMENT_MATH_H_
