"""A model that leaves the project, each form read back and compared before it counts."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facefast.models import FaceModel, checkpoint
from facefast.models.face import FINDINGS
from facefast.runtime import files, manifest

LEAST_COSINE = 0.9999
"""Between the embeddings of the model and of its export."""
OTHER = "choose another OUT, or make room"


PACKAGE = ("model.json", "model.safetensors", "recipe.json", "manifest.json")
"""The files of an exported folder."""


class Embedder(nn.Module):
    """What is exported: normalised pictures [B, 3, H, W] to embeddings [B, D] of length 1, picture only."""

    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 to [B, D] float32."""
        return nn.functional.normalize(self.model.encode(images).float(), dim=1)


def export(model: FaceModel, to: str, out: Path, recipe: dict[str, Any] | None = None) -> None:
    """Writes `model` (in evaluation mode, on the CPU) to `out` and checks what was written.

    Args:
        to: onnx, torch or safetensors.
        recipe: the JSON form of the recipe that the model was trained with, for the safetensors folder.

    Raises:
        ValueError: a package for the format is missing, the folder holds something else, or the export's embeddings
            differ.
        StorageError: `out` cannot be written. After any error what was there is as it was.
    """
    if to not in ("onnx", "torch", "safetensors"):
        raise ValueError(f"there is no export to {to!r}; it must be onnx, torch or safetensors")
    files.require_writable(out, folder=to == "safetensors", advice=OTHER)
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    with _quiet():
        if to == "safetensors":
            _refuse_others(out)
            with files.replacing_folder(out, needed, OTHER) as aside:
                _export(model, to, aside, recipe, out)
        else:
            with files.replacing(out, needed, OTHER, parents=True) as aside:
                _export(model, to, aside, recipe, out)
    if to == "onnx" and out.is_file():  # no pipe
        with files.storing(out):
            files.write_json(out.with_suffix(".json"), described(model))


def described(model: FaceModel) -> dict[str, Any]:
    """What whoever runs an ONNX file has to know: how pictures become its input, and what its output means."""
    height, width = model.image.shape
    return {
        "format": "facefast ONNX 1",
        "input": f"images, float32 [batch, 3, {height}, {width}]: (pixel - mean) / std of 0..255 values, in the order "
        "of color, aligned to template",
        "output": f"embeddings, float32 [batch, {model.embedding_size}] of length 1; add those of the mirror image "
        "and normalise for the scores that thresholds are about",
        **{name: model.to_config()["image"][name] for name in ("mean", "std", "color", "template")},
        "class_names": list(model.class_names),
        **{name: getattr(model, name) for name in FINDINGS},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out torch's warnings about its own exporter, on which a user cannot act."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        yield


def _export(model: FaceModel, to: str, aside: Path, recipe: dict[str, Any] | None, out: Path) -> None:
    """Writes to `aside`, which becomes `out` where it gives the model's embeddings."""
    embedder = Embedder(model).eval()
    height, width = model.image.shape
    # Two pictures: an exporter takes a size of 1 for a constant, and the batch must stay free.
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    batch: dict[str, dict[int, Any]] = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    if to == "safetensors":
        write_package(model, aside, recipe)
        found = Embedder(checkpoint.load_model(aside))(images)
    elif to == "torch":
        program = torch.export.export(embedder, (images,), dynamic_shapes=batch)
        # By way of memory: torch's own writer ends the whole process where a disk is full.
        content = io.BytesIO()
        torch.export.save(program, content)
        aside.write_bytes(content.getbuffer())
        with open(aside, "rb") as file:
            found = torch.export.load(file).module()(images)
    else:
        found = _to_onnx(embedder, images, batch, aside, described(model))
    with torch.inference_mode():
        cosine = float((embedder(images) * found).sum(1).min())  # of two vectors of length 1
    if not cosine >= LEAST_COSINE:
        raise ValueError(f"{out} gives other embeddings than the model: cosine {cosine:.6f}, at least {LEAST_COSINE}")


def _to_onnx(
    embedder: Embedder, images: Tensor, batch: dict[str, dict[int, Any]], out: Path, description: dict[str, Any]
) -> Tensor:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch's exporter needs it and would fail later, less clearly
    except ImportError as error:
        raise ValueError("--to onnx needs ONNX's packages: pip install 'facefast[onnx]'") from error
    torch.onnx.export(
        embedder,
        (images,),
        out,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=batch,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    graph = onnx.load(out)
    onnx.helper.set_model_props(
        graph, {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}
    )
    onnx.save(graph, out)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_package(model: FaceModel, out: Path, recipe: dict[str, Any] | None = None) -> None:
    """A folder of model.json, model.safetensors, manifest.json and, where there is one, recipe.json.

    Only the recipe tells the pictures that the model was trained on from those kept for testing.

    Raises:
        ValueError: the folder holds something else, which the manifest would take for a part of the model.
    """
    out.mkdir(parents=True, exist_ok=True)
    _refuse_others(out)
    (out / "recipe.json").unlink(missing_ok=True)  # of another model, where this one has none
    if recipe is not None:
        files.write_json(out / "recipe.json", _without_paths(recipe))
    files.write_json(out / "model.json", model.to_config())
    checkpoint.write_tensors(out / "model.safetensors", model.state_dict())
    manifest.write(out, step=0)  # last: it hashes the others


def _refuse_others(out: Path) -> None:
    others = sorted(file.name for file in out.iterdir() if file.name not in PACKAGE) if out.is_dir() else []
    if others:
        raise ValueError(f"{out} holds {others[0]}, which is no part of a model; choose an empty folder")


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths of its owner's photographs and weights."""
    model, data = recipe["model"], recipe["data"] | {"root": ""}
    cleaned = recipe | {
        "data": data
        | {name: empty for name, empty in (("more", []), ("corrections", ""), ("labels", "")) if name in data},
        "model": model | {name: Path(model[name]).name for name in ("source", "teacher") if name in model},
    }
    if "binary" in recipe:
        negatives = Path(recipe["binary"]["negatives"]).name
        cleaned["binary"] = recipe["binary"] | {"negatives": negatives}
    return cleaned
