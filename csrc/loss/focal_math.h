// The scalar core of the focal losses, the same on host and device: margins, the terms of a row in
// d-form, an element of the sigmoid loss, and the online merge of softmax statistics. docs/focal.md
// derives the formulas.
//
// Selects instead of branches wherever a loop over rows or elements runs through it, so that it
// vectorises on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define FACEFAST_CORE __host__ __device__ __forceinline__
#else
#define FACEFAST_CORE inline __attribute__((always_inline))
#endif
#if !defined(__CUDA_ARCH__)
#include <bit>
#endif

namespace facefast {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What a matrix of T is summed in: float, or double where it is double.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// cos(m1 * angle + m2) - m3 on the target's cosine.
struct MarginNumbers {
  double m2 = 0, cos_m2 = 1, sin_m2 = 0, m3 = 0;
};

struct Margin {
  bool active = false;
  bool detached = false;  // the slope is taken as 1 (InsightFace)
  double m1 = 1;
  MarginNumbers all;                    // of every row,
  const MarginNumbers* rows = nullptr;  // or one for each
};

// Options of one call that are the same for every row.
struct Focal {
  double gamma = 2, smoothing = 0, scale = 1, alpha = 1;
  int64_t ignore_index = -100;
  int64_t num_classes = 1;
  Margin margin;
};

// A row shorter than kNormFloor is divided by it, as torch.nn.functional.normalize does: a constant without a
// derivative.
constexpr double kNormFloor = 1e-12, kFlooredNorm = 0.999 / kNormFloor;

// -----------------------------------------------------------------------------------------------
// Elementary functions: the device's own accurate ones; on the host, polynomials that the compiler
// can vectorise.

FACEFAST_CORE int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  return std::bit_cast<int32_t>(x);
#endif
}

FACEFAST_CORE float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;

// 2^(x * log2e), split as 2^n * 2^r. Adding kShift rounds to an integer and leaves n + 127 in the
// low bits.
constexpr float kShift = 12582912.f + 127.f;

// 2^r for r in [-1/2, 1/2] to 1e-7 (minimax), times 2^n taken from `shifted` = n + kShift; n = -127
// gives exactly 0.
constexpr float kExp2[] = {1.f, 6.931469776e-1f, 2.402224208e-1f, 5.550733744e-2f, 9.671512769e-3f, 1.326472727e-3f};
FACEFAST_CORE float exp2_parts(float shifted, float r) {
  float p = kExp2[5] * r + kExp2[4];
  p = p * r + kExp2[3];
  p = p * r + kExp2[2];
  p = p * r + kExp2[1];
  p = p * r + kExp2[0];
  return p * float_of(bits_of(shifted) << 23);
}

// exp for x <= 0; below -87.7 it is exactly 0, NaN stays NaN.
FACEFAST_CORE float exp_(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  x = x < -88.02f ? -88.02f : x;
  const float shifted = x * kLog2e + kShift;
  const float n = shifted - kShift;
  return exp2_parts(shifted, (x * kLog2e - n) + x * kLog2eRest);
#endif
}

// log of a positive normal number in two parts, n * log 2 + small (Cephes' polynomial); NaN stays
// NaN.
FACEFAST_CORE float log_parts(float x, float* n) {
  const int32_t bits = bits_of(x) - 0x3f3504f3;  // relative to sqrt(1/2)
  *n = static_cast<float>(bits >> 23);
  const float f = float_of((bits & 0x7fffff) + 0x3f3504f3) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  return (f + (p * f * square - 0.5f * square)) + (x - x);
}

FACEFAST_CORE float log_(float x) {
  float n;
  const float small = log_parts(x, &n);
  return (small - 2.12194440e-4f * n) + 0.693359375f * n;
}

// The same to 3e-8 absolute: d inherits its error, and the loss multiplies that by 1 + gamma.
FACEFAST_CORE double log_wide(float x) {
  float n;
  const float small = log_parts(x, &n);
  return double(small) + 0.693147180559945309417 * double(n);
}

// log(1 + x) for x in [0, 1].
FACEFAST_CORE float log1p_(float x) {
  const float u = 1.f + x;
  return log_(u) + (x - (u - 1.f)) / u;
}

FACEFAST_CORE float fma_(float a, float b, float c) { return ::fmaf(a, b, c); }

FACEFAST_CORE double exp_(double x) { return ::exp(x); }
FACEFAST_CORE double log_(double x) { return ::log(x); }
FACEFAST_CORE double log_wide(double x) { return ::log(x); }
FACEFAST_CORE double log1p_(double x) { return ::log1p(x); }
FACEFAST_CORE double fma_(double a, double b, double c) { return ::fma(a, b, c); }

// -----------------------------------------------------------------------------------------------
// Softmax statistics over a set of classes: mass = sum of exp(scale * (x - peak)); an empty set is
// (0, 0).

template <typename T, typename Mass = T>
struct Stats {
  T peak;  // greatest x; 0 when none is above -inf
  Mass mass;
};

// The statistics of the union of two disjoint sets. A NaN or +inf among the x has made the mass
// NaN, and stays there.
template <typename T, typename Mass>
FACEFAST_CORE Stats<T, Mass> merge(Stats<T, Mass> a, Stats<T, Mass> b, T scale) {
  const bool swap = a.mass == Mass(0) || (b.mass != Mass(0) && b.peak > a.peak);
  const Stats<T, Mass> high = swap ? b : a, low = swap ? a : b;
  const Mass factor = static_cast<Mass>(exp_(scale * (low.peak - high.peak)));
  return {high.peak, low.mass == Mass(0) ? high.mass : high.mass + low.mass * factor};
}

// -----------------------------------------------------------------------------------------------
// Margin on the target's cosine, in double: the loss multiplies an error here by scale * (1 +
// gamma).

struct Target {
  double z;      // the target's logit: scale * (cosine after the margin)
  double slope;  // d z / d x, with the scale
};

FACEFAST_CORE MarginNumbers margin_numbers(const Margin& margin, int64_t row) {
  return margin.rows != nullptr ? margin.rows[row] : margin.all;
}

FACEFAST_CORE Target with_slope(const Focal& focal, double value, double slope) {
  return {focal.scale * value, focal.scale * (focal.margin.detached ? 1 : slope)};
}

constexpr double kPi = 3.14159265358979323846;
constexpr double kSinFloor = 1e-3;  // the slope is infinite at |cos| = 1; facefast/ops/margins.py holds the same number

// m1 = 1: the addition theorem needs no angle, and loses nothing near |c| = 1. |m2| is at most pi.
FACEFAST_CORE Target shifted_logit(double x, const Focal& focal, int64_t row) {
  const MarginNumbers m = margin_numbers(focal.margin, row);
  const double c = x < -1 ? -1 : (x > 1 ? 1 : x);  // rounding takes a cosine past 1; NaN stays
  const double sine = ::sqrt((1 - c) * (1 + c));
  const double floored = sine > kSinFloor ? sine : kSinFloor;
  const bool beyond = m.m2 > 0 && c < -m.cos_m2;  // angle + m2 > pi: a straight line goes on falling
  const bool below = m.m2 < 0 && c > m.cos_m2;    // angle + m2 < 0: the angle stops at 0
  double value = c * m.cos_m2 - sine * m.sin_m2;
  double slope = (sine * m.cos_m2 + c * m.sin_m2) / floored;
  value = beyond ? c - m.m2 * m.sin_m2 : (below ? 1 : value);
  slope = beyond ? 1 : (below ? 0 : slope);
  const bool none = m.m2 == 0;
  return with_slope(focal, (none ? x : value) - m.m3, none ? 1 : slope);
}

// Any m1, by the angle.
FACEFAST_CORE Target angular_logit(double x, const Focal& focal, int64_t row) {
  const MarginNumbers m = margin_numbers(focal.margin, row);
  const double m1 = focal.margin.m1;
  const double c = x < -1 ? -1 : (x > 1 ? 1 : x);
  const double sine = ::sqrt((1 - c) * (1 + c));
  const double moved = m1 * ::acos(c) + m.m2;
  if (moved > kPi) return with_slope(focal, c - 1 - ::cos((kPi - m.m2) / m1) - m.m3, 1);
  if (moved < 0) return with_slope(focal, 1 - m.m3, 0);
  return with_slope(focal, ::cos(moved) - m.m3, m1 * ::sin(moved) / (sine > kSinFloor ? sine : kSinFloor));
}

FACEFAST_CORE Target plain_logit(double x, const Focal& focal) { return {focal.scale * x, focal.scale}; }

// -----------------------------------------------------------------------------------------------
// What softmax and sigmoid share. With d = target's logit - log(sum of exp of the others), and p
// its probability:
//   cross entropy ce = softplus(-d);  u = 1 - p = exp(-softplus(d));  focal loss = u^gamma * ce;
//   d loss / d (target's logit) = -k * u,  k = u^gamma * (1 + gamma * b),  b = ce / expm1(ce) = ce
//   * exp(d).

template <typename T>
struct Terms {
  T ce, p, u;
  T weight;  // u^gamma
  T k;
  T softplus_down;  // log(1 + exp(-|d|))
};

// d comes in two parts: rounded to T alone it would cost (1 + gamma) * |d| * 2^-24 of the result.
template <typename T>
FACEFAST_CORE Terms<T> focal_terms(T hi, T lo, T gamma) {
  Terms<T> t;
  const bool up = hi > T(0);
  T e = exp_(up ? -hi : hi);
  e += e * (up ? -lo : lo);
  const T q = log1p_(e);
  const T inverse = T(1) / (T(1) + e);
  t.softplus_down = q;
  t.ce = up ? q : (q - lo) - hi;
  t.p = up ? inverse : e * inverse;
  t.u = up ? e * inverse : inverse;
  // gamma * softplus(d), with the rounding error of the product carried along into the power.
  const T high = up ? (hi > T(1e4) ? T(1e4) : hi) : q;
  const T product = gamma * high;
  const T rest = fma_(gamma, high, -product) + gamma * (up ? lo + q : T(0));
  const T sum = product + rest;
  const T power = exp_(-sum) * (T(1) - (rest - (sum - product)));
  const T b = e > T(0) ? (up ? q / e : t.ce * e) : (up ? T(1) : T(0));
  t.weight = gamma == T(0) ? T(1) : power;
  t.k = gamma == T(0) ? T(1) : power * (T(1) + gamma * b);
  return t;
}

// A row's loss and derivatives; double, because upstream gradients and loss scales multiply them
// before the one rounding to the matrix's type.
struct Row {
  double loss;
  double others;  // d loss / d z_j = others * exp(scale * (x_j - peak)) + constant for every class
                  // but the target
  double target;  // d loss / d (target's logit)
  double constant;
};

// `z` is the target's logit, `sum` the sum of scale * x over the other classes (read for label
// smoothing only).
template <typename T>
FACEFAST_CORE Row focal_row(double z, Stats<T> stats, double sum, double alpha, const Focal& focal) {
  const T mass = stats.mass == T(0) ? T(1) : stats.mass;  // at least 1 unless the set is empty
  const double lse = focal.scale * double(stats.peak) + log_wide(mass);
  const double lse_others = stats.mass == T(0) ? -kInf : lse;
  double d = z - lse_others;
  d = z == kInf ? z - z : d;  // an infinite logit is a fault, not a perfect score
  const T hi = static_cast<T>(d);
  const double rest = d - double(hi);
  const T lo = d == kInf || d == -kInf ? T(0) : static_cast<T>(rest);
  const Terms<T> t = focal_terms<T>(hi, lo, static_cast<T>(focal.gamma));

  const double eps = focal.smoothing, keep = 1 - eps;
  const double share = 1 / static_cast<double>(focal.num_classes);
  const double total = d > 0 ? z + double(t.ce) : lse_others + double(t.softplus_down);
  const double smooth = eps > 0 ? eps * (total - (sum + z) * share) : 0;
  const double ku = keep * double(t.k) * double(t.u) + eps * double(t.u);
  Row row;
  row.loss = alpha * (keep * (double(t.weight) * double(t.ce)) + smooth);
  row.others = alpha * ku / double(mass);
  row.target = alpha * (eps - eps * share - ku);
  row.constant = -alpha * (eps * share);
  return row;
}

// -----------------------------------------------------------------------------------------------
// One element of the sigmoid loss, without alpha.

template <typename T>
struct Element {
  T loss;
  T grad;
};

// Target exactly 0 or 1: the d-form with d = x or -x.
template <typename T>
FACEFAST_CORE Element<T> sigmoid_hard(T x, bool positive, T gamma) {
  const Terms<T> t = focal_terms<T>(positive ? x : -x, T(0), gamma);
  const T ku = t.k * t.u;
  return {t.weight * t.ce, positive ? -ku : ku};
}

// Target between 0 and 1: u = p (1 - target) + (1 - p) target, a sum of positive terms, and
// loss = u^gamma * (binary cross entropy).
template <typename T>
FACEFAST_CORE Element<T> sigmoid_soft(T x, T target, T gamma) {
  const bool up = x > T(0);
  const T e = exp_(up ? -x : x);
  const T q = log1p_(e);
  const T inverse = T(1) / (T(1) + e);
  const T ce = target * (up ? q : q - x) + (T(1) - target) * (up ? x + q : q);
  const T part = up ? (T(1) - target) + target * e : e * (T(1) - target) + target;  // u = part * inverse
  const T power = gamma == T(0) ? T(1) : exp_(gamma * (log_(part) - q));
  const T small = e * inverse;
  const T excess = up ? (T(1) - target) - small : small - target;  // p - target, from exact differences
  const T slope = (T(1) - T(2) * target) * small / part;           // d log u / d x
  const T bent = e == T(0) ? T(0) : gamma * slope * ce;            // not 0 * inf
  return {power * ce, power * (bent + excess)};
}

template <typename T>
FACEFAST_CORE Element<T> sigmoid_element(T x, T target, T gamma) {
  return target == T(0) || target == T(1) ? sigmoid_hard(x, target == T(1), gamma) : sigmoid_soft(x, target, gamma);
}

}  // namespace facefast
