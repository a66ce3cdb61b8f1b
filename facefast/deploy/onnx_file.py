"""A face model as one ONNX file: the network, the heads behind it, and metadata that say what goes in and comes out.

`facefast.models.exported` reads it, and has the names that both use.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from facefast.models import FaceModel, exported
from facefast.models.face import FINDINGS
from facefast.models.heads import AttributeHeads, CosineHead, unit

SHORTEST = 1e-12
OPSET = 18
MOST = 4096
"""Pictures in a batch that the exporter is told of."""


class Embedder(nn.Module):
    """What is exported: pictures to embeddings [B, D] of length 1, picture only.

    Args:
        model: it.
        kind: FLOAT takes normalised pictures [B, 3, H, W], BYTES aligned faces [B, H, W, 3] as RGB bytes.
    """

    def __init__(self, model: FaceModel, kind: str = exported.FLOAT) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 or [B, H, W, 3] uint8 to [B, D] float32."""
        return self.measured(images)[0]

    def measured(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] of length 1, and the lengths [B, 1] that they had."""
        if self.kind == exported.BYTES:
            images = images.permute(0, 3, 1, 2).to(torch.float32)
            if self.model.image.color == "bgr":
                images = images.flip(1)
            images = (images - self.model.pixel_mean) / self.model.pixel_std
        embeddings = self.model.encode(images).float()
        lengths = embeddings.norm(dim=1, keepdim=True).clamp_min(SHORTEST)
        return embeddings / lengths, lengths


class _Measured(nn.Module):
    """`Embedder.measured` as a module of its own, which is what torch exports."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `Embedder.measured`."""
        return self.embedder.measured(images)


def example(model: FaceModel, kind: str = exported.FLOAT) -> Tensor:
    """Two pictures as an export of `kind` takes them, drawn from numbers: an exporter takes a size of 1 for a constant,
    and the batch must stay free."""
    height, width = model.image.shape
    generator = torch.Generator().manual_seed(0)
    if kind == exported.BYTES:
        return torch.randint(0, 256, (2, height, width, 3), generator=generator, dtype=torch.uint8)
    return torch.randn(2, 3, height, width, generator=generator)


def any_batch() -> dict[str, dict[int, Any]]:
    """The shapes that stay free."""
    return {"images": {0: torch.export.Dim("batch", min=1, max=MOST)}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out torch's warnings about its own exporters, on which a user cannot act."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        yield


def network_of(model: FaceModel, kind: str = exported.FLOAT) -> Any:
    """The ONNX graph from pictures to embeddings and lengths, without heads and metadata.

    Raises:
        ValueError: ONNX's packages are missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 -- whoever exports will check
        import onnxscript  # noqa: F401 -- torch's exporter needs it and would fail later, less clearly
    except ImportError as error:
        raise ValueError("--to onnx needs ONNX's packages: pip install 'facefast[onnx]'") from error
    with quiet():
        program = torch.onnx.export(
            _Measured(Embedder(model, kind)).eval(),
            (example(model, kind),),
            input_names=[exported.INPUT],
            output_names=[exported.EMBEDDINGS, exported.LENGTHS],
            dynamic_shapes=any_batch(),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    return graph


def complete(
    graph: Any, model: FaceModel, kind: str = exported.FLOAT, recipe: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Adds the model's heads and the metadata to a graph of `network_of`, quantised or not.

    Args:
        graph: it; changed.
        model: whose it is.
        kind: of its input.
        recipe: the JSON form of the recipe that the model was trained with, without its owner's paths.

    Returns:
        The metadata as a JSON value.
    """
    from onnx import helper

    _add_heads(graph.graph, model)
    said = described(model, kind, recipe)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}
    helper.set_model_props(graph, texts)
    return said


def described(model: FaceModel, kind: str = exported.FLOAT, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    """What whoever runs an ONNX file has to know: how pictures become its input, and what its outputs mean."""
    height, width = model.image.shape
    config = model.to_config()
    aligned = f"a face aligned to template {model.image.template}"
    given = {
        exported.FLOAT: f"images, float32 [batch, 3, {height}, {width}]: (pixel - mean) / std of 0..255 values of "
        f"{aligned}, in the order of color",
        exported.BYTES: f"images, uint8 [batch, {height}, {width}, 3]: red, green, blue, 0..255, of {aligned}; mean, "
        "std and color are seen to inside",
    }[kind]
    outputs = [
        f"embeddings, float32 [batch, {model.embedding_size}] of length 1; multiply by lengths, add those of the "
        "mirror image and normalise for the scores that thresholds are about",
        "lengths, float32 [batch, 1]: what the embeddings were divided by",
    ]
    if model.head is not None:
        outputs.append(f"probabilities, float32 [batch, {model.num_classes}]: of class_names, of the picture alone")
    if model.attribute_heads is not None:
        outputs.append(
            f"attributes, float32 [batch, {len(model.attribute_heads.biases)}]: for each of attributes the probability "
            "of a yes, or of being above each of its levels but the last"
        )
    return {
        "format": exported.KIND,
        "input": given,
        "input_kind": kind,
        "output": "; ".join(outputs),
        **{name: config["image"][name] for name in ("mean", "std", "color", "template")},
        "model_format": config["format"],
        **{name: config[name] for name in (*exported.ENTRIES, *FINDINGS)},
        "recipe": recipe,
    }


def _add_heads(graph: Any, model: FaceModel) -> None:
    """Outputs `probabilities` and `attributes` where the model has such heads.

    By hand and not by torch's exporter, which folds weights and names them anew: a reader finds them by their names.
    """
    from onnx import TensorProto, helper, numpy_helper

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = exported.HEADS + output
        final = output if output in ("probabilities", "attributes") else name
        graph.node.append(helper.make_node(kind, inputs, [final], name=name, **attributes))
        return final

    def constant(name: str, values: Tensor) -> str:
        graph.initializer.append(numpy_helper.from_array(values.detach().cpu().contiguous().numpy(), name))
        return name

    def output(name: str, numbers: int) -> None:
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", numbers]))

    head, attributes = model.head, model.attribute_heads
    if isinstance(head, CosineHead):
        weight = constant("head.weight", unit(head.weight))
        logits = node("Gemm", [exported.EMBEDDINGS, weight], "logits", transB=1, alpha=model.scale)
    elif head is not None:
        whole = node("Mul", [exported.EMBEDDINGS, exported.LENGTHS], "whole")
        weight, bias = constant("head.weight", head.weight.float()), constant("head.bias", head.bias.float())
        logits = node("Gemm", [whole, weight, bias], "logits", transB=1, alpha=model.scale, beta=model.scale)
    if head is not None:
        node("Softmax", [logits], "probabilities", axis=1)
        output("probabilities", model.num_classes)
    if isinstance(attributes, AttributeHeads):
        weight = constant("attribute_heads.weight", attributes.weight.float())
        biases = constant("attribute_heads.biases", attributes.biases.float())
        stretch = math.sqrt(model.embedding_size)
        each = node("Gemm", [exported.EMBEDDINGS, weight], "directions", transB=1, alpha=stretch)
        which = constant(exported.HEADS + "attribute_of", attributes.attribute_of)
        spread = node("Gather", [each, which], "spread", axis=1)
        node("Sigmoid", [node("Add", [spread, biases], "steps")], "attributes")
        output("attributes", len(attributes.biases))
