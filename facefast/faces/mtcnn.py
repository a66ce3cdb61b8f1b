"""MTCNN (Zhang et al. 2016, doi 10.1109/LSP.2016.2603342) on batches of pictures, with facenet-pytorch's networks.

Its networks and weights (MIT, inside its wheel) are used as they are; the cascade around them is written for batches:
candidates of all pictures of one shape go through each network together, and are cut out on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.faces.found import Faces

Picture = NDArray[np.uint8]
LEAST_FACE = 20
"""Pixels on a side of the smallest face that is looked for."""
LEAST_PART = 1 / 32
"""That side as a part of the picture's long side, in large pictures: their number of positions stays bounded."""
FACTOR = 0.709
"""From one scale of the pyramid to the next: half the area."""
THRESHOLDS = (0.6, 0.7, 0.7)
"""Probability of a face in each of the three networks."""
MOST_CANDIDATES = 512
"""Of the second and third network at a time: they bound the memory."""
STEP = 32
"""Pictures are completed with black to multiples of this many pixels, so that more of them have one shape. What is
found in a picture must not depend on its neighbours: the shape follows from its own."""


class Mtcnn:
    """The three networks on one device; `find` may be called by several threads."""

    name = "mtcnn"
    key = "mtcnn-facenet-pytorch-2.5.3-1"
    """Changes with whatever changes an answer: the weights, or the last number with this file."""
    side = 1280
    """Pixels of the long side from which on a picture is shown smaller."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Raises:
        ValueError: facenet-pytorch is not installed.
        """
        try:
            import facenet_pytorch
        except ImportError as error:
            raise ValueError("MTCNN needs facenet-pytorch: pip install 'facefast[detect]'") from error
        self.device = torch.device(device)
        networks: list[Any] = [facenet_pytorch.PNet(), facenet_pytorch.RNet(), facenet_pytorch.ONet()]
        for network in networks:  # channels last is 1.5 times as fast on a CPU
            network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self._propose, self._refine, self._finish = networks

    def find(self, pictures: Sequence[Picture]) -> list[Faces]:
        """Every face of each picture (uint8 [H, W, 3], RGB)."""
        shapes = [tuple(-(-side // STEP) * STEP for side in picture.shape[:2]) for picture in pictures]
        found: list[Faces] = [Faces.none()] * len(pictures)
        for shape in sorted(set(shapes)):
            places = [place for place, own in enumerate(shapes) if own == shape]
            with torch.inference_mode():
                for place, faces in zip(places, self._find([pictures[p] for p in places], shape), strict=True):
                    found[place] = faces
        return found

    def _find(self, pictures: list[Picture], shape: tuple[int, ...]) -> list[Faces]:
        batch = torch.zeros(len(pictures), 3, *shape)
        for place, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            # Copied: an array of PIL's may be read-only, which torch does not know.
            batch[place, :, :height, :width] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        batch = batch.to(self.device)
        boxes, owners = self._candidates(batch)
        for network, size, threshold in ((self._refine, 24, THRESHOLDS[1]), (self._finish, 48, THRESHOLDS[2])):
            answers = [network(part) for part in self._cut(batch, boxes, owners, size)]
            if not answers:
                return [Faces.none()] * len(pictures)
            moves, *points, probabilities = (torch.cat(values) for values in zip(*answers, strict=True))
            scores = probabilities[:, 1]
            kept = scores > threshold
            boxes, owners, scores, moves = boxes[kept], owners[kept], scores[kept], moves[kept]
            if size == 24:
                chosen = _distinct(boxes, scores, owners, 0.7)
                boxes, owners = _square(_moved(boxes[chosen], moves[chosen])), owners[chosen]
        relative = points[0][kept].view(-1, 2, 5)  # x of the five, then y
        sides = (boxes[:, 2:] - boxes[:, :2] + 1)[:, :, None]
        landmarks = (sides * relative + boxes[:, :2, None] - 1).transpose(1, 2)
        return _by_picture(_moved(boxes, moves), landmarks, scores, owners, len(pictures))

    def _candidates(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Square boxes [K, 4] in which the first network sees a face, and the picture [K] of each."""
        height, width = batch.shape[2:]
        scale = 12 / max(LEAST_FACE, max(height, width) * LEAST_PART)  # the network looks at 12 x 12 pixels
        boxes, scores, moves, groups = [], [], [], []
        source, levels = batch, 0
        while min(height, width) * scale >= 12:
            shape = (int(height * scale + 1), int(width * scale + 1))
            # Each level from the one before where that still has twice its pixels: the means are of means then.
            if source.shape[2] > 4 * shape[0]:
                source = F.avg_pool2d(source, 2)
            level = F.interpolate(source, size=shape, mode="area")
            move, probability = self._propose((level - 127.5) / 128)
            place = (probability[:, 1] >= THRESHOLDS[0]).nonzero()  # [n, 3] picture, line, column
            own, line, column = place.unbind(1)
            corner = torch.stack([column, line], 1).float() * 2 + 1
            boxes.append(torch.cat([(corner / scale).floor(), ((corner + 11) / scale).floor()], 1))
            scores.append(probability[own, 1, line, column])
            moves.append(move[own, :, line, column])
            groups.append(own + levels * len(batch))
            scale, levels = scale * FACTOR, levels + 1
        if not boxes:
            return batch.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=batch.device)
        box, score, step, group = (torch.cat(parts) for parts in (boxes, scores, moves, groups))
        first = _distinct(box, score, group, 0.5)  # within each level of each picture
        box, score, step, owner = box[first], score[first], step[first], group[first] % len(batch)
        second = _distinct(box, score, owner, 0.7)  # within each picture
        box, step = box[second], step[second]
        sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
        return _square(box + step * sides), owner[second]

    def _cut(self, batch: Tensor, boxes: Tensor, owners: Tensor, size: int) -> list[Tensor]:
        """The boxes' contents as means over their pixels, [k, 3, size, size] at a time; outside a picture is black."""
        from torchvision.ops import roi_align

        # A box counts pixels from 1 and includes its last one: as edges it begins one pixel earlier.
        edges = torch.cat([owners[:, None].float(), boxes[:, :2].trunc() - 1, boxes[:, 2:].trunc()], 1)
        return [
            (roi_align(batch, part, size, sampling_ratio=-1, aligned=True) - 127.5) / 128
            for part in edges.split(MOST_CANDIDATES)
            if len(part)
        ]


def _distinct(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float) -> Tensor:
    """Places of the best boxes of each group, none of which overlap by more."""
    from torchvision.ops import batched_nms

    chosen: Tensor = batched_nms(boxes, scores, groups, overlap)
    return chosen


def _moved(boxes: Tensor, moves: Tensor) -> Tensor:
    """Boxes [n, 4] whose edges move by parts of their sides."""
    return boxes + moves * (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)


def _square(boxes: Tensor) -> Tensor:
    """Boxes grown about their centres to squares."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centre, half = boxes[:, :2] + sides / 2, sides.amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], 1)


def _by_picture(boxes: Tensor, landmarks: Tensor, scores: Tensor, owners: Tensor, count: int) -> list[Faces]:
    box, points, score, owner = (values.cpu().numpy() for values in (boxes, landmarks, scores, owners))
    found = []
    for picture in range(count):
        rows = np.flatnonzero(owner == picture)
        rows = rows[np.argsort(-score[rows], kind="stable")]
        kept: list[int] = []
        for row in rows.tolist():  # a box within a better one is the same face
            if all(_part_in_common(box[row], box[other]) <= 0.7 for other in kept):
                kept.append(row)
        sizes = box[kept, 2:] - box[kept, :2] + 1
        found.append(Faces(np.concatenate([box[kept, :2] - 1, sizes], 1), points[kept], score[kept]))
    return found


def _part_in_common(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The common area of two boxes as a part of the smaller one."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]) + 1
    smaller = min(np.prod(one[2:] - one[:2] + 1), np.prod(other[2:] - other[:2] + 1))
    return float(np.prod(np.maximum(sides, 0)) / max(smaller, 1e-6))
