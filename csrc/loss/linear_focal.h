// linear_focal_loss on any back end, for ops.cpp.
#pragma once

#include <tuple>

#include "tensors.h"

namespace facefast {

// The scales are 1 / norm of each row of x and of weight; empty where nothing is normalised. The logits are x W^T as
// the matrix product left it, each row filled up to 16 bytes on a GPU; without rows where they are not kept.
struct LinearForward {
  Tensor loss, stats, count, row_scale, col_scale, logits;
};

// `chunk` classes at a time; 0 chooses by the cache.
LinearForward linear_forward(const Tensor& x, const Tensor& weight, const Tensor& target, const Options& options,
                             bool normalize, int64_t chunk, bool keep);

// What a block of the classes adds to the statistics of each row; a row whose label is of another block is read as one
// without a target here. `sums` is empty without label smoothing.
struct LinearStatistics {
  Tensor stats, sums, row_scale, col_scale;
};

LinearStatistics linear_statistics(const Tensor& x, const Tensor& weight, const Tensor& target, const Options& options,
                                   int64_t classes, bool normalize, int64_t chunk);

// Gradients of x and weight; one that is not needed is empty. Of `classes` the weights may hold a block alone: the
// statistics are then those of all, and the gradient of x is the block's part of it. Without `logits`, or where they
// have no rows, they are computed once more.
std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                           const Tensor& target, const Options& options, int64_t classes,
                                           const Tensor& stats, const Tensor& count, const Tensor& row_scale,
                                           const Tensor& col_scale, const std::optional<Tensor>& logits, int64_t chunk,
                                           bool need_x, bool need_weight);

}  // namespace facefast
