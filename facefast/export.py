"""A model that leaves the project: `python -m facefast.export MODEL --to onnx|torch|safetensors OUT`.

Every export is read back and compared with the model before the command succeeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from facefast.deploy.package import export
from facefast.models import checkpoint
from facefast.recipe.options import parse
from facefast.runtime import exits
from facefast.runtime.terminal import say


@dataclass(frozen=True)
class ExportArguments:
    """`python -m facefast.export`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder or an exported package."""
    out: tyro.conf.Positional[Path]
    """A file for onnx and torch, a folder for safetensors."""
    to: Literal["onnx", "torch", "safetensors"] = "onnx"
    """onnx: any runtime; its metadata, and a .json beside it, say what its pictures and answers are; torch: a
    torch.export program; safetensors: a folder that facefast.load opens."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(ExportArguments, arguments, "export")
        export(checkpoint.load_model(given.model), given.to, given.out, checkpoint.read_recipe(given.model))
        say(f"{given.out}: {given.to}, checked against {given.model}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
