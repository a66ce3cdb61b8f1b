"""Students that start from their teacher's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from facefast import train
from facefast.models import STUDENTS, FaceModel, build_model, inherit
from facefast.models.backbones import build_backbone
from facefast.recipe import ImageSpec, ModelConfig
from tests.support import small


def student_of(backbone: str, embedding: int = 16) -> FaceModel:
    torch.manual_seed(5)
    image = ImageSpec(size=small.SIZE, template="arcface")
    return build_model(ModelConfig(backbone=backbone, embedding=embedding), 3, image).eval()


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        (
            "mobilefacenet",
            "mobilefacenet_short",
            {0: 0, 1: 2, 2: 4, 3: 5, 4: 7, 5: 9, 6: 11, 7: 12, 8: 14},
        ),
        ("iresnet34", "iresnet18", {(3, 0): (3, 0), (3, 1): (3, 5), (1, 1): (1, 2)}),
        ("adaface_ir50", "adaface_ir18", {0: 0, 1: 2, 2: 3, 3: 6, 4: 7, 5: 20, 6: 21, 7: 23}),
    ],
)
def test_blocks_at_even_distances_are_taken_over(teacher: str, student: str, pairs: dict[Any, Any]) -> None:
    theirs, own = small.make_model(teacher), student_of(student)
    head = {name: value.clone() for name, value in own.get_submodule("head").state_dict().items()}
    assert inherit(own, theirs) == 1
    states = own.backbone.state_dict(), theirs.backbone.state_dict()
    for mine, yours in pairs.items():
        if "iresnet" in teacher:
            prefixes = [f"layer{stage}.{block}." for stage, block in (mine, yours)]
        else:
            prefixes = [f"{'blocks' if 'mobile' in teacher else 'body'}.{k}." for k in (mine, yours)]
        tensors = [
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for state, prefix in zip(states, prefixes, strict=True)
        ]
        assert tensors[0].keys() == tensors[1].keys() and tensors[0]
        for name, value in tensors[0].items():
            assert torch.equal(value, tensors[1][name]), (mine, name)
    assert all(torch.equal(value, head[name]) for name, value in own.get_submodule("head").state_dict().items())


def test_a_twin_gives_the_teachers_embeddings_its_own_embedding_layer_included() -> None:
    images = torch.randn(3, 3, small.SIZE, small.SIZE)
    for backbone in ("mobilefacenet", "resnet18"):  # the second has its embedding layer beside the backbone
        teacher, twin = small.make_model(backbone), student_of(backbone)
        assert inherit(twin, teacher) == 1
        assert_close(twin.encode(images), teacher.encode(images))


def test_only_layers_of_the_same_size_are_taken_over() -> None:
    teacher, student = small.make_model("mobilefacenet"), student_of("mobilefacenet_short", embedding=8)
    before = student.backbone.get_parameter("linear1.conv.weight").clone()
    assert 0.9 < inherit(student, teacher) < 1
    assert torch.equal(student.backbone.get_parameter("linear1.conv.weight"), before)
    mine, yours = (model.backbone.get_parameter("conv2.conv.weight") for model in (student, teacher))
    assert torch.equal(mine, yours)


def test_a_student_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet18 has the stages .*mobilefacenet.*neither starts from the other's"):
        inherit(student_of("resnet18"), small.make_model("mobilefacenet"))
    with pytest.raises(ValueError, match=r"vit_tiny.* start teacher takes over; use start scratch"):
        inherit(student_of("timm/vit_tiny_patch16_224"), small.make_model("mobilefacenet"))


def test_a_teacher_of_another_kind_is_refused_before_photographs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photographs").mkdir()  # none: what is read first complains
    torch.save(build_backbone("mobilefacenet", (112, 112), 128).module.state_dict(), tmp_path / "teacher.pt")
    words = ["distill", f"--data.root={tmp_path / 'photographs'}", f"--model.teacher={tmp_path / 'teacher.pt'}"]
    for backbone, message in (("resnet18", "neither starts from the other's layers"), ("auto", "photographs")):
        assert train.main([*words, f"--model.backbone={backbone}", f"--out={tmp_path / backbone}"]) != 0
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("teacher", "student"), STUDENTS.items())
def test_every_students_tensors_have_a_counterpart_of_their_size(teacher: str, student: str) -> None:
    with torch.device("meta"):
        models = [build_model(ModelConfig(backbone=name), 0, ImageSpec(size=64)) for name in (student, teacher)]
        sizes = [sum(p.numel() for p in build_backbone(n, (64, 64)).module.parameters()) for n in (student, teacher)]
    assert sizes[0] < sizes[1]
    assert inherit(*models) == 1
