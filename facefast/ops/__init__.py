"""The losses: softmax and sigmoid focal loss, the fused linear loss, and face recognition's margins."""

from facefast.ops import reference
from facefast.ops.focal import focal_loss
from facefast.ops.linear_focal import linear_focal_loss
from facefast.ops.margins import AdaFace, Arc, Combined, Cos, Margin
from facefast.ops.native import FallbackWarning, backend
from facefast.ops.sharded import ShardedLoss, class_block, gather, sharded_focal_loss
from facefast.ops.sigmoid import sigmoid_focal_loss

__all__ = [
    "AdaFace",
    "Arc",
    "Combined",
    "Cos",
    "FallbackWarning",
    "Margin",
    "ShardedLoss",
    "backend",
    "class_block",
    "focal_loss",
    "gather",
    "linear_focal_loss",
    "reference",
    "sharded_focal_loss",
    "sigmoid_focal_loss",
]
