"""A model that leaves the project: `python -m facefast.export MODEL --to onnx|torch|safetensors|insightface OUT`.

Every export is read back and compared with the model before the command succeeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from facefast.deploy.package import export
from facefast.models import checkpoint, provenance
from facefast.recipe.options import parse
from facefast.runtime import exits
from facefast.runtime.terminal import say


@dataclass(frozen=True)
class ExportArguments:
    """`python -m facefast.export`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or a source model's weights file."""
    out: tyro.conf.Positional[Path]
    """A file for onnx, torch and insightface, a folder for safetensors."""
    to: Literal["onnx", "torch", "safetensors", "insightface"] = "onnx"
    """onnx: any runtime, and facefast's own commands; its metadata, and a .json beside it, say what its pictures and
    answers are; torch: a torch.export program; safetensors: a folder that facefast.load opens; insightface: weights by
    the names of InsightFace's arcface_torch, of a network that it has."""
    input: Literal["float32", "uint8"] = "float32"
    """What an onnx file takes: normalised pictures [B, 3, H, W], or aligned faces [B, H, W, 3] of RGB bytes, which it
    normalises itself."""
    source_licence: str = ""
    """Licence of the weights that the model began from, where its training was not told or you know better; it goes
    into the export."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(ExportArguments, arguments, "export")
        model = checkpoint.load_model(given.model)
        if given.source_licence:
            model.provenance = provenance.with_licence(model.provenance, given.source_licence)
        export(model, given.to, given.out, checkpoint.read_recipe(given.model), given.input)
        say(f"{given.out}: {given.to}, checked against {given.model}; {provenance.sentence(model.provenance)}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
