"""Checkpoints of a real run that the disk has damaged: every one is noticed, and a run goes on from the one before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from facefast import train
from facefast.data.drawn import synthetic
from facefast.models import checkpoint
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from tests.faults import runs
from tests.support.scale import count

BITS, BYTES, LENGTHS = count(20, 200), count(8, 50), count(3, 20)
"""Flipped bits of the manifest, flipped bytes in each other file, and lengths that each file is cut to."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(4, 3, 3), pictures=5, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def finished(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(runs.flags(drawn, out)) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that tests may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def steps(run: Path) -> list[Path]:
    return sorted((run / checkpoint.FOLDER).glob("step-*"))


def damaged(content: bytes, chance: random.Random, kind: str) -> Iterator[bytes]:
    """As many damaged forms as are tried of a kind."""
    if kind == "cut":
        lengths = {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(LENGTHS - 2))}
        yield from (content[:length] for length in sorted(lengths))
        return
    for _ in range(BITS if kind == "bit" else BYTES):
        place = chance.randrange(len(content))
        flip = 1 << chance.randrange(8) if kind == "bit" else chance.randrange(1, 256)
        yield content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]


def passed_over(run: Path, name: str, kind: str) -> tuple[int, int]:
    """How many forms of damage to a file of the newest checkpoint were tried, and how many lead to the one before."""
    *_, before, newest = steps(run)
    file = newest / name
    content, tried, found = file.read_bytes(), 0, 0
    for data in damaged(content, random.Random(f"{name} {kind}"), kind):
        file.write_bytes(data)
        tried += 1
        found += checkpoint.newest(run) == before
    file.write_bytes(content)
    assert checkpoint.newest(run) == newest
    return tried, found


def test_every_flipped_bit_of_a_manifest_leads_to_the_checkpoint_before(run: Path) -> None:
    assert passed_over(run, "manifest.json", "bit") == (BITS, BITS)


@pytest.mark.parametrize("kind", ["byte", "cut"])
def test_every_flipped_byte_and_every_cut_of_any_file_leads_to_the_checkpoint_before(run: Path, kind: str) -> None:
    names = sorted(file.name for file in steps(run)[-1].iterdir())
    assert {"manifest.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"} <= {*names}
    for name in names:
        tried, found = passed_over(run, name, kind)
        assert tried >= 3 and found == tried, name


@pytest.mark.parametrize(
    ("name", "kind"), [("manifest.json", "bit"), ("optimizer.safetensors", "byte"), ("state.json", "cut")]
)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_bits(
    drawn: Path, run: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = runs.result(run)
    file = steps(run)[-1] / name
    file.write_bytes(next(damaged(file.read_bytes(), random.Random(1), kind)))
    (run / ".status.json.4711.tmp").write_text("{")  # whoever damages a checkpoint leaves files behind as well
    (run / "checkpoints" / ".step-0000012.tmp").mkdir()
    assert train.main(runs.flags(drawn, run)) == 0
    assert runs.leftovers(run) == []
    said = capsys.readouterr().out
    assert "passing over a damaged checkpoint" in said and f"goes on from {steps(run)[-2]}" in said
    assert runs.result(run) == expected
    assert files.read_json(run / "status.json")["state"] == "done"


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_never_measured_or_taken_for_a_source(
    drawn: Path, run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in steps(run):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(StorageError):
        checkpoint.load_model(run)
    more = ("--phases.scratch.start=source", f"--model.source={run}")
    assert train.main(runs.flags(drawn, tmp_path / "next", *more)) == 74
    assert train.main(runs.flags(drawn, run)) == 74
    assert "is sound, see above" in capsys.readouterr().err
    assert len(steps(run)) > 1
