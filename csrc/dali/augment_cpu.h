// One picture on the CPU, without DALI; safe to call from many threads, each with a Scratch.

#ifndef FACEFAST_CSRC_DALI_AUGMENT_CPU_H_
#define FACEFAST_CSRC_DALI_AUGMENT_CPU_H_

#include <vector>

#include "augment_math.h"

// FACEFAST_PORTABLE leaves the vector code out, so that the tests see what other processors run.
#if defined(__x86_64__) && !defined(FACEFAST_PORTABLE)
#define FACEFAST_AVX2_PATH 1
#endif

namespace facefast {

// What a thread keeps from one picture to the next.
struct Scratch {
  std::vector<uint8_t> reduced;
  std::vector<uint32_t> columns;
  std::vector<float> lines;
};

// Writes the picture of `plan`. The result depends on nothing but the arguments and the kind of
// processor.
void AugmentPicture(Plan plan, const Target& target, Scratch* scratch);

// A run of output pixels of one row whose taps all lie inside the picture and short of its last
// row, so that a 16-byte load never passes the end of the buffer.
struct Run {
  int begin, end;
};
Run InnerRun(const Plan& plan, int y, int width);

#if FACEFAST_AVX2_PATH
// Fills lines[c][begin, end) for c in 0..2 with coloured pixels; may also write up to 7 values past
// `end`. The plan must be free of blocks. Weights are rounded to 15 bits, worth less than
// 0.05 of 255.
void SampleRunAvx2(const Plan& plan, int y, Run run, float* const lines[3]);
// Converts and interleaves one finished row.
void StoreRowAvx2(const float* const lines[3], const Target& target, int y, void* output);
#endif

}  // namespace facefast

#endif  // FACEFAST_CSRC_DALI_AUGMENT_CPU_H_
