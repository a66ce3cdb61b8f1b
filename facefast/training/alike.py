"""What every rank of a run must have alike, each compared with rank 0 before anything depends on it.

A rank that differs would train on something else without a word, or wait for ever where ranks count their batches
differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.divide import PhaseData
from facefast.models import FaceModel, Source
from facefast.recipe import Recipe, to_json
from facefast.runtime import files
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime
from facefast.training.step import TrainState


def same_arguments(recipe: Recipe, folder: Path, resume: str, run: Runtime) -> None:
    """Compares what each process was asked for.

    Raises:
        ValueError: naming the rank, the option and both values.
    """
    run.require_same({**to_json(recipe), "out": str(folder), "resume": resume})


def same_start(
    state: TrainState, datasets: tuple[PhaseData, ...], source: Source | None, teacher: FaceModel | None
) -> None:
    """Compares what the arguments became: photographs, weights, the settled recipe, and how each rank computes.

    Raises:
        DataError: photographs differ.
        ValueError: anything else does.
    """
    run, recipe = state.run, state.recipe
    photographs = {
        f"photographs of phase {phase.name}": {
            "training": data.train.fingerprint(),
            "test": _fingerprint(data.evaluation.test),
            "verification": _fingerprint(data.evaluation.verification),
            "pairs": None if (pairs := data.evaluation.pairs) is None else _digest(vars(pairs)),
        }
        for phase, data in zip(recipe.phases, datasets, strict=True)
    }
    run.require_same(photographs, DataError)
    run.require_same(
        {
            **to_json(recipe),
            "plan": to_json(state.plan),
            "weights of model.source": None if source is None else _digest(source.state),
            "weights of model.teacher": None if teacher is None else _digest(teacher.state_dict()),
            "kind of device": run.device.type,
            "precision": state.precision.name,
        }
    )


def same_checkpoint(path: Path | None, run: Runtime) -> None:
    """Compares what each rank sees of the checkpoint that rank 0 goes on from.

    Raises:
        ValueError: another one, or none, as where the run folder is not shared by the machines.
    """
    manifest = path / "manifest.json" if path else None
    seen = "none" if manifest is None else files.sha256(manifest) if manifest.exists() else "missing"
    run.require_same({f"checkpoint {path}": seen})


def _fingerprint(index: FaceIndex | None) -> str | None:
    return None if index is None else index.fingerprint()


def _digest(named: Mapping[str, object]) -> str:
    """Hex digest of arrays or tensors and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in named.items():
        digest.update(name.encode())
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        # As bytes: numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
