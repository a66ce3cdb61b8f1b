"""The number format that "auto" comes to, which one typed is kept, and what a model is then run in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facefast.models import checkpoint, precision
from facefast.models.backbones import DEPTHWISE, NAMES
from facefast.models.precision import Precision
from facefast.recipe import Recipe, to_json
from tests.support import small

CPU = torch.device("cpu")


def test_auto_is_the_fast_one_of_this_machine() -> None:
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    for backbone, gains in (("resnet18", True), ("mobilefacenet", False), ("mobilefacenet_short", False)):
        chosen = Precision.choose("auto", backbone, True, CPU)
        assert chosen.name == ("bf16" if native and gains else "fp32")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("backbone", [*NAMES, "timm/vit_tiny_patch16_224"])
def test_depthwise_networks_stay_in_full_precision_on_every_cpu(
    backbone: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    chosen = Precision.choose("auto", backbone, True, CPU)
    assert chosen.name == ("bf16" if native and backbone not in DEPTHWISE else "fp32")
    assert Precision.choose("auto", backbone, True, torch.device("cuda")).name == "bf16"  # where all of them gain


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_what_was_typed_is_kept(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda native=native: native)
        for backbone in ("mobilefacenet", "resnet18"):
            for channels_last in (True, False):
                chosen = Precision.choose(name, backbone, channels_last, CPU)
                assert chosen == (name, dtype, channels_last)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_arithmetic_inside_the_context_is_in_the_chosen_format(name: str, dtype: torch.dtype) -> None:
    chosen = Precision.choose(name, "resnet18", True, CPU)
    with chosen.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def save_run(folder: Path, backbone: str, **fields: object) -> Path:
    """A run whose recipe has these fields."""
    model = small.make_model(backbone)
    recipe = to_json(small.make_recipe(Path("nowhere"), model)) | fields
    for name, value in fields.items():
        if value is None:
            del recipe[name]
    return small.save_as(folder, model, recipe)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"precision": "auto"}, ("bf16", Recipe.channels_last)),
        ({"precision": "fp32", "channels_last": False}, ("fp32", False)),
        ({"precision": None, "channels_last": None}, ("bf16", Recipe.channels_last)),  # of an older run
    ],
)
def test_a_trained_model_is_run_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], expected: tuple[str, bool]
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    run = save_run(tmp_path / "run", "resnet18", **fields)
    for path in (run, run / "checkpoints" / "best"):
        chosen = checkpoint.precision_of(path, checkpoint.load_model(path))
        assert (chosen.name, chosen.channels_last) == expected


def test_weights_without_a_recipe_are_run_by_what_they_really_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    (tmp_path / "weights.pt").touch()
    for backbone, name in (("mobilefacenet", "fp32"), ("resnet18", "bf16")):
        assert checkpoint.precision_of(tmp_path / "weights.pt", small.make_model(backbone)).name == name
