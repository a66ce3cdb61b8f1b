// One picture on the CPU: block means, the run of each row that needs no border tests, colour, erase, store.

#include "augment_cpu.h"

#include <algorithm>

namespace facefast {
namespace {

bool HasAvx2() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx2", "default")))
#endif
void AddRow(const uint8_t* pixels, size_t count, uint32_t* sums) {
  for (size_t i = 0; i < count; ++i) sums[i] += pixels[i];
}

// Replaces the picture of the plan by its block means. Rows of a block are added first, which reads the picture once
// in order; BlockMean in augment_math.h is the definition.
void Reduce(Plan* plan, Scratch* scratch) {
  const Axis &x = plan->x, &y = plan->y;
  const size_t line = static_cast<size_t>(x.size) * 3;
  const uint64_t area = static_cast<uint64_t>(x.block) * y.block;
  const double inverse = 1.0 / static_cast<double>(area);  // (sum + 0.5) / area is never near a whole number from below
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
      uint64_t r = area / 2, g = area / 2, b = area / 2;
      for (int column = from; column < to; ++column) {
        r += columns[3 * column];
        g += columns[3 * column + 1];
        b += columns[3 * column + 2];
      }
      out[0] = static_cast<uint8_t>((r + 0.5) * inverse);
      out[1] = static_cast<uint8_t>((g + 0.5) * inverse);
      out[2] = static_cast<uint8_t>((b + 0.5) * inverse);
    }
  }
  plan->pixels = scratch->reduced.data();
  for (Axis* axis : {&plan->x, &plan->y}) {
    axis->size = axis->reduced;
    axis->block = 1;
    axis->phase = 0;
  }
}

// Narrows [low, high] to the x for which map[0] x + at lies within [least, most].
void Narrow(const Axis& axis, double at, double least, double most, double* low, double* high) {
  const double slope = axis.map[0];
  if (slope == 0.0) {
    if (!(at >= least && at <= most)) *high = *low - 1.0;
    return;
  }
  const double a = (least - at) / slope, b = (most - at) / slope;
  *low = std::max(*low, std::min(a, b));
  *high = std::min(*high, std::max(a, b));
}

void SampleScalar(const Plan& plan, int y, int begin, int end, float* const lines[3]) {
  for (int x = begin; x < end; ++x) {
    float rgb[3];
    Sample<false>(plan, x, y, rgb);
    for (int c = 0; c < 3; ++c) lines[c][x] = Color(plan.color + 4 * c, rgb);
  }
}

void SampleRow(const Plan& plan, int y, int begin, int end, float* const lines[3]) {
#if defined(__x86_64__)
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
#if defined(__x86_64__)
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
  double low = 0.0, high = width - 1.0;
  if (plan.x.size * 3 < 28) return {0, 0};  // two 16-byte loads, 12 apart, would reach past the next row
  const double slack = 1e-3 + 1e-6 * (static_cast<double>(plan.x.size) + plan.y.size);  // float rounding of the index
  for (const Axis* axis : {&plan.x, &plan.y}) {
    const int usable = axis == &plan.y ? axis->size - 1 : axis->size;
    const double at = static_cast<double>(axis->map[1]) * y + axis->map[2];
    Narrow(*axis, at, axis->radius - 1.0 + slack, usable - axis->taps + axis->radius - slack, &low, &high);
  }
  const int begin = static_cast<int>(std::ceil(low)), end = static_cast<int>(std::floor(high)) + 1;
  return begin < end ? Run{begin, end} : Run{0, 0};
}

void AugmentPicture(Plan plan, const Target& target, Scratch* scratch) {
  if (plan.x.block > 1 || plan.y.block > 1) Reduce(&plan, scratch);
  const size_t length = static_cast<size_t>(target.width) + 8;  // SampleRunAvx2 and StoreRowAvx2 work in eights
  scratch->lines.resize(3 * length);
  float* const lines[3] = {scratch->lines.data(), scratch->lines.data() + length,
                           scratch->lines.data() + 2 * length};
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
