"""The losses: softmax and sigmoid focal loss, the fused linear loss, face recognition's margins; and batch
normalisation with its activation in one pass."""

from facefast.ops import reference
from facefast.ops.batch_norm_act import batch_norm_act, prelu
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
    "batch_norm_act",
    "class_block",
    "focal_loss",
    "gather",
    "linear_focal_loss",
    "prelu",
    "reference",
    "sharded_focal_loss",
    "sigmoid_focal_loss",
]
