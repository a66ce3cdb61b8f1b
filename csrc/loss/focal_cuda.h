// The CUDA back end, for ops.cpp.
#pragma once

#include <functional>
#include <memory>

#include "focal.h"

namespace facefast {

// `scratch` gives device memory that stays valid until the returned object is gone; work is queued on `stream`.
std::unique_ptr<Backend> cuda_backend(int device, void* stream, std::function<void*(int64_t bytes)> scratch);

}  // namespace facefast
