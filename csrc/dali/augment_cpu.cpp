// One picture on the CPU: block means, the run of each row that needs no border tests, colour,
// erase, store.

#include "augment_cpu.h"

#include <algorithm>

namespace facefast {
namespace {

#if FACEFAST_AVX2_PATH
bool HasAvx2() {
  static const bool has =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has;
}
#endif

#if FACEFAST_AVX2_PATH && defined(__GLIBC__)
__attribute__((target_clones("avx2", "default")))
#endif
void AddRow(const uint8_t* pixels, size_t count, uint32_t* sums) {
  for (size_t i = 0; i < count; ++i) sums[i] += pixels[i];
}

// Replaces the picture of the plan by its block means. Rows of a block are added first, which reads
// the picture once in order; BlockMean in augment_math.h is the definition.
void Reduce(Plan* plan, Scratch* scratch) {
  const Axis &x = plan->x, &y = plan->y;
  const size_t line = static_cast<size_t>(x.size) * 3;
  const uint32_t area = static_cast<uint32_t>(x.block) * y.block;
  scratch->reduced.resize(static_cast<size_t>(x.reduced) * y.reduced * 3);
  scratch->columns.resize(line);
  uint32_t* columns = scratch->columns.data();
  uint8_t* out = scratch->reduced.data();
  for (int by = 0; by < y.reduced; ++by) {
    const int first = std::max(0, by * y.block - y.phase);
    const int last = std::min(y.size, (by + 1) * y.block - y.phase);
    std::fill_n(columns, line, 0u);
    for (int row = first; row < last; ++row) {
      const uint8_t* pixels = plan->pixels + row * line;
      AddRow(pixels, line, columns);
    }
    for (int bx = 0; bx < x.reduced; ++bx, out += 3) {
      const int from = std::max(0, bx * x.block - x.phase);
      const int to = std::min(x.size, (bx + 1) * x.block - x.phase);
      uint32_t r = area / 2, g = area / 2, b = area / 2;
      for (int column = from; column < to; ++column) {
        r += columns[3 * column];
        g += columns[3 * column + 1];
        b += columns[3 * column + 2];
      }
      out[0] = static_cast<uint8_t>(r / area);
      out[1] = static_cast<uint8_t>(g / area);
      out[2] = static_cast<uint8_t>(b / area);
    }
  }
  plan->pixels = scratch->reduced.data();
  for (Axis* axis : {&plan->x, &plan->y}) {
    axis->size = axis->reduced;
    axis->block = 1;
    axis->phase = 0;
  }
}

// Narrows [low, high] to the x at which an axis reads neither before its first nor past its
// `size`-th pixel. The index is linear in x, so the x that are allowed are one interval.
void Narrow(const Axis& axis, int size, int y, double* low, double* high) {
  const double slope = axis.map[0], at = static_cast<double>(axis.map[1]) * y + axis.map[2];
  // The samplers compute the index in float32, of terms as large as these.
  const double terms = std::fabs(slope) * *high + std::fabs(double{axis.map[1]}) * y + std::fabs(double{axis.map[2]});
  const double slack = 1e-3 + 5e-7 * terms;
  const double least = axis.radius - 1.0 + slack, most = size - axis.taps + axis.radius - slack;
  if (!(least <= most) || !std::isfinite(terms)) {
    *high = -1.0;
  } else if (slope != 0.0) {
    const double a = (least - at) / slope, b = (most - at) / slope;
    *low = std::max(*low, std::min(a, b));
    *high = std::min(*high, std::max(a, b));
  } else if (at < least || at > most) {
    *high = -1.0;
  }
}

void SampleScalar(const Plan& plan, int y, int begin, int end, float* const lines[3]) {
  for (int x = begin; x < end; ++x) {
    float rgb[3];
    Sample<false>(plan, x, y, rgb);
    for (int c = 0; c < 3; ++c) lines[c][x] = Color(plan.color + 4 * c, rgb);
  }
}

void SampleRow(const Plan& plan, int y, int begin, int end, float* const lines[3]) {
#if FACEFAST_AVX2_PATH
  if (HasAvx2()) {
    Run run = InnerRun(plan, y, end);
    run.begin = std::max(run.begin, begin);
    if (run.begin < run.end) {
      SampleScalar(plan, y, begin, run.begin, lines);
      SampleRunAvx2(plan, y, run, lines);
      SampleScalar(plan, y, run.end, end, lines);
      return;
    }
  }
#endif
  SampleScalar(plan, y, begin, end, lines);
}

template <typename T, typename Convert>
void StoreRow(const float* const lines[3], const Target& target, int y, T* output, Convert convert) {
  const size_t width = target.width;
  for (size_t c = 0; c < 3; ++c) {
    for (size_t x = 0; x < width; ++x) {
      const size_t at = target.channels_last ? (y * width + x) * 3 + c : (c * target.height + y) * width + x;
      output[at] = convert(lines[c][x]);
    }
  }
}

void StoreRow(const float* const lines[3], const Target& target, int y, void* output) {
#if FACEFAST_AVX2_PATH
  if (HasAvx2()) return StoreRowAvx2(lines, target, y, output);
#endif
  switch (target.dtype) {
    case Dtype::kFloat:
      return StoreRow(lines, target, y, static_cast<float*>(output), [](float value) { return value; });
    case Dtype::kHalf:
      return StoreRow(lines, target, y, static_cast<uint16_t*>(output), HalfBits);
    case Dtype::kBfloat16:
      return StoreRow(lines, target, y, static_cast<uint16_t*>(output), Bfloat16Bits);
  }
}

}  // namespace

Run InnerRun(const Plan& plan, int y, int width) {
  // Two 16-byte loads, 12 bytes apart, must not reach past the row after the one they start in.
  if (plan.x.size * 3 < 28) return {0, 0};
  double low = 0.0, high = width - 1.0;
  Narrow(plan.x, plan.x.size, y, &low, &high);
  Narrow(plan.y, plan.y.size - 1, y, &low, &high);
  if (!(std::ceil(low) <= std::floor(high))) return {0, 0};
  return {static_cast<int>(std::ceil(low)), static_cast<int>(std::floor(high)) + 1};
}

void AugmentPicture(Plan plan, const Target& target, Scratch* scratch) {
  if (plan.x.block > 1 || plan.y.block > 1) Reduce(&plan, scratch);
  const size_t length = static_cast<size_t>(target.width) + 8;  // SampleRunAvx2 and StoreRowAvx2 work in eights
  scratch->lines.resize(3 * length);
  float* const lines[3] = {scratch->lines.data(), scratch->lines.data() + length, scratch->lines.data() + 2 * length};
  for (int y = 0; y < target.height; ++y) {
    if (y >= plan.erase[1] && y < plan.erase[3] && plan.erase[0] < plan.erase[2]) {
      SampleRow(plan, y, 0, plan.erase[0], lines);
      for (float* line : lines) std::fill(line + plan.erase[0], line + plan.erase[2], 0.0f);
      SampleRow(plan, y, plan.erase[2], target.width, lines);
    } else {
      SampleRow(plan, y, 0, target.width, lines);
    }
    StoreRow(lines, target, y, plan.output);
  }
}

}  // namespace facefast
