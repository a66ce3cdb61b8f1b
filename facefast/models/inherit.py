"""A shallower network that starts from the layers of a deeper one of its kind, as DistilBERT does (Sanh et al. 2019,
arXiv:1910.01108)."""

from __future__ import annotations

import torch

from facefast.models.face import FaceModel


@torch.no_grad()
def inherit(student: FaceModel, teacher: FaceModel) -> float:
    """Copies the teacher's layers that the student has too, the heads excepted; it sees what the teacher sees.

    Of a stage that has more blocks in the teacher, those at even distances are taken, the first and the last always:
    the first one changes the size, so that the others fit wherever they stood.

    Returns:
        The part of the student's numbers that are the teacher's now.

    Raises:
        ValueError: the two have not the same stages, or no layer in common.
    """
    own, theirs = student.blocks(), teacher.blocks()
    if own.keys() != theirs.keys():
        raise ValueError(
            f"{student.config.backbone} has the stages {', '.join(own)}, the teacher {teacher.config.backbone} "
            f"{', '.join(theirs)}: neither starts from the other's layers; choose a backbone of the teacher's kind, "
            "or start scratch"
        )
    given = teacher.state_dict()
    taken = total = 0
    for name, value in student.state_dict(keep_vars=True).items():
        part, _, rest = name.partition(".")
        # Names differ by the block's number alone: the same tensor of the block that stands for it in the teacher.
        if part == "backbone":
            stage, place = _place(rest, own)
            name = f"backbone.{_counterpart(place, own[stage], theirs[stage])}{rest.removeprefix(own[stage][place])}"
        elif part != "embedding":
            continue
        total += value.numel()
        other = given.get(name)
        if other is not None and other.shape == value.shape:
            value.copy_(other)
            taken += value.numel()
    student.add_layers({name: said for name, said in teacher.layers().items() if name == "smoothing"})
    if not taken:
        raise ValueError(
            f"{student.config.backbone} has no layer of the size that the teacher {teacher.config.backbone} has; "
            "choose a backbone of the teacher's kind and width, or start scratch"
        )
    return taken / total


def _place(name: str, blocks: dict[str, list[str]]) -> tuple[str, int]:
    """The stage and the block in it that a tensor belongs to."""
    return next(
        (stage, place)
        for stage, members in blocks.items()
        for place, member in enumerate(members)
        if name.startswith(member + ".") or name == member
    )


def _counterpart(place: int, own: list[str], theirs: list[str]) -> str:
    return theirs[round(place * (len(theirs) - 1) / max(1, len(own) - 1))]
