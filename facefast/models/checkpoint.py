"""A training state on disk, and back: written aside, hashed, synced, renamed, verified before use.

A checkpoint is a folder of safetensors and JSON (never a pickle); `manifest.json`, written last, holds the SHA-256 of
every other file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facefast.models import FaceModel, exported, load_source, model_from_source, spread
from facefast.models.build import require_numbers
from facefast.models.precision import Precision
from facefast.models.spread import Fetch, Named, Spread
from facefast.models.weights.readers import read_safetensors
from facefast.recipe import Plan, Recipe, from_json, to_json
from facefast.runtime import files, manifest
from facefast.runtime.exits import StorageError
from facefast.runtime.process import World
from facefast.runtime.terminal import tell

FOLDER = "checkpoints"
DOCUMENTS = 16384
"""Bytes set aside for a checkpoint's JSON and for the header of each file of tensors."""
UNTOUCHED = "Earlier checkpoints are untouched: make room, and the same command goes on from them"


def save(
    run_folder: Path,
    step: int,
    *,
    tensors: Named,
    documents: dict[str, Any],
    best: bool,
    keep: int,
    fetch: Fetch | None = None,
) -> Path:
    """Writes `checkpoints/step-N` of a run folder that stands, points `last` (and `best`) at it and removes old ones.

    Args:
        tensors: file stem -> named tensors, for instance {"model": model.state_dict()}.
        documents: file stem -> JSON value, for instance {"state": {...}, "recipe": {...}}.
        best: whether `best` points here from now on.
        keep: step-N folders kept beside those that `last` and `best` point at.
        fetch: gives other ranks' rows, where tensors are `Spread`.

    Raises:
        StorageError: the disk is full or refuses; earlier checkpoints are untouched.
    """
    # The order is what makes a crash at any moment harmless:
    # 1. All files go into a hidden folder, which no reader looks at.
    # 2. The manifest comes last, so a folder without one is unfinished, whatever else it holds.
    # 3. `replace_folder` syncs every file and the folder before the rename: a name that survives a power cut must not
    #    stand for content that did not.
    # 4. Only then do the links move, and only after them are old checkpoints removed.
    folder, path = run_folder / FOLDER, of_step(run_folder, step)
    with files.storing(path, advice=UNTOUCHED):
        folder.mkdir(exist_ok=True)  # not the run folder: one that was just moved away is not to be made anew
        _remove_leftovers(folder)
    with _completed(path, step, needed_bytes(tensors)) as (aside, hashes):
        hashes |= _write_all(aside, tensors, documents, fetch)
    with files.storing(path, advice=UNTOUCHED):
        files.replace_link(folder / "last", path.name)
        if best:
            files.replace_link(folder / "best", path.name)
    _remove_old(folder, keep)
    return path


@contextlib.contextmanager
def _completed(path: Path, step: int, needed: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder to write a checkpoint's files to, which becomes `path` with its manifest; nothing of it is left where it
    cannot be written. Beside it, hashes by file name, for those that are known and need no reading."""
    hashes: dict[str, str] = {}
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with files.storing(path, needed, UNTOUCHED):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside, hashes
            manifest.write(aside, step, hashes)
            files.replace_folder(aside, path)
    except StorageError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def of_step(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after so many updates of the run lies, or would lie."""
    return run_folder / FOLDER / f"step-{step:07d}"


def needed_bytes(tensors: Named) -> int:
    """What a checkpoint takes on the disk, about: its tensors, and some room for names and documents."""
    numbers = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    return numbers + DOCUMENTS * (1 + len(tensors))


def require_room(run_folder: Path, tensors: Named) -> None:
    """Finds out, before any training, that not one checkpoint can be written.

    Raises:
        StorageError: it has too little room, or the folder refuses.
    """
    folder = run_folder / FOLDER
    files.require_writable(folder, folder=True, advice=UNTOUCHED)
    with files.storing(folder, needed_bytes(tensors), UNTOUCHED):
        pass


def hand_on(run_folder: Path, name: str, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> Path:
    """Writes a model that no training state belongs to as `checkpoints/NAME` and points `best` at it.

    Raises:
        StorageError: the disk is full or refuses; what `best` points at is untouched.
    """
    path = run_folder / FOLDER / name
    with _completed(path, 0, needed_bytes(tensors)) as (aside, hashes):
        hashes |= _write_all(aside, tensors, documents)
    with files.storing(path, advice=UNTOUCHED):
        files.replace_link(path.with_name("best"), path.name)
    return path


def amend(path: Path, documents: dict[str, Any]) -> None:
    """Gives a checkpoint other documents; tensors and the rest stay, and so does the whole checkpoint until the new one
    is complete.

    Args:
        path: the folder, or a link to it.
        documents: file stem -> JSON value.

    Raises:
        StorageError: the disk is full or refuses; the checkpoint is as it was.
    """
    path = path.resolve()
    replaced = {manifest.NAME, *(f"{stem}.json" for stem in documents)}
    with _completed(path, files.read_json(path / manifest.NAME)["step"], DOCUMENTS) as (aside, _):
        for file in path.iterdir():
            if file.name not in replaced:
                _link(file, aside / file.name)
        _write_all(aside, {}, documents)


def _link(file: Path, other: Path) -> None:
    """Gives a file a second name, which costs no room; a copy where the file system cannot."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _write_all(folder: Path, tensors: Named, documents: dict[str, Any], fetch: Fetch | None = None) -> dict[str, str]:
    """Returns the hashes of the files of tensors by name, known from writing them."""
    hashes = {}
    for stem, named in tensors.items():
        path, spread_out = folder / f"{stem}.safetensors", any(isinstance(each, Spread) for each in named.values())
        if fetch is not None and spread_out:
            hashes[path.name] = spread.write(path, stem, named, fetch)
        else:  # one process has all of every tensor
            hashes[path.name] = write_tensors(path, {name: spread.here(tensor) for name, tensor in named.items()})
    for stem, value in documents.items():
        files.write_json(folder / f"{stem}.json", value)
    return hashes


def write_tensors(path: Path, named: dict[str, Tensor]) -> str:
    """A .safetensors file of named tensors; returns the hex XXH3-128 of it.

    Raises:
        OSError: it cannot be written.
        ValueError: the format has no such type of numbers.
    """
    return spread.write(path, path.stem, named)


def _remove_leftovers(folder: Path) -> None:
    """Takes away what a run that was killed while it saved has left, and nothing else."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.step-\d+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.(last|best)\.\d+\.tmp", path.name):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _remove_old(folder: Path, keep: int) -> None:
    linked = {(folder / link).resolve() for link in ("last", "best") if (folder / link).exists()}
    for path in _steps(folder)[keep:]:
        if path.resolve() not in linked:
            shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """step-N folders, newest first."""
    steps = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def has_any(run_folder: Path) -> bool:
    """Whether a run has checkpoints, sound or not."""
    return bool(_steps(run_folder / FOLDER))


def newest(run_folder: Path) -> Path | None:
    """The newest sound checkpoint of a run, or None where it has none; damaged ones are passed over with a warning.

    Raises:
        StorageError: there are checkpoints, but none of them is sound, or a later facefast wrote the newest one. To
            start anew would throw them away.
    """
    # By the folders' names, not by `last`: a run killed between the rename and the link has a newer one.
    steps = _steps(run_folder / FOLDER)
    for path in steps:
        try:
            manifest.verify(path)
        except manifest.NewerFormatError as error:
            raise StorageError(f"{error}; or give another --out, or --resume never to throw it away") from error
        except StorageError as error:
            tell(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    if steps:
        raise StorageError(
            f"none of the {len(steps)} checkpoints in {run_folder / FOLDER} is sound, see above; restore one from a "
            "backup, give another --out, or --resume never to throw them away and start anew"
        )
    return None


def check_same_run(path: Path, recipe: Recipe, plan: Plan) -> None:
    """Refuses to go on from a checkpoint of another recipe or of other photographs.

    The number of processes, of threads and of lines logged may differ.

    Raises:
        ValueError: naming each field that differs with both values.
    """
    # By way of a Recipe: a field that is newer than the checkpoint has its default there.
    theirs, ours = to_json(from_json(Recipe, files.read_json(path / "recipe.json"))), to_json(recipe)
    # These may change in the middle of a run: they have no part in its weights.
    # A checkpoint is the same file by however many ranks it was written.
    free = (
        "data.cache",
        "data.cache_gib",
        "model.shard_head",
        "threads",
        "log_every",
        "keep",
        "save_every",
        "projector",
        "rank_timeout",
        "model.source_licence",
    )
    differs = [
        f"{name}: {old!r} there, {new!r} now" for name, old, new in files.differences(theirs, ours) if name not in free
    ]
    old_plan = files.read_json(path / "plan.json")
    try:
        for old, new in zip(old_plan["phases"], plan.phases, strict=False):
            if old["fingerprint"] != new.fingerprint:
                differs.append(
                    f"photographs of phase {new.name}: {old['num_rows']} of {old['num_classes']} identities there, "
                    f"{new.num_rows} of {new.num_classes} now; names, labels, landmarks or content differ"
                )
    except (KeyError, TypeError) as error:
        raise StorageError(f"{path / 'plan.json'} is no plan of facefast's: {error}") from error
    if differs:
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(differs)}); give the run another --out, or --resume never "
            "to throw its checkpoints away"
        )


def discard(run_folder: Path) -> None:
    """Removes all checkpoints of a run."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def read_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """The named tensors of one file of a checkpoint, on the CPU; empty where the checkpoint has no such file."""
    file = path / f"{stem}.safetensors"
    return read_safetensors(file) if file.exists() else {}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors plus a JSON value for what is not a tensor."""
    # safetensors holds named tensors alone: "0.exp_avg" is slot exp_avg of parameter 0. Numbers go into the JSON.
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                scalars.setdefault(str(number), {})[name] = value
    groups = [  # a rate may be a tensor on the device
        {name: float(value) if isinstance(value, Tensor) else value for name, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"param_groups": groups, "scalars": scalars}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """The inverse of `pack_optimizer`, into an optimiser built for the same parameters."""
    state: dict[int, dict[str, Any]] = {int(number): dict(slots) for number, slots in document["scalars"].items()}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if (
                value.shape == parameter.shape
            ):  # fused kernels walk both in memory order: channels-last like its parameter
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def find_model(path: Path) -> Path:
    """The checkpoint folder that MODEL means: a run folder's best (else last), or the folder itself; an ONNX file is
    its own.

    Raises:
        ValueError: there is no model there.
    """
    if exported.is_onnx(path):
        return path.resolve()
    for candidate in (path / FOLDER / "best", path / FOLDER / "last", path):
        if (candidate / "model.json").exists():
            return candidate.resolve()
    if (path / exported.INT8).exists():
        raise ValueError(f"{path} is an int8 package without model.json, as early versions wrote it; compress anew")
    raise ValueError(f"{path} holds no model: give a run folder, a checkpoint folder, a package or a weights file")


def run_to_resume(path: Path) -> Path:
    """The run folder that a run goes on from: the folder itself, or the one that a checkpoint folder is in.

    Raises:
        ValueError: no run can go on from there.
    """
    if has_any(path):
        return path
    if not (path / "state.json").is_file():
        raise ValueError(
            f"{path} holds no state of training: --resume takes a run folder or one of its {FOLDER}/step-*; from a "
            "package or from weights a run starts with --model.source"
        )
    return path.resolve().parents[1]


def find_resumable(path: Path) -> Path:
    """The sound checkpoint that a run goes on from: a run folder's newest one, or the folder itself.

    Raises:
        ValueError: as `run_to_resume`.
        StorageError: as `newest`, or the folder itself is damaged.
    """
    run_to_resume(path)
    if found := newest(path):
        return found
    manifest.verify(path.resolve())
    return path.resolve()


def find_begun(model: Path) -> Path | None:
    """The index of the photographs that the run began with which a checkpoint is of; None for what is in no run."""
    if exported.is_onnx(model) or not model.is_dir():
        return None
    path = find_model(model).parents[1] / "index.npz"
    return path if path.is_file() else None


def read_recipe(model: Path) -> dict[str, Any] | None:
    """The JSON form of the recipe that MODEL was trained with; None for a source model's weights file.

    Raises:
        ValueError: there is no model there.
    """
    if exported.is_onnx(model):
        return exported.read_recipe(model)
    if not model.is_dir():
        return None
    path = find_model(model) / "recipe.json"
    recipe = files.read_json(path) if path.exists() else None
    if not isinstance(recipe, dict | None):
        raise ValueError(f"{path} holds no recipe, but {recipe!r:.80}")
    return recipe


def precision_of(path: Path, model: FaceModel) -> Precision:
    """What MODEL is run in, by every command alike: as its recipe says, or by the defaults where it has none.

    Args:
        path: MODEL as it was given.
        model: what `load_model` made of it, on the device where it will run.
    """
    saved = read_recipe(path) or {}
    return Precision.choose(
        saved.get("precision", Recipe.precision),
        model.config.backbone,
        saved.get("channels_last", Recipe.channels_last),
        model.pixel_mean.device,
    )


def read_weights(path: Path, model: FaceModel, stem: str = "model") -> dict[str, Tensor]:
    """The weights of `model` in one file of a checkpoint: of its head, those of this process's classes."""
    named = read_tensors(path, stem)
    if model.head is not None and "head.weight" in named:
        named["head.weight"] = spread.own_rows(named["head.weight"], model.head.block, model.num_classes)
    return named


def load_model(path: str | Path, device: torch.device | str = "cpu", world: World | None = None) -> FaceModel:
    """A model in evaluation mode from a run folder, a checkpoint folder, a package (in float or int8), an ONNX file
    that facefast wrote, or a source model's weights file.

    Args:
        path: which of them.
        device: where it goes.
        world: the processes that share the classes of a cosine head; None has them all here.

    Raises:
        ValueError: there is no model there, or it is of an unknown kind or of a newer format.
        StorageError: a file of it is damaged.
    """
    path = Path(path)
    if exported.is_onnx(path):
        return exported.read(path).to(device).eval()
    if path.is_file():
        model = model_from_source(load_source(path))
        return model.to(device).eval()
    folder = find_model(path)
    manifest.verify(folder)
    document = files.read_json(folder / "model.json")
    if (folder / exported.INT8).exists():
        return exported.read(folder / exported.INT8, document).to(device).eval()
    weights = read_tensors(folder, "ema") or read_tensors(folder, "model")
    held = sum(tensor.numel() for tensor in weights.values())
    require_numbers(lambda: FaceModel.from_config(document), held, str(folder / "model.json"))
    model = FaceModel.from_config(document, world=world)
    if world is not None:
        weights = read_weights(folder, model, "ema") or read_weights(folder, model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: model.json and the weights are of two models: {error}"[:2000]) from error
    return model.to(device).eval()
