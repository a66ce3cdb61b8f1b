// FaceAugment as a DALI plugin: matrix, colour and erase in one pass over each decoded picture,
// written in the batch's final layout and type. facefast/data/dali.py builds the graph around it.

#include "face_augment.h"

#include <string>
#include <tuple>

#include "augment_cpu.h"
#include "dali/core/format.h"
#include "dali/pipeline/data/views.h"
#include "dali/pipeline/operator/operator.h"
#if FACEFAST_WITH_CUDA
#include "dali/core/cuda_error.h"
#include "dali/kernels/dynamic_scratchpad.h"
#include "dali/kernels/scratch_copy_impl.h"
#endif

#ifndef FACEFAST_DALI_VERSION
#error "build with -DFACEFAST_DALI_VERSION=\"x.y.z\", the nvidia.dali.__version__ whose headers are used"
#endif

#if FACEFAST_WITH_CUDA
#define FACEFAST_PARTS "cpu,cuda"
#else
#define FACEFAST_PARTS "cpu"
#endif

// facefast/data/dali.py finds this in the file before DALI loads it, since DALI promises no binary
// compatibility between versions: a plugin of another one may fail to link, or link and crash.
extern "C" __attribute__((visibility("default"), used)) const char facefast_dali_plugin[] =
    "facefast plugin for DALI " FACEFAST_DALI_VERSION " with " FACEFAST_PARTS;

namespace facefast {

using dali::CPUBackend;
using dali::GPUBackend;
using dali::make_string;

template <typename Backend>
FaceAugment<Backend>::FaceAugment(const dali::OpSpec& spec) : dali::StatelessOperator<Backend>(spec) {
  const auto size = spec.GetRepeatedArgument<int>("size");
  DALI_ENFORCE(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] <= 16384 && size[1] <= 16384,
               "size must be (height, width), each from 1 to 16384");
  const auto layout = spec.GetArgument<std::string>("layout");
  DALI_ENFORCE(layout == "CHW" || layout == "HWC", make_string("layout is \"", layout, "\"; it must be CHW or HWC"));
  const auto dtype = spec.GetArgument<dali::DALIDataType>("dtype");
  DALI_ENFORCE(dtype == DALI_FLOAT || dtype == DALI_FLOAT16 || dtype == DALI_INT16,
               make_string("dtype is ", dtype, "; it must be FLOAT, FLOAT16 or INT16 (the bits of bfloat16)"));
  target_.height = size[0];
  target_.width = size[1];
  target_.channels_last = layout == "HWC";
  target_.dtype = dtype == DALI_FLOAT ? Dtype::kFloat : dtype == DALI_FLOAT16 ? Dtype::kHalf : Dtype::kBfloat16;
}

template <typename Backend>
dali::DALIDataType FaceAugment<Backend>::OutputType() const {
  switch (target_.dtype) {
    case Dtype::kHalf:
      return DALI_FLOAT16;
    case Dtype::kBfloat16:
      return DALI_INT16;
    default:
      return DALI_FLOAT;
  }
}

template <typename Backend>
bool FaceAugment<Backend>::SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& ws) {
  const auto& input = ws.Input<Backend>(0);
  const int count = input.num_samples();
  DALI_ENFORCE(input.type() == DALI_UINT8, make_string("pictures are ", input.type(), "; they must be UINT8"));
  numbers_.Acquire(this->spec_, ws, count, dali::TensorShape<1>{kNumbers});
  plans_.resize(count);
  for (int i = 0; i < count; ++i) {
    const auto shape = input.tensor_shape_span(i);
    DALI_ENFORCE(shape.size() == 3 && shape[2] == 3 && shape[0] > 0 && shape[1] > 0,
                 make_string("picture ", i, " has shape ", input.tensor_shape(i), "; it must be height x width x 3"));
    DALI_ENFORCE(shape[0] * shape[1] <= INT32_MAX / 3,
                 make_string("picture ", i, " has ", shape[0], " x ", shape[1], " pixels; at most ", INT32_MAX / 3,
                             " are supported: leave it out with the loader's pixel limit"));
    plans_[i] = MakePlan(numbers_[i].data, static_cast<int>(shape[1]), static_cast<int>(shape[0]), target_);
    plans_[i].pixels = static_cast<const uint8_t*>(input.raw_tensor(i));
  }
  const auto shape = target_.channels_last ? dali::TensorShape<>{target_.height, target_.width, 3}
                                           : dali::TensorShape<>{3, target_.height, target_.width};
  outputs = {{dali::uniform_list_shape(count, shape), OutputType()}};
  return true;
}

template <>
void FaceAugment<CPUBackend>::RunImpl(dali::Workspace& ws) {
  auto& output = ws.Output<CPUBackend>(0);
  output.SetLayout(target_.channels_last ? "HWC" : "CHW");
  auto& pool = ws.GetThreadPool();
  for (int i = 0; i < output.num_samples(); ++i) {
    plans_[i].output = output.raw_mutable_tensor(i);
    const int64_t pixels = int64_t{plans_[i].x.size} * plans_[i].y.size;
    pool.AddWork(
        [this, i](int) {
          thread_local Scratch scratch;  // grows to the largest picture and stays
          AugmentPicture(plans_[i], target_, &scratch);
        },
        pixels);  // the largest pictures first
  }
  pool.RunAll();
}

#if FACEFAST_WITH_CUDA
template <>
void FaceAugment<GPUBackend>::RunImpl(dali::Workspace& ws) {
  auto& output = ws.Output<GPUBackend>(0);
  output.SetLayout(target_.channels_last ? "HWC" : "CHW");
  bool reduces = false;
  for (int i = 0; i < output.num_samples(); ++i) {
    plans_[i].output = output.raw_mutable_tensor(i);
    reduces |= plans_[i].x.block > 1 || plans_[i].y.block > 1;
  }
  // One copy for the batch, staged in pinned memory that DALI frees in stream order.
  dali::kernels::DynamicScratchpad scratchpad(ws.stream());
  const Plan* plans = std::get<0>(scratchpad.ToContiguousGPU(ws.stream(), plans_));
  LaunchFaceAugment(plans, output.num_samples(), target_, reduces, ws.stream());
  CUDA_CALL(cudaGetLastError());
}
#endif

}  // namespace facefast

// DALI's macros name types of its own namespace.
namespace dali {

DALI_SCHEMA(FaceAugment)
    .DocStr(
        R"code(Samples, colours and erases decoded RGB pictures (HWC, uint8) in one pass and writes a batch of
equal size in its final layout and type. The filter is exact bilinear interpolation where the picture is not shrunk and
an area-correct tent where it is; outside the picture is black.)code")
    .NumInput(1)
    .NumOutput(1)
    .InputLayout(0, "HWC")
    .AddArg("numbers",
            R"code(24 float32 per picture: the 2x3 matrix from centres of output pixels to the picture
(x y 1), the 3x4 colour matrix on 0..255 RGB, the erased rectangle x0 y0 x1 y1 in output pixels (half open, filled with
0), and x y of the decoded region within the picture.)code",
            DALI_FLOAT_VEC, true)
    .AddArg("size", "Height and width of the output.", DALI_INT_VEC)
    .AddOptionalTypeArg("dtype", "FLOAT, FLOAT16 or INT16, which holds the bits of bfloat16.", DALI_FLOAT)
    .AddOptionalArg<std::string>("layout", "CHW or HWC.", "CHW");

using FaceAugmentCPU = facefast::FaceAugment<CPUBackend>;
DALI_REGISTER_OPERATOR(FaceAugment, FaceAugmentCPU, CPU);
#if FACEFAST_WITH_CUDA
using FaceAugmentGPU = facefast::FaceAugment<GPUBackend>;
DALI_REGISTER_OPERATOR(FaceAugment, FaceAugmentGPU, GPU);
#endif

}  // namespace dali
