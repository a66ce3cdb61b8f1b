"""Photographs that go bad after they were indexed: a run ends with the bits that it has where those rows were masked
from the start."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast import train
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.data.index import FAULTS, FaceIndex
from facefast.data.prepare import prepare as indexed
from facefast.models import checkpoint
from facefast.recipe import Recipe
from facefast.runtime import files
from facefast.runtime.process import Runtime
from facefast.training.step import train_step
from tests.faults import runs
from tests.support.pictures import encode, smooth_picture
from tests.support.ranks import start_ranks
from tests.support.scale import FULL, count

PEOPLE, EACH = 10, 12
EPOCHS = 2
RECIPE = (
    "scratch",
    "--image.size=32",
    "--model.embedding=16",
    "--model.backbone=mobilefacenet_half",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--pictures=0",
    "--precision=fp32",
    "--ema=0.5",
    "--log-every=1",
    "--phases.scratch.batch-size=8",
    f"--phases.scratch.epochs={EPOCHS}",
)
"""Training people's photographs; a budget is added."""


def photographs(root: Path, people: int = PEOPLE) -> Path:
    """A folder for each person."""
    for person in range(people):
        (root / f"p{person:03}").mkdir(parents=True)
        for number in range(EACH):
            picture = smooth_picture(36 + person % 3, 34, 100 * person + number)
            (root / f"p{person:03}" / f"{number:02}.jpg").write_bytes(encode(picture))
    return root


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage that takes the file away before something else has its name."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage to the file's content."""

    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def of_no_size(data: bytes) -> bytes:
    """A JPEG whose frame says 0 x 0."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + bytes(4) + data[at + 4 :]


def flipped(data: bytes) -> bytes:
    """One bit of the picture data: it decodes to other pixels, and no decoder minds."""
    at = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def stranger(_: bytes) -> bytes:
    return encode(smooth_picture(36, 34, 99_999))


KINDS: dict[str, Callable[[Path], object]] = {
    "cut to 50 %": rewritten(lambda data: data[: len(data) // 2]),
    "cut to 90 %": rewritten(lambda data: data[: len(data) * 9 // 10]),
    "its header alone": rewritten(lambda data: data[: data.index(b"\xff\xda")]),
    "empty": rewritten(lambda data: b""),
    "missing": Path.unlink,
    "garbage": rewritten(lambda data: random.Random(0).randbytes(len(data))),
    "a web page": rewritten(lambda data: b"<!DOCTYPE html><html><body>404</body></html>"),
    "0 x 0 pixels": rewritten(of_no_size),
    "a PNG cut short": rewritten(lambda data: encode(smooth_picture(36, 34, 1), "PNG")[:-200]),
    "one bit flipped": rewritten(flipped),
    "a GIF": rewritten(lambda data: encode(smooth_picture(36, 34, 1), "GIF")),
    "another person's picture": rewritten(stranger),
    "grown": rewritten(lambda data: data + b"\0" * 1000),
    "a folder": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to nowhere": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
}


def victims_of(root: Path, share: float) -> list[Path]:
    """So many of the photographs, at least one, whoever is on them."""
    everything = sorted(root.rglob("*.jpg"))
    return sorted(random.Random(share).sample(everything, max(1, round(share * len(everything)))))


def after_indexing(change: Callable[[PhaseData], PhaseData]) -> Any:
    """`prepare`, with something that happens as soon as it has looked at all files."""

    def prepare(recipe: Recipe, folder: Path, run: Runtime, *rest: Any) -> tuple[PhaseData, ...]:
        datasets = indexed(recipe, folder, run, *rest)
        return tuple(change(data) for data in datasets)

    return prepare


def masked(victims: Sequence[Path]) -> Any:
    """`prepare`, which knows these photographs as missing."""
    paths = {str(path) for path in victims}

    def mask(index: FaceIndex | None) -> FaceIndex | None:
        if index is None:
            return None
        lost = np.array([index.path(row) in paths for row in range(len(index))])
        return dataclasses.replace(index, faults=np.where(lost, FAULTS.index("missing"), index.faults).astype(np.uint8))

    def asked(part: EvaluationSet) -> EvaluationSet:
        return dataclasses.replace(part, test=mask(part.test), verification=mask(part.verification))

    def change(data: PhaseData) -> PhaseData:
        trained = mask(data.train)
        assert trained is not None
        return dataclasses.replace(
            data, train=trained, validation=asked(data.validation), evaluation=asked(data.evaluation)
        )

    return after_indexing(change)


def damaged(victims: Sequence[Path], kind: str, run_is_main: bool = True) -> Any:
    """`prepare`, after which these photographs go bad."""

    def change(data: PhaseData) -> PhaseData:
        if run_is_main:
            for path in victims:
                KINDS[kind](path)
        return data

    return after_indexing(change)


def end_of(run: Path) -> dict[str, Any]:
    """Everything that a run leaves of what it learnt and measured, and the rows that its log counts."""
    step = files.read_json(run / "status.json")["step"]
    found = runs.result(run, step)
    # Where the photographs lie is a part of the recipe.
    found["checkpoint"] = {name: value for name, value in found["checkpoint"].items() if name.endswith("tensors")}
    found["state"] = files.read_json(run / checkpoint.FOLDER / "last" / "state.json")
    return found


def train_with(monkeypatch: pytest.MonkeyPatch, prepare: Any, root: Path, run: Path, budget: float) -> int:
    flags = [f"--data.root={root}", f"--out={run}", f"--data.max-bad-fraction={budget}"]
    with monkeypatch.context() as patched:
        patched.setattr(train, "prepare", prepare)
        return train.main([*RECIPE, *flags])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run in which 5 % of the photographs were masked from the start."""
    folder = tmp_path_factory.mktemp("masked")
    root = photographs(folder / "people")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert train_with(monkeypatch, masked(victims_of(root, 0.05)), root, folder / "run", 0.2) == 0
    return end_of(folder / "run")


@pytest.mark.parametrize("kind", KINDS if FULL else list(KINDS)[::3])
def test_photographs_that_go_bad_are_as_if_they_had_never_been_there(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = photographs(tmp_path / "people")
    victims = victims_of(root, 0.05)
    assert len(victims) == 6
    assert train_with(monkeypatch, damaged(victims, kind), root, tmp_path / "run", 0.2) == 0
    found = end_of(tmp_path / "run")
    assert found == expected
    assert sum(line.get("unreadable_rows", 0) for line in found["log"]) > 0


def test_masked_rows_do_make_a_difference(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would compare nothing."""
    root = photographs(tmp_path / "people")
    assert train_with(monkeypatch, masked([]), root, tmp_path / "run", 0.2) == 0
    assert end_of(tmp_path / "run")["checkpoint"] != expected["checkpoint"]


@pytest.mark.parametrize("kind", ["missing", "another person's picture"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5] if FULL else [0.5])
def test_at_any_rate_exactly_the_rows_that_went_bad_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, kind: str
) -> None:
    root = photographs(tmp_path / "people", people=count(10, 42))
    victims, ends = victims_of(root, share), []
    lost: set[str] = set()
    for number, prepare in enumerate((masked(victims), damaged(victims, kind))):
        seen: Counter[int] = Counter()
        held: list[PhaseData] = []
        with monkeypatch.context() as patched:
            patched.setattr(train, "train_step", counting(seen))
            assert train_with(monkeypatch, holding(held, prepare), root, tmp_path / f"run{number}", 0.6) == 0
        index = held[0].train
        lost = {index.path(row) for row in range(len(index))} & {str(path) for path in victims}
        assert {index.path(row) for row in range(len(index)) if row not in seen} == lost
        assert set(seen.values()) == {EPOCHS}  # and every other one once an epoch
        ends.append(end_of(tmp_path / f"run{number}"))
    assert lost or share < 0.01
    assert ends[0] == ends[1]


def counting(seen: Counter[int]) -> Any:
    def counted(state: Any, batches: Any, counts: Any) -> Any:
        for batch in batches:
            seen.update(row for row in batch.rows.tolist() if row >= 0)
        return train_step(state, batches, counts)

    return counted


def holding(held: list[PhaseData], prepare: Any) -> Any:
    def prepared(*given: Any) -> tuple[PhaseData, ...]:
        held.extend(prepare(*given))
        return tuple(held)

    return prepared


def test_more_than_the_budget_ends_a_run_with_65_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path / "people")
    victims = victims_of(root, 0.5)
    assert train_with(monkeypatch, damaged(victims, "cut to 50 %"), root, tmp_path / "run", 0.1) == 65
    error = capsys.readouterr().err
    assert sum(str(path) in error for path in victims) == 10 and "truncated" in error
    status = files.read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 65) and "could not be used" in status["error"]


def rank(number: int, arguments: list[str], heard: str, victims: list[str], kind: str) -> int:
    """The life of one of two ranks in whose photographs these go bad, or are masked where no kind is given."""
    paths = [Path(path) for path in victims]
    prepare = damaged(paths, kind, run_is_main=number == 0) if kind else masked(paths)

    def together(recipe: Recipe, folder: Path, run: Runtime, *rest: Any) -> tuple[PhaseData, ...]:
        datasets: tuple[PhaseData, ...] = prepare(recipe, folder, run, *rest)
        run.barrier()  # nobody reads before the damage is done
        return datasets

    runs.instead("prepare", together)
    return runs.rank(number, arguments, heard)


def test_two_ranks_stay_together_where_photographs_of_one_go_bad(tmp_path: Path) -> None:
    root, ends = photographs(tmp_path / "people"), []
    victims = [str(path) for path in victims_of(root, 0.1)]
    for name, kind in (("masked", ""), ("damaged", "a web page")):
        flags = [*RECIPE, f"--data.root={root}", f"--out={tmp_path / name}", "--data.max-bad-fraction=0.3"]
        codes = start_ranks(rank, 2, flags, str(tmp_path / f"{name}.out"), victims, kind).wait()
        assert codes == [0, 0], (tmp_path / f"{name}.out").read_text()[-3000:]
        ends.append(end_of(tmp_path / name))
    assert ends[0] == ends[1]
    assert json.dumps(ends[0]).count('"unreadable_rows"') > 0
