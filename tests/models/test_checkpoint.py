"""Checkpoints: atomic, hashed, verified, kept, and never a way to run somebody else's program."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from facefast.models import build_model, checkpoint
from facefast.recipe import ImageSpec, IndexFacts, ModelConfig, Phase, Recipe, resolve, to_json
from facefast.runtime import files, manifest
from facefast.runtime.direct import DirectFile
from facefast.runtime.exits import StorageError

TENSORS = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}}


def write(folder: Path, step: int, *, best: bool = False, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, tensors=TENSORS, documents={"state": {"step": step}}, best=best, keep=keep)


def test_a_saved_checkpoint_verifies_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    manifest.verify(path)
    assert torch.equal(checkpoint.read_tensors(path, "model")["weight"], TENSORS["model"]["weight"])
    assert checkpoint.read_tensors(path, "ema") == {}
    assert files.read_json(path / "state.json") == {"step": 7}
    assert (tmp_path / "checkpoints" / "last").resolve() == path.resolve()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        path = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        name: oct(mode) for name in ("model.safetensors", "state.json", "manifest.json")
    }


def test_old_checkpoints_go_but_best_and_last_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, best=True)
    for step in (2, 3, 4, 5):
        write(tmp_path, step)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-0000001", "step-0000004", "step-0000005"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-0000001"


@pytest.mark.parametrize("position", [0, 9, 40, -1])
def test_one_flipped_byte_anywhere_is_noticed_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, position: int, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="changed or damaged"):
        manifest.verify(bad)
    assert checkpoint.newest(tmp_path) == good
    assert "passing over a damaged checkpoint" in capsys.readouterr().out


def test_a_run_goes_on_from_a_runs_newest_checkpoint_or_a_given_one_and_from_nothing_without_a_state(
    tmp_path: Path,
) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoint.find_resumable(tmp_path) == second
    assert checkpoint.find_resumable(first) == first
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.json").write_text("{}")
    for path in (package, tmp_path / "none"):
        with pytest.raises(ValueError, match="package holds no state|none holds no state"):
            checkpoint.find_resumable(path)


def test_every_flipped_bit_of_a_manifest_makes_a_resume_go_to_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    content = (bad / "manifest.json").read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (bad / "manifest.json").write_bytes(damaged)
        assert checkpoint.newest(tmp_path) == good, damaged
    assert "passing over a damaged checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"format": 1, "step": 2, "files": {}}', '{"format": 1, "step": 2, "files": {"../x": {}}}']
    + ["[" * 100_000, '{"format": "1", "step": 2, "files": {"a": 1}}', '{"format": 1, "step": 2, "files": {"": null}}'],
)
def test_a_manifest_that_is_anything_else_is_not_sound(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match="not a finished checkpoint|is damaged"):
        manifest.verify(path)


def test_checkpoints_of_the_first_format_have_other_hashes_and_are_checked_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    names = sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
    entries = {name: {"bytes": (path / name).stat().st_size, "sha256": files.sha256(path / name)} for name in names}
    document: dict[str, Any] = {"format": 1, "step": 1, "files": entries}
    files.write_json(path / "manifest.json", document | {"digest": manifest._digest(document)})
    assert checkpoint.newest(tmp_path) == path
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match="model.safetensors does not match the hash in its manifest"):
        manifest.verify(path)


def test_checkpoints_of_a_later_facefast_are_refused_and_stay(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newer = write(tmp_path, 2)
    document = files.read_json(newer / "manifest.json") | {"format": 3}
    document["digest"] = manifest._digest(document)
    files.write_json(newer / "manifest.json", document)
    with pytest.raises(
        StorageError, match="has checkpoint format 3, this facefast reads 2; use the facefast that wrote"
    ):
        checkpoint.newest(tmp_path)
    assert newer.exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(StorageError, match="none of the 2 checkpoints in .* is sound"):
        checkpoint.newest(tmp_path)


def test_folders_and_files_of_the_user_are_neither_checkpoints_nor_leftovers(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    shutil.copytree(first, first.with_name("step-0000001.bak"))
    for name in (".gitignore", ".keep.tmp"):
        (tmp_path / "checkpoints" / name).write_text("mine")
    left = tmp_path / "checkpoints" / ".step-0000009.tmp"
    left.mkdir()
    newest = write(tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path) == newest and not left.exists()
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {".gitignore", ".keep.tmp", "last", "step-0000001.bak", "step-0000002"}


def test_checkpoints_are_counted_not_spelt(tmp_path: Path) -> None:
    write(tmp_path, 9_999_999)
    write(tmp_path, 10_000_000)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-10000000"


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json"])
def test_a_checkpoint_with_a_file_missing_or_cut_short_is_passed_over(tmp_path: Path, name: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / name).write_bytes((bad / name).read_bytes()[:5])
    assert checkpoint.newest(tmp_path) == good
    (bad / name).unlink()
    assert checkpoint.newest(tmp_path) == good


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_a_full_disk_leaves_earlier_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DirectFile, "write", full)
    with pytest.raises(StorageError, match="Earlier checkpoints are untouched"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == good
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if "tmp" in p.name] == []


def test_the_safetensors_library_reads_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8)
    named = {f"of {type}": torch.arange(12).reshape(3, 4).to(type) for type in types}
    named |= {"none": torch.zeros(0, 5), "one": torch.tensor(3.0), "many": torch.randn(600_000)}
    digest = checkpoint.write_tensors(tmp_path / "ours", named)
    found = safetensors.torch.load_file(tmp_path / "ours")
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert digest == files.xxh3(tmp_path / "ours")


def test_a_type_that_no_file_of_tensors_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="waves is of torch.complex64; a file of tensors has one of torch.float64"):
        checkpoint.write_tensors(tmp_path / "file", {"waves": torch.zeros(2, dtype=torch.complex64)})


def test_an_optimizer_survives_the_round_trip_exactly(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, first = build()
    step(one, first)
    tensors, document = checkpoint.pack_optimizer(first)
    tensors = {name: value.clone() for name, value in tensors.items()}
    document = json.loads(json.dumps(document))
    weights = {name: value.clone() for name, value in one.state_dict().items()}
    step(one, first)
    two, second = build()
    two.load_state_dict(weights)
    checkpoint.unpack_optimizer(second, tensors, document)
    step(two, second)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_a_run_folder_that_was_moved_away_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write(tmp_path / "run", 1)
    assert list(tmp_path.iterdir()) == []


def save_model(folder: Path) -> Path:
    model = build_model(
        ModelConfig(backbone="mobilefacenet", head="cosine"), 3, ImageSpec(size=32), ("ann", "bo", "cy")
    ).eval()
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(
        folder,
        1,
        tensors={"model": model.state_dict()},
        documents={"model": model.to_config()},
        best=True,
        keep=1,
    )


def test_a_model_loads_from_its_run_folder_its_checkpoint_or_a_copy_of_it(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    copy = tmp_path / "elsewhere"
    shutil.copytree(path, copy)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    embeddings = [checkpoint.load_model(p).embed(images) for p in (tmp_path, path, copy)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(embeddings[0], embeddings[2])
    assert checkpoint.load_model(tmp_path).class_names == ("ann", "bo", "cy")


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    document = files.read_json(path / "model.json")
    document["scale"] = 99.0
    (path / "model.json").write_text(json.dumps(document))
    with pytest.raises(StorageError, match=r"model\.json should have"):
        checkpoint.load_model(tmp_path)


def test_a_folder_without_a_model_says_what_it_expects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model: give a run folder"):
        checkpoint.load_model(tmp_path)


def test_going_on_with_another_recipe_or_other_photographs_is_refused_by_name(tmp_path: Path) -> None:
    recipe = Recipe(phases=(Phase(start="scratch"),))
    facts = IndexFacts(num_rows=10, num_classes=2, fingerprint="a")
    plan = resolve(recipe, (facts,), 1)
    path = checkpoint.save(
        tmp_path, 1, tensors={}, documents={"recipe": to_json(recipe), "plan": to_json(plan)}, best=False, keep=1
    )
    checkpoint.check_same_run(path, recipe, plan)
    checkpoint.check_same_run(path, recipe, resolve(recipe, (facts,), 2))  # another world size is no other run
    phases = (Phase(start="source"),)
    told = Recipe(model=ModelConfig(source="w.pth", source_licence="MIT"), phases=phases)
    again = dataclasses.replace(told, model=dataclasses.replace(told.model, source_licence="BSD"))
    said = {"recipe": to_json(told), "plan": to_json(plan)}
    (tmp_path / "told").mkdir()
    named = checkpoint.save(tmp_path / "told", 1, tensors={}, documents=said, best=True, keep=1)
    checkpoint.check_same_run(named, again, plan)  # nor is what somebody learnt of a licence later
    other = Recipe(phases=(Phase(start="scratch", lr=0.5),))
    with pytest.raises(ValueError, match=r"phases.0.lr: 0.1 there, 0.5 now"):
        checkpoint.check_same_run(path, other, plan)
    moved = resolve(recipe, (IndexFacts(num_rows=11, num_classes=2, fingerprint="b"),), 1)
    with pytest.raises(ValueError, match="10 of 2 identities there, 11 of 2 now"):
        checkpoint.check_same_run(path, recipe, moved)
