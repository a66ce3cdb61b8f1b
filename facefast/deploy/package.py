"""A model that leaves the project, each form read back and compared before it counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facefast.deploy import onnx_file
from facefast.deploy.onnx_file import Embedder, example
from facefast.models import FaceModel, checkpoint, exported, iresnet
from facefast.models.face import FINDINGS
from facefast.models.weights.layouts import ARCFACE_IMAGE
from facefast.runtime import files, manifest

LEAST_COSINE = 0.9999
"""Between the embeddings of the model and of its export."""
OTHER = "choose another OUT, or make room"
KINDS = ("onnx", "torch", "safetensors", "insightface")

PACKAGE = ("model.json", "model.safetensors", "recipe.json", "manifest.json")
"""The files of an exported folder."""
INSIGHTFACE = (*iresnet.DEPTHS, "insightface_mbf")
"""Networks that InsightFace's arcface_torch has, by our names."""


def export(
    model: FaceModel, to: str, out: Path, recipe: dict[str, Any] | None = None, kind: str = exported.FLOAT
) -> None:
    """Writes `model` (in evaluation mode, on the CPU) to `out` and checks what was written.

    Args:
        to: onnx, torch, safetensors or insightface.
        recipe: the JSON form of the recipe that the model was trained with, for ONNX and the safetensors folder.
        kind: what an ONNX file takes: FLOAT, normalised pictures, or BYTES, as a decoder gives them.

    Raises:
        ValueError: a package for the format is missing, the folder holds something else, the model is an export itself
            or not of a kind that the format has, or the export's embeddings differ.
        StorageError: `out` cannot be written. After any error what was there is as it was.
    """
    if to not in KINDS:
        raise ValueError(f"there is no export to {to!r}; it must be {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind != exported.FLOAT and to != "onnx":
        raise ValueError(f"an export to {to} takes {exported.FLOAT}; input {kind} is for onnx")
    require_weights(model, "exported")
    if to == "insightface":
        require_insightface(model)
    if to in ("onnx", "insightface") and out.suffix == ".json":
        raise ValueError(f"{out} is where the description of the export would go; choose another ending than .json")
    if (
        to == "onnx" and out.suffix.lower() != exported.SUFFIX and (out.is_file() or not out.exists())
    ):  # a pipe has none
        raise ValueError(
            f"{out} does not end in {exported.SUFFIX}, by which commands know such a file; give {out}.onnx"
        )
    files.require_writable(out, folder=to == "safetensors", advice=OTHER)
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    with onnx_file.quiet():
        if to == "safetensors":
            _refuse_others(out)
            with files.replacing_folder(out, needed, OTHER) as aside:
                write_package(model, aside, recipe)
                _check(model, Embedder(checkpoint.load_model(aside))(example(model)), out)
            return
        with files.replacing(out, needed, OTHER, parents=True) as aside:
            said = {"onnx": _to_onnx, "torch": _to_torch, "insightface": _to_insightface}[to](
                model, aside, out, kind, without_paths(recipe)
            )
    if said is not None and out.is_file():  # no pipe
        with files.storing(out):
            files.write_json(out.with_suffix(".json"), said)


def require_weights(model: FaceModel, done: str) -> None:
    """Refuses a model that is an export itself.

    Args:
        model: it.
        done: what cannot be done with it.

    Raises:
        ValueError: saying what to give instead.
    """
    if exported.is_exported(model):
        raise ValueError(
            f"an ONNX file or an int8 package cannot be {done}: its weights are folded or whole numbers; give the run, "
            "the checkpoint or the safetensors package that it was made from"
        )


def _check(model: FaceModel, found: Tensor, out: Path, kind: str = exported.FLOAT) -> None:
    """Refuses embeddings [2, D] of `example` that are not the model's."""
    with torch.inference_mode():
        cosine = float((Embedder(model, kind).eval()(example(model, kind)) * found).sum(1).min())  # of length 1 each
    if not cosine >= LEAST_COSINE:
        raise ValueError(f"{out} gives other embeddings than the model: cosine {cosine:.6f}, at least {LEAST_COSINE}")


def _to_torch(model: FaceModel, aside: Path, out: Path, kind: str, recipe: dict[str, Any] | None) -> None:
    program = torch.export.export(Embedder(model).eval(), (example(model),), dynamic_shapes=onnx_file.any_batch())
    # By way of memory: torch's own writer ends the whole process where a disk is full.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"model.json": json.dumps(model.to_config())})
    aside.write_bytes(content.getbuffer())
    with open(aside, "rb") as file:
        _check(model, torch.export.load(file).module()(example(model)), out)


def _to_onnx(model: FaceModel, aside: Path, out: Path, kind: str, recipe: dict[str, Any] | None) -> dict[str, Any]:
    graph = onnx_file.network_of(model, kind)
    said = onnx_file.complete(graph, model, kind, recipe)
    aside.write_bytes(graph.SerializeToString())

    import onnxruntime

    session = onnxruntime.InferenceSession(aside, providers=["CPUExecutionProvider"])
    found = session.run([exported.EMBEDDINGS], {exported.INPUT: example(model, kind).numpy()})
    _check(model, torch.from_numpy(found[0]), out, kind)
    return said


def require_insightface(model: FaceModel) -> None:
    """Refuses a model that InsightFace has no network for, or that takes other pictures than InsightFace gives it.

    Raises:
        ValueError: naming what differs.
    """
    if model.config.backbone not in INSIGHTFACE:
        raise ValueError(
            f"InsightFace has no {model.config.backbone}; it has {', '.join(INSIGHTFACE)}: export to onnx, torch or "
            "safetensors"
        )
    if model.layers():
        raise ValueError(
            f"InsightFace's {model.config.backbone} has no layer for the model's {' and '.join(model.layers())}: "
            "export to onnx, torch or safetensors"
        )
    ours, theirs = model.image, ARCFACE_IMAGE.settled()
    fields = ("shape", "mean", "std", "color", "template")
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in fields}
    differs = [f"{name} {one}, not {other}" for name, (one, other) in pairs.items() if one != other]
    if differs:
        raise ValueError(
            f"InsightFace gives its networks other pictures than the model takes ({'; '.join(differs)}), and its files "
            "say nothing of pictures: export to onnx, which does"
        )


def insightface_state(model: FaceModel) -> dict[str, Tensor]:
    """The tensors of a model by the names that InsightFace's arcface_torch gives them, without classes.

    Ours are theirs (`facefast.models.iresnet`, `facefast.models.insightface_mbf`): what is left out is the prefix.
    """
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.backbone.state_dict().items()}


def _to_insightface(
    model: FaceModel, aside: Path, out: Path, kind: str, recipe: dict[str, Any] | None
) -> dict[str, Any]:
    """A `backbone.pth` as arcface_torch's `torch.save(backbone.module.state_dict(), path)` writes it."""
    content = io.BytesIO()
    torch.save(insightface_state(model), content)
    aside.write_bytes(content.getbuffer())
    read = checkpoint.load_model(aside)
    found = Embedder(read).eval()(example(model))
    _check(model, found, out)
    with torch.inference_mode():
        if read.config.backbone != model.config.backbone or not torch.equal(found, Embedder(model)(example(model))):
            raise ValueError(f"{out} was read back as another model, a {read.config.backbone}")
    config = model.to_config()
    return {
        "format": "InsightFace arcface_torch state dict",
        "network": model.config.backbone,
        "num_features": model.embedding_size,
        **{name: config["image"][name] for name in ("mean", "std", "color", "template")},
        "class_names": config["class_names"],
        **{name: config[name] for name in FINDINGS},
    }


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
        files.write_json(out / "recipe.json", without_paths(recipe))
    files.write_json(out / "model.json", model.to_config())
    checkpoint.write_tensors(out / "model.safetensors", model.state_dict())
    manifest.write(out, step=0)  # last: it hashes the others


def _refuse_others(out: Path) -> None:
    others = sorted(file.name for file in out.iterdir() if file.name not in PACKAGE) if out.is_dir() else []
    if others:
        raise ValueError(f"{out} holds {others[0]}, which is no part of a model; choose an empty folder")


_OWNERS = {"more": [], "corrections": "", "labels": "", "cache": "", "cache_gib": 0.0}
"""Of a recipe's data, what is of its owner's machine, and what stands for it elsewhere."""


def without_paths(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """A recipe without the paths of its owner's photographs and weights; None for None."""
    if recipe is None:
        return None
    model, data = recipe["model"], recipe["data"] | {"root": ""}
    cleaned = recipe | {
        "data": data | {name: empty for name, empty in _OWNERS.items() if name in data},
        "model": model | {name: Path(model[name]).name for name in ("source", "teacher") if name in model},
    }
    if "binary" in recipe:
        negatives = Path(recipe["binary"]["negatives"]).name
        cleaned["binary"] = recipe["binary"] | {"negatives": negatives}
    return cleaned
