"""An ONNX file of ours as a model: what evaluates, predicts and enrolls by a checkpoint does so by its export.

ONNX Runtime computes the embeddings, on the CPU; names, thresholds and preprocessing come from the file's metadata, the
heads' weights from its constants. What stands here of the format is what `facefast.deploy.onnx_file` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facefast.models.backbones import Backbone
from facefast.models.build import require_numbers
from facefast.models.face import FINDINGS, FaceModel, require_format
from facefast.models.weights.source import INT8
from facefast.recipe import ImageSpec

__all__ = ["INT8"]
SUFFIX = ".onnx"
FORMAT = 2
KIND = f"facefast ONNX {FORMAT}"
INPUT, EMBEDDINGS, LENGTHS = "images", "embeddings", "lengths"
FLOAT, BYTES = "float32", "uint8"
"""Kinds of input: normalised pictures [B, 3, H, W], or faces [B, H, W, 3] of RGB bytes."""
HEADS = "facefast/"
"""What the names of the nodes that name people and tell attributes begin with."""
WEIGHTS = ("head.", "attribute_heads.")
"""What the names of those nodes' constants begin with."""
ENTRIES = ("backbone", "embedding", "head", "dropout", "scale", "image", "num_classes", "class_names", "attributes")
"""Entries of model.json that stand in the metadata beside FINDINGS."""
NEEDS = "ONNX files and int8 packages need ONNX's packages: pip install 'facefast[onnx]'"
ABSENT = "facefast reads what it exported itself (facefast export MODEL OUT.onnx)"


class Exported(nn.Module):
    """A network in ONNX, from normalised pictures to embeddings of their own length; it cannot learn.

    Args:
        content: the model's bytes, without heads.
        image: the pictures it takes.
        kind: its input, FLOAT or BYTES.

    Raises:
        ValueError: ONNX's packages are missing, or ONNX Runtime does not take it.
    """

    graph: Tensor

    def __init__(self, content: bytes, image: ImageSpec, kind: str) -> None:
        super().__init__()
        # A buffer, so that a state dict tells one export from another, as a gallery's fingerprint has to.
        self.register_buffer("graph", torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.image, self.kind = image, kind
        self._session = _session(content)
        height, width = image.shape
        wanted = [height, width, 3] if kind == BYTES else [3, height, width]
        given = {one.name: one.shape for one in self._session.get_inputs()}
        found = {one.name: one.shape for one in self._session.get_outputs()}
        if given.keys() != {INPUT} or given[INPUT][1:] != wanted or not {EMBEDDINGS, LENGTHS} <= found.keys():
            raise ValueError(f"its graph goes from {given} to {', '.join(found)}, not from pictures {wanted}")
        self.size = found[EMBEDDINGS][-1]
        if type(self.size) is not int or len(found[EMBEDDINGS]) != 2:
            raise ValueError(f"its embeddings have the shape {found[EMBEDDINGS]}, not [batch, numbers]")

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, D] float32, on the device of the pictures."""
        values = images.detach().float().cpu()
        if self.kind == BYTES:
            # Back to what a decoder gives: what is lost is the rounding to whole numbers.
            mean, std = torch.tensor(self.image.mean), torch.tensor(self.image.std)
            values = values.permute(0, 2, 3, 1) * std + mean
            values = values.flip(3) if self.image.color == "bgr" else values
            values = values.round().clamp(0, 255).to(torch.uint8)
        feed = {INPUT: np.ascontiguousarray(values.numpy())}
        embeddings, lengths = self._session.run([EMBEDDINGS, LENGTHS], feed)
        return torch.from_numpy(embeddings * lengths).to(images.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which cannot be copied."""
        return self.__dict__ | {"_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With a session of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._session = _session(self.graph.cpu().numpy().tobytes())


def is_onnx(path: Path) -> bool:
    """Whether a path is that of an ONNX file."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def is_exported(model: FaceModel) -> bool:
    """Whether a model is an ONNX file or an int8 package, from which nothing can be trained or exported."""
    return isinstance(model.backbone, Exported)


def read(path: Path, document: Mapping[str, Any] | None = None) -> FaceModel:
    """The model in an ONNX file that facefast wrote.

    Args:
        path: it.
        document: its model.json where it has one; by default its own metadata.

    Raises:
        ValueError: ONNX's packages are missing, another program wrote the file, it is damaged or of a newer format.
    """
    graph, said = _opened(path)
    if document is not None:
        require_format(document)
    try:
        described = model_document(said) if document is None else document
        require_format(described)
        weights = _without_heads(graph)
        network = Exported(graph.SerializeToString(), FaceModel.image_of(described), said.get("input_kind", ""))

        def build() -> FaceModel:
            return FaceModel.from_config(described, Backbone(network, network.size, {}, embeds=True))

        require_numbers(build, network.graph.numel() + sum(t.numel() for t in weights.values()), "its metadata")
        model = build()
        lacking, unknown = model.load_state_dict(weights, strict=False)
        lacking = [name for name in lacking if not name.startswith("backbone.")]
        if lacking or unknown:
            raise ValueError(f"weights of its heads are missing or too many: {', '.join([*lacking, *unknown])}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no export of facefast's: {error}"[:2000]) from error
    return model.eval()


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The JSON form of the recipe that the model in an ONNX file was trained with, None where it has none.

    Raises:
        ValueError: as `read`.
    """
    _, said = _opened(path)
    try:
        recipe = json.loads(said.get("recipe", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its recipe is no JSON: {error}") from error
    if not isinstance(recipe, dict | None):
        raise ValueError(f"{path}: its recipe is {recipe!r:.80}, no object")
    return recipe


def model_document(said: Mapping[str, str]) -> dict[str, Any]:
    """model.json out of the metadata of an ONNX file.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry is no JSON.
    """
    names = [*ENTRIES, *(name for name in FINDINGS if name in said)]
    texts = ("backbone", "head")
    entries = {name: said[name] if name in texts else json.loads(said[name]) for name in names}
    return {"format": json.loads(said["model_format"]), **entries}


def _opened(path: Path) -> tuple[Any, dict[str, str]]:
    """The model and its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 -- it will be needed
    except ImportError as error:
        raise ValueError(f"{path}: {NEEDS}") from error
    try:
        graph = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own
        raise ValueError(f"{path} is no ONNX file: {error}") from error
    said = {entry.key: entry.value for entry in graph.metadata_props}
    program, _, number = said.get("format", "").rpartition(" ")
    if program != KIND.rpartition(" ")[0] or not number.isdigit():
        raise ValueError(f"{path} does not say what its pictures and answers are; {ABSENT}")
    if int(number) != FORMAT:
        later = "use the facefast that wrote it, or a later one" if int(number) > FORMAT else "export the model anew"
        raise ValueError(f"{path} has format {said['format']!r}; this facefast reads {KIND!r}; {later}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer):
        raise ValueError(f"{path} keeps its weights in other files; {ABSENT}")
    return graph, said


def _without_heads(model: Any) -> dict[str, Tensor]:
    """Takes the heads out of a model, and gives their weights by the names of a state dict.

    Left in, they would be computed for every picture and lie in memory twice.
    """
    from onnx import numpy_helper

    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.name.startswith(WEIGHTS)}
    found = {name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for name, tensor in weights.items()}
    for field, kept in (
        (graph.node, [node for node in graph.node if not node.name.startswith(HEADS)]),
        (graph.initializer, [t for t in graph.initializer if not t.name.startswith((*WEIGHTS, HEADS))]),
        (graph.output, [output for output in graph.output if output.name in (EMBEDDINGS, LENGTHS)]),
    ):
        copies = [type(one).FromString(one.SerializeToString()) for one in kept]
        del field[:]
        field.extend(copies)
    del model.metadata_props[:]
    return found


def _session(content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(NEEDS) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: its warnings are about the exporter's graph, not about the user's model
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise ValueError(f"ONNX Runtime does not take it: {error}") from error
