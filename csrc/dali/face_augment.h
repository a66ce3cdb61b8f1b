// What the CPU and the GPU operator share: arguments, output shape, and the numbers of a batch
// turned into plans.

#ifndef FACEFAST_CSRC_DALI_FACE_AUGMENT_H_
#define FACEFAST_CSRC_DALI_FACE_AUGMENT_H_

#include <vector>

#include "augment_math.h"
#include "dali/pipeline/operator/arg_helper.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"

namespace facefast {

template <typename Backend>
class FaceAugment : public dali::StatelessOperator<Backend> {
 public:
  explicit FaceAugment(const dali::OpSpec& spec);

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& ws) override;
  void RunImpl(dali::Workspace& ws) override;

 private:
  dali::DALIDataType OutputType() const;

  Target target_;
  dali::ArgValue<float, 1> numbers_{"numbers", this->spec_};
  std::vector<Plan> plans_;
};

// Runs the plans of a batch, which lie in GPU memory, on the stream. `reduces` says whether any of
// them averages blocks.
void LaunchFaceAugment(const Plan* plans, int count, const Target& target, bool reduces, cudaStream_t stream);

}  // namespace facefast

#endif  // FACEFAST_CSRC_DALI_FACE_AUGMENT_H_
