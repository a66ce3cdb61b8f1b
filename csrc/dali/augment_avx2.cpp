// The CPU path for processors with AVX2: eight output pixels at a time.
//
// A gather of bytes is slow on every processor; instead each output pixel loads its taps of a
// picture row with one 16-byte load (RGB RGB RGB RGB), shuffles them to R R R R G G G G B B B B and
// lets pmaddwd weigh and add them. Four such registers transpose into R, G and B of eight pixels,
// where the colour matrix is nine multiply-adds. Loads and shuffles are per pixel, so that wider
// registers (AVX-512) would leave most of the work as it is.

#include "augment_cpu.h"

#if FACEFAST_AVX2_PATH

#include <immintrin.h>

#define FACEFAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FACEFAST_AVX2_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

namespace facefast {
namespace {

// Weights along x are 15-bit integers that add up to this exactly, so that an even surface stays
// even.
constexpr float kOne = 32767.0f;

// The weights of eight pixels' taps a, b, c and d, each below 2^15, become four int16 per pixel.
FACEFAST_AVX2_INLINE void StoreWeights(__m256i a, __m256i b, __m256i c, __m256i d, int64_t* out) {
  const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  const __m256i high = _mm256_blend_epi16(c, _mm256_slli_epi32(d, 16), 0xaa);
  const __m256i even = _mm256_unpacklo_epi32(low, high);  // pixels 0 1 4 5
  const __m256i odd = _mm256_unpackhi_epi32(low, high);   // pixels 2 3 6 7
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out + 4), _mm256_permute2x128_si256(even, odd, 0x31));
}

// Eight registers R R G G | B B 0 0 (each channel still in two parts) become R, G and B of eight
// pixels.
FACEFAST_AVX2_INLINE void Transpose(const __m256i* pixels, __m256* r, __m256* g, __m256* b) {
  __m256 pairs[4];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_castsi256_ps(_mm256_hadd_epi32(pixels[2 * i], pixels[2 * i + 1]));  // R G R G | B 0 B 0
  }
  const __m256 rb0 = _mm256_shuffle_ps(pairs[0], pairs[1], 0x88), g0 = _mm256_shuffle_ps(pairs[0], pairs[1], 0xdd);
  const __m256 rb1 = _mm256_shuffle_ps(pairs[2], pairs[3], 0x88), g1 = _mm256_shuffle_ps(pairs[2], pairs[3], 0xdd);
  *r = _mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_permute2f128_ps(rb0, rb1, 0x20)));
  *g = _mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_permute2f128_ps(g0, g1, 0x20)));
  *b = _mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_permute2f128_ps(rb0, rb1, 0x31)));
}

// Index of eight neighbouring output pixels along one source axis.
FACEFAST_AVX2_INLINE __m256 Index(const Axis& axis, __m256 x, float y) {
  return _mm256_fmadd_ps(_mm256_set1_ps(axis.map[0]), x, _mm256_set1_ps(axis.map[1] * y + axis.map[2]));
}

FACEFAST_AVX2_INLINE __m256i Offsets(__m256 column, __m256 row, int width) {
  const __m256i pixel = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_cvttps_epi32(row), _mm256_set1_epi32(width)),
                                         _mm256_cvttps_epi32(column));
  return _mm256_add_epi32(pixel, _mm256_add_epi32(pixel, pixel));
}

// Samplers work on up to kStrip output pixels of a row at a time: Prepare finds where each one
// reads and with which weights, Sample reads and adds eight of them.
constexpr int kStrip = 64;

// Four taps, both rows of a pixel in one register.
class Bilinear {
 public:
  FACEFAST_AVX2_INLINE explicit Bilinear(const Plan& plan)
      : x_(plan.x), y_(plan.y), pixels_(plan.pixels), stride_(ptrdiff_t{3} * plan.x.size) {}

  FACEFAST_AVX2_INLINE void Prepare(int at, __m256 x, float y) {
    const __m256 u = Index(x_, x, y), v = Index(y_, x, y);
    const __m256 column = _mm256_floor_ps(u), row = _mm256_floor_ps(v);
    _mm256_store_si256(reinterpret_cast<__m256i*>(offsets_ + at), Offsets(column, row, x_.size));
    const __m256 right = _mm256_mul_ps(_mm256_sub_ps(u, column), _mm256_set1_ps(kOne));
    const __m256 below = _mm256_sub_ps(v, row);
    const __m256i wx = _mm256_cvtps_epi32(right);
    const __m256i wy = _mm256_cvtps_epi32(_mm256_mul_ps(below, _mm256_set1_ps(kOne)));
    const __m256i w11 = _mm256_cvtps_epi32(_mm256_mul_ps(right, below));
    const __m256i w01 = _mm256_sub_epi32(wx, w11), w10 = _mm256_sub_epi32(wy, w11);
    const __m256i w00 = _mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(kOne)), _mm256_add_epi32(wx, w10));
    StoreWeights(w00, w01, w10, w11, weights_ + at);
  }

  FACEFAST_AVX2_INLINE void Sample(int at, __m256* r, __m256* g, __m256* b) const {
    const __m128i order = _mm_setr_epi8(0, 3, 8, 11, 1, 4, 9, 12, 2, 5, 10, 13, -1, -1, -1, -1);
    __m256i sums[8];
    for (int i = 0; i < 8; ++i) {
      const uint8_t* pixel = pixels_ + offsets_[at + i];
      const __m128 top = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pixel)));
      const __m128 taps = _mm_loadh_pi(top, reinterpret_cast<const __m64*>(pixel + stride_));
      const __m256i values = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_castps_si128(taps), order));
      sums[i] = _mm256_madd_epi16(values, _mm256_set1_epi64x(weights_[at + i]));
    }
    Transpose(sums, r, g, b);
  }

  // Samples come in 1 / kScale of a level.
  static constexpr float kScale = kOne;

 private:
  const Axis x_, y_;
  const uint8_t* const pixels_;
  const ptrdiff_t stride_;
  alignas(32) int32_t offsets_[kStrip];
  alignas(32) int64_t weights_[kStrip];
};

// A tent of up to 4 * kLoads taps along x and kRows along y (0: whatever the plan says). Rows are
// weighed and added first, as 16-bit values of 1/128 of a level, so that the weights along x are
// applied once for all rows.
template <int kLoads, int kRows>
class Wide {
 public:
  FACEFAST_AVX2_INLINE explicit Wide(const Plan& plan)
      : x_(plan.x), y_(plan.y), pixels_(plan.pixels), stride_(ptrdiff_t{3} * plan.x.size) {}

  FACEFAST_AVX2_INLINE void Prepare(int at, __m256 x, float y) {
    const __m256 u = Index(x_, x, y), v = Index(y_, x, y);
    const __m256 column = First(u, x_.radius), row = First(v, y_.radius);
    _mm256_store_si256(reinterpret_cast<__m256i*>(offsets_ + at), Offsets(column, row, x_.size));
    __m256i weights[kMaxTaps];
    Weights(_mm256_sub_ps(column, u), x_.radius, 4 * kLoads, weights);
    for (int i = 0; i < kLoads; ++i) {
      const __m256i* four = weights + 4 * i;
      StoreWeights(four[0], four[1], four[2], four[3], across_[i] + at);
    }
    Weights(_mm256_sub_ps(row, v), y_.radius, Rows(), weights);
    for (int j = 0; j < Rows(); ++j) {
      const __m256i twice = _mm256_or_si256(weights[j], _mm256_slli_epi32(weights[j], 16));
      _mm256_store_si256(reinterpret_cast<__m256i*>(down_[j] + at), twice);
    }
  }

  FACEFAST_AVX2_INLINE void Sample(int at, __m256* r, __m256* g, __m256* b) const {
    // Each byte lands in the upper half of a 16-bit value: R R R R G G G G | B B B B.
    const __m256i order = _mm256_setr_epi8(-1, 0, -1, 3, -1, 6, -1, 9, -1, 1, -1, 4, -1, 7, -1, 10,  //
                                           -1, 2, -1, 5, -1, 8, -1, 11, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i half = _mm256_set1_epi16(static_cast<int16_t>(Rows() / 2));  // mulhi rounds down
    __m256i sums[8];
    for (int i = 0; i < 8; ++i) {
      const uint8_t* pixel = pixels_ + offsets_[at + i];
      __m256i parts[kLoads];
      for (__m256i& part : parts) part = half;
      for (int j = 0; j < Rows(); ++j, pixel += stride_) {
        const __m256i weight = _mm256_set1_epi32(down_[j][at + i]);
        for (int k = 0; k < kLoads; ++k) {
          const __m256i taps = _mm256_shuffle_epi8(Load(pixel + 12 * k), order);
          parts[k] = _mm256_add_epi16(parts[k], _mm256_mulhi_epu16(taps, weight));
        }
      }
      sums[i] = _mm256_madd_epi16(parts[0], _mm256_set1_epi64x(across_[0][at + i]));
      if (kLoads == 2) {
        const __m256i weight = _mm256_set1_epi64x(across_[kLoads - 1][at + i]);
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(parts[kLoads - 1], weight));
      }
    }
    Transpose(sums, r, g, b);
  }

  // Samples come in 1 / kScale of a level.
  static constexpr float kScale = kOne * (kOne / 256.0f);

 private:
  FACEFAST_AVX2_INLINE int Rows() const { return kRows > 0 ? kRows : y_.taps; }

  static FACEFAST_AVX2_INLINE __m256i Load(const uint8_t* at) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }

  static FACEFAST_AVX2_INLINE __m256 First(__m256 index, float radius) {
    const __m256 below = _mm256_floor_ps(_mm256_sub_ps(index, _mm256_set1_ps(radius)));
    return _mm256_add_ps(below, _mm256_set1_ps(1.0f));
  }

  // Integer weights of the taps at start, start + 1, ... from the tent's peak.
  static FACEFAST_AVX2_INLINE void Weights(__m256 start, float radius, int taps, __m256i* weights) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    const __m256 inverse = _mm256_set1_ps(1.0f / radius);
    __m256 tents[kMaxTaps];
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < taps; ++i) {
      tents[i] = _mm256_fnmadd_ps(_mm256_andnot_ps(sign, start), inverse, one);
      tents[i] = _mm256_max_ps(_mm256_setzero_ps(), tents[i]);
      sum = _mm256_add_ps(sum, tents[i]);
      start = _mm256_add_ps(start, one);
    }
    const __m256 scale = _mm256_div_ps(_mm256_set1_ps(kOne), sum);
    __m256i rest = _mm256_set1_epi32(static_cast<int>(kOne));
    for (int i = 0; i < taps; ++i) {
      weights[i] = _mm256_cvtps_epi32(_mm256_mul_ps(tents[i], scale));
      rest = _mm256_sub_epi32(rest, weights[i]);
    }
    weights[1] = _mm256_add_epi32(weights[1], rest);  // a tap that always has weight takes the rounding
  }

  const Axis x_, y_;
  const uint8_t* const pixels_;
  const ptrdiff_t stride_;
  alignas(32) int32_t offsets_[kStrip];
  alignas(32) int64_t across_[kLoads][kStrip];
  alignas(32) int32_t down_[kMaxTaps][kStrip];
};

template <typename Sampler>
FACEFAST_AVX2 void SampleRun(const Plan& plan, int y, Run run, float* const lines[3]) {
  Sampler sampler(plan);
  __m256 color[12];
  for (int i = 0; i < 12; ++i) color[i] = _mm256_set1_ps(i % 4 == 3 ? plan.color[i] : plan.color[i] / Sampler::kScale);
  float *const line0 = lines[0], *const line1 = lines[1], *const line2 = lines[2];
  const __m256 lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 last = _mm256_set1_ps(static_cast<float>(run.end - 1));
  for (int x = run.begin; x < run.end; x += kStrip) {
    const int count = run.end - x < kStrip ? run.end - x : kStrip;
    for (int i = 0; i < count; i += 8) {
      // Lanes past the end repeat the last pixel, so that they too read inside the picture.
      const __m256 at = _mm256_add_ps(lane, _mm256_set1_ps(static_cast<float>(x + i)));
      sampler.Prepare(i, _mm256_min_ps(at, last), static_cast<float>(y));
    }
    for (int i = 0; i < count; i += 8) {
      __m256 r, g, b;
      sampler.Sample(i, &r, &g, &b);
      const auto mix = [&](const __m256* row) __attribute__((target("avx2,fma,f16c"), always_inline)) {
        return _mm256_fmadd_ps(row[0], r, _mm256_fmadd_ps(row[1], g, _mm256_fmadd_ps(row[2], b, row[3])));
      };
      _mm256_storeu_ps(line0 + x + i, mix(color));
      _mm256_storeu_ps(line1 + x + i, mix(color + 4));
      _mm256_storeu_ps(line2 + x + i, mix(color + 8));
    }
  }
}

FACEFAST_AVX2_INLINE __m128i ToBfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// Eight values of one channel in the output's type.
FACEFAST_AVX2_INLINE __m128i Narrow(__m256 value, Dtype dtype) {
  return dtype == Dtype::kHalf ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                               : ToBfloat16(value);
}

// Four pixels, R G B apart, to twelve values.
FACEFAST_AVX2_INLINE void Interleave(__m128 r, __m128 g, __m128 b, float* out) {
  const __m128 br = _mm_shuffle_ps(b, r, _MM_SHUFFLE(1, 1, 0, 0));       // b0 b0 r1 r1
  const __m128 gb = _mm_shuffle_ps(g, b, _MM_SHUFFLE(1, 1, 1, 1));       // g1 g1 b1 b1
  const __m128 br_high = _mm_shuffle_ps(b, r, _MM_SHUFFLE(3, 3, 2, 2));  // b2 b2 r3 r3
  const __m128 gb_high = _mm_shuffle_ps(g, b, _MM_SHUFFLE(3, 3, 3, 3));  // g3 g3 b3 b3
  _mm_storeu_ps(out, _mm_shuffle_ps(_mm_unpacklo_ps(r, g), br, _MM_SHUFFLE(2, 0, 1, 0)));
  _mm_storeu_ps(out + 4, _mm_shuffle_ps(gb, _mm_unpackhi_ps(r, g), _MM_SHUFFLE(1, 0, 2, 0)));
  _mm_storeu_ps(out + 8, _mm_shuffle_ps(br_high, gb_high, _MM_SHUFFLE(2, 0, 2, 0)));
}

// Eight 16-bit pixels, R G B apart, to 24 values; value i of the result comes from pixel i / 3,
// channel i % 3.
FACEFAST_AVX2_INLINE void Interleave(__m128i r, __m128i g, __m128i b, uint16_t* out) {
  alignas(16) static constexpr int8_t kOrder[3][3][16] = {
      {{0, 1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1, 4, 5, -1, -1},
       {-1, -1, 0, 1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1, 4, 5},
       {-1, -1, -1, -1, 0, 1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1}},
      {{-1, -1, 6, 7, -1, -1, -1, -1, 8, 9, -1, -1, -1, -1, 10, 11},
       {-1, -1, -1, -1, 6, 7, -1, -1, -1, -1, 8, 9, -1, -1, -1, -1},
       {4, 5, -1, -1, -1, -1, 6, 7, -1, -1, -1, -1, 8, 9, -1, -1}},
      {{-1, -1, -1, -1, 12, 13, -1, -1, -1, -1, 14, 15, -1, -1, -1, -1},
       {10, 11, -1, -1, -1, -1, 12, 13, -1, -1, -1, -1, 14, 15, -1, -1},
       {-1, -1, 10, 11, -1, -1, -1, -1, 12, 13, -1, -1, -1, -1, 14, 15}}};
  const __m128i channels[3] = {r, g, b};
  for (int part = 0; part < 3; ++part) {
    __m128i value = _mm_setzero_si128();
    for (int c = 0; c < 3; ++c) {
      const auto* order = reinterpret_cast<const __m128i*>(kOrder[part][c]);
      value = _mm_or_si128(value, _mm_shuffle_epi8(channels[c], _mm_load_si128(order)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * part), value);
  }
}

FACEFAST_AVX2_INLINE void StoreEight(const float* line, Dtype, float* out) {
  _mm256_storeu_ps(out, _mm256_loadu_ps(line));
}

FACEFAST_AVX2_INLINE void StoreEight(const float* line, Dtype dtype, uint16_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), Narrow(_mm256_loadu_ps(line), dtype));
}

FACEFAST_AVX2_INLINE void StoreEight(const float* const lines[3], int x, Dtype, float* out) {
  for (int half = 0; half < 8; half += 4) {
    Interleave(_mm_loadu_ps(lines[0] + x + half), _mm_loadu_ps(lines[1] + x + half), _mm_loadu_ps(lines[2] + x + half),
               out + 3 * half);
  }
}

FACEFAST_AVX2_INLINE void StoreEight(const float* const lines[3], int x, Dtype dtype, uint16_t* out) {
  Interleave(Narrow(_mm256_loadu_ps(lines[0] + x), dtype), Narrow(_mm256_loadu_ps(lines[1] + x), dtype),
             Narrow(_mm256_loadu_ps(lines[2] + x), dtype), out);
}

template <typename T>
FACEFAST_AVX2 void StoreRow(const float* const lines[3], const Target& target, int y, T* output) {
  const int width = target.width, whole = width & ~7;
  T rest[24];  // the pixels past the last multiple of eight; the lines are long enough to be read
               // in eights
  if (target.channels_last) {
    T* row = output + static_cast<size_t>(y) * width * 3;
    for (int x = 0; x < whole; x += 8) StoreEight(lines, x, target.dtype, row + 3 * x);
    if (whole < width) {
      StoreEight(lines, whole, target.dtype, rest);
      std::memcpy(row + 3 * whole, rest, sizeof(T) * 3 * (width - whole));
    }
    return;
  }
  for (int c = 0; c < 3; ++c) {
    T* row = output + (static_cast<size_t>(c) * target.height + y) * width;
    for (int x = 0; x < whole; x += 8) StoreEight(lines[c] + x, target.dtype, row + x);
    if (whole < width) {
      StoreEight(lines[c] + whole, target.dtype, rest);
      std::memcpy(row + whole, rest, sizeof(T) * (width - whole));
    }
  }
}

}  // namespace

void SampleRunAvx2(const Plan& plan, int y, Run run, float* const lines[3]) {
  if (plan.x.taps == 2 && plan.y.taps == 2) {
    SampleRun<Bilinear>(plan, y, run, lines);
  } else if (plan.x.taps <= 4) {
    switch (plan.y.taps) {
      case 2:
        return SampleRun<Wide<1, 2>>(plan, y, run, lines);
      case 3:
        return SampleRun<Wide<1, 3>>(plan, y, run, lines);
      case 4:
        return SampleRun<Wide<1, 4>>(plan, y, run, lines);
      default:
        return SampleRun<Wide<1, 0>>(plan, y, run, lines);
    }
  } else {
    SampleRun<Wide<2, 0>>(plan, y, run, lines);
  }
}

void StoreRowAvx2(const float* const lines[3], const Target& target, int y, void* output) {
  if (target.dtype == Dtype::kFloat) {
    StoreRow(lines, target, y, static_cast<float*>(output));
  } else {
    StoreRow(lines, target, y, static_cast<uint16_t*>(output));
  }
}

}  // namespace facefast

#endif  // FACEFAST_AVX2_PATH
