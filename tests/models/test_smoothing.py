"""A blur ahead of the network: what it does to pictures, and that it goes wherever the model goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from facefast.deploy import package
from facefast.deploy.gallery import fingerprint
from facefast.models import FaceModel, build_model, exported, inherit, load_source
from facefast.models.build import without_memory
from facefast.models.checkpoint import load_model
from facefast.models.smoothing import LIGHTNESS, Deviations, Smoothing
from facefast.recipe import ImageSpec, ModelConfig

IMAGE = ImageSpec(size=112, width=96, mean=(120.0, 100.0, 90.0), std=(60.0, 50.0, 70.0), color="rgb").settled()

SOME = Deviations(1.2, 4.0)


def pictures(image: ImageSpec = IMAGE, batch: int = 2) -> torch.Tensor:
    """[B, 3, H, W] levels of 255."""
    return 255 * torch.rand(batch, 3, *image.shape, generator=torch.Generator().manual_seed(4))


def smoothed(levels: torch.Tensor, deviations: Deviations, image: ImageSpec = IMAGE) -> torch.Tensor:
    """Levels to levels, by way of normalised pictures."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (image.mean, image.std))
    found: torch.Tensor = Smoothing(image, deviations)((levels - mean) / std)
    return found * std + mean


def model_of(deviations: Deviations | None = SOME, size: int = 32) -> FaceModel:
    torch.manual_seed(1)
    image = ImageSpec(size=size).settled()
    model = build_model(ModelConfig(backbone="mobilefacenet"), 0, image).eval()
    if deviations is not None:
        model.smoothing = Smoothing(image, deviations)
    return model


@pytest.mark.parametrize("deviation", [0.7, 1.2, 3.0])
def test_all_of_a_picture_is_blurred_as_torchvision_blurs_it(deviation: float) -> None:
    levels = pictures()
    wanted = gaussian_blur(levels, [2 * round(4 * deviation + 1) + 1] * 2, [deviation] * 2)
    torch.testing.assert_close(smoothed(levels, Deviations(deviation, deviation)), wanted, rtol=0, atol=0.05)


def test_lightness_and_colour_are_blurred_apart() -> None:
    levels = pictures()
    share = torch.tensor(LIGHTNESS).view(1, 3, 1, 1)
    light = (levels * share).sum(1, keepdim=True)

    def of(planes: torch.Tensor, deviation: float) -> torch.Tensor:
        found: torch.Tensor = gaussian_blur(planes, [41, 41], [deviation] * 2)
        return found

    found = smoothed(levels, Deviations(1.5, 4.0))
    torch.testing.assert_close(found, of(light, 1.5) + of(levels - light, 4.0), rtol=0, atol=0.05)
    found = smoothed(levels, Deviations(0.0, 4.0))
    torch.testing.assert_close((found * share).sum(1, keepdim=True), light, rtol=0, atol=1e-3)
    found = smoothed(levels, Deviations(1.5, 0.0))
    torch.testing.assert_close(found, of(light, 1.5) + levels - light, rtol=0, atol=0.05)


def test_one_colour_stays_what_it_is_to_the_edge() -> None:
    levels = torch.tensor([10.0, 200.0, 90.0]).view(1, 3, 1, 1).expand(1, 3, *IMAGE.shape)
    torch.testing.assert_close(smoothed(levels, Deviations(2.5, 16.0)), levels, rtol=0, atol=1e-3)


def test_the_order_of_channels_changes_nothing() -> None:
    mean, std = [(values[2], values[1], values[0]) for values in (IMAGE.mean, IMAGE.std)]
    reverse = ImageSpec(size=112, width=96, mean=mean, std=std, color="bgr").settled()
    levels = pictures()
    found = smoothed(levels.flip(1), Deviations(1.2, 4.0), reverse)
    torch.testing.assert_close(found.flip(1), smoothed(levels, Deviations(1.2, 4.0)), rtol=0, atol=1e-3)


def test_deviations_are_of_a_picture_112_pixels_high() -> None:
    double = ImageSpec(size=224).settled()
    levels = pictures(double)
    wanted = gaussian_blur(levels, [33, 33], [3.0, 3.0])
    torch.testing.assert_close(smoothed(levels, Deviations(1.5, 1.5), double), wanted, rtol=0, atol=0.05)


def test_sixteen_bits_blur_as_exactly_as_they_hold_a_picture() -> None:
    layer, images = Smoothing(IMAGE, Deviations(1.2, 4.0)), pictures() / 128 - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(images)
    assert torch.equal(found, layer(images))


@pytest.mark.parametrize(
    "said",
    [
        True,
        [1.0, 2.0],
        {"luma": 1.0},
        {"luma": "1", "chroma": 2},
        {"luma": True, "chroma": 1},
        {"luma": -1, "chroma": 0},
        {"luma": float("nan"), "chroma": 1},
        {"luma": 1e9, "chroma": 1},
    ],
)
def test_a_damaged_description_is_refused(said: object) -> None:
    document = model_of().to_config() | {"smoothing": said}
    with pytest.raises(ValueError, match="smoothing|deviations"):
        FaceModel.from_config(document)


def test_models_without_it_are_described_as_before() -> None:
    assert "smoothing" not in model_of(None).to_config()


@torch.no_grad()
def test_a_checkpoint_a_package_and_every_export_give_the_smoothed_embeddings(tmp_path: Path) -> None:
    model = model_of()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    wanted = model.embed(images)
    assert (wanted - model_of(None).embed(images)).abs().max() > 1e-2
    package.export(model, "safetensors", tmp_path / "package")
    package.export(model, "onnx", tmp_path / "floats.onnx")
    package.export(model, "onnx", tmp_path / "bytes.onnx", kind=exported.BYTES)
    for name in ("package", "floats.onnx", "bytes.onnx"):
        found = load_model(tmp_path / name).eval().embed(images)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=name)
    package.export(model, "torch", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(model.preprocess(images)), model.embed(images, mirror=False), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["mobilefacenet", "resnet18"])
def test_a_model_that_another_training_starts_from_brings_its_layers_along(tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(1)
    image = ImageSpec(size=64).settled()
    model = build_model(ModelConfig(backbone=backbone), 0, image).eval()
    model.add_layers({"smoothing": {"luma": 1.2, "chroma": 4.0}, "linear_map": True})
    assert model.linear_map is not None
    model.linear_map.weight.mul_(0.5).add_(0.1)
    package.export(model, "safetensors", tmp_path / "package")
    again = build_model(ModelConfig(), 3, source=load_source(tmp_path / "package")).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.encode(images), model.encode(images))
    assert again.report is not None and not again.report.unused


def test_a_gallery_of_the_model_without_its_layers_is_another_models() -> None:
    plain, blurred, more = model_of(None), model_of(), model_of(Deviations(1.2, 4.5))
    mapped = model_of(None)
    mapped.add_linear_map()
    turned = model_of(None)
    turned.add_linear_map()
    assert turned.linear_map is not None
    with torch.no_grad():
        turned.linear_map.weight.neg_()
    assert len({fingerprint(each) for each in (plain, blurred, more, mapped, turned)}) == 5


def test_a_student_that_takes_over_layers_sees_what_its_teacher_sees() -> None:
    student, teacher = model_of(None), model_of()
    inherit(student, teacher)
    assert student.layers() == teacher.layers()
    with without_memory():  # as it is found out whether the two fit each other
        inherit(model_of(None), teacher)


def test_insightface_has_no_such_layer_and_is_told_so(tmp_path: Path) -> None:
    model = build_model(ModelConfig(backbone="iresnet18"), 0, ImageSpec(size=112)).eval()
    model.smoothing = Smoothing(model.image, Deviations(1.0, 4.0))
    with pytest.raises(ValueError, match="no layer for the model's smoothing"):
        package.export(model, "insightface", tmp_path / "backbone.pth")
