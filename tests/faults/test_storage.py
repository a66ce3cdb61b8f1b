"""Disks that fill up, refuse or go away: what is on them stays sound, what cannot be written is said, and the same
command goes on when there is room again.

Full disks are real small file systems where this process may mount one, else a limit on the size of files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard.writer import SummaryWriter

from facefast import train
from facefast.models import checkpoint
from facefast.runtime import files, manifest
from facefast.runtime.exits import StorageError
from facefast.runtime.lines import read_lines
from facefast.training import choice, finish, step
from tests.support import disks, small

pytestmark = pytest.mark.faults
TINY = (
    "scratch",
    "--data.format=celeba",
    "--data.test-fraction=0.5",
    "--image.size=32",
    "--model.embedding=16",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--eval.batch-size=8",
    "--eval.every=100",
    "--phases.scratch.steps=6",
    "--phases.scratch.batch-size=4",
    "--precision=fp32",
    "--log-every=1",
    "--save-every=2",
    "--keep=9",
)
CHECKPOINT = 7_700_000
"""Bytes of one of its checkpoints, rounded up."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def undisturbed(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that a run ends with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert begin(drawn, out) == 0
    return weights(out)


def begin(drawn: Path, out: Path, *more: str) -> int:
    return train.main([*TINY, f"--data.root={drawn}", f"--out={out}", *more])


def weights(out: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.newest(out)
    assert path is not None and path.name == "step-0000006"
    return checkpoint.read_tensors(path, "model")


def assert_ends_like(out: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    found = weights(out)
    assert found.keys() == undisturbed.keys()
    assert all(torch.equal(found[name], undisturbed[name]) for name in found)
    assert not list(out.rglob("*.tmp"))
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl") if line["split"] == "train"]
    assert steps == sorted(set(steps))


def status(out: Path) -> dict[str, Any]:
    return dict(files.read_json(out / "status.json"))


# A full disk, at each moment of a run.


@pytest.fixture
def limited_disk(tmp_path: Path) -> Iterator[Callable[..., contextlib.AbstractContextManager[Path]]]:
    """A folder with room for a number of bytes, where one may be mounted; elsewhere what asks for room is told of no
    more than that."""
    before = files.free_bytes

    @contextlib.contextmanager
    def make(number: int) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        if disks.can_mount():
            with disks.disk(folder, str(number)):
                yield folder
        else:

            def left(path: Path) -> int:
                return number - sum(len(content) for content in disks.tree(folder).values())

            files.free_bytes = left
            try:
                yield folder
            finally:
                files.free_bytes = before

    yield make
    files.free_bytes = before


def more_room(folder: Path) -> None:
    if disks.can_mount():
        disks.remount(folder, "size=200m")
    else:
        files.free_bytes = lambda path: 200_000_000


@pytest.mark.parametrize("checkpoints", [0, 1, 2])
def test_a_disk_with_room_for_a_few_checkpoints_keeps_those_and_the_run_goes_on_to_the_same_bits(
    drawn: Path,
    checkpoints: int,
    limited_disk: Callable[..., contextlib.AbstractContextManager[Path]],
    undisturbed: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with limited_disk(300_000 + checkpoints * CHECKPOINT) as folder:
        out = folder / "run"
        assert begin(drawn, out) == 74
        said = capsys.readouterr().err
        assert f"cannot write {out}/checkpoints" in said and "bytes are needed" in said and "are free there" in said
        found = status(out)
        assert (found["state"], found["exit_code"], found["step"]) == ("failed", 74, 2 * checkpoints)
        steps = sorted(out.glob("checkpoints/step-*"))
        assert len(steps) == checkpoints
        for path in steps:
            manifest.verify(path)
        assert not list(out.rglob("*.tmp"))
        more_room(folder)
        assert begin(drawn, out) == 0
        assert status(out)["state"] == "done"
        assert_ends_like(out, undisturbed)


@pytest.mark.parametrize("step", [2, 4])
def test_a_disk_that_lies_about_its_room_loses_no_checkpoint(
    drawn: Path, tmp_path: Path, step: int, undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota, or another process that is faster: the writing itself fails, in the middle of a file."""
    real = checkpoint.save

    def limited(folder: Path, at: int, **rest: Any) -> Path:
        with disks.files_up_to(1_000_000) if at == step else contextlib.nullcontext():
            return real(folder, at, **rest)

    monkeypatch.setattr(checkpoint, "save", limited)
    assert begin(drawn, tmp_path) == 74
    found = status(tmp_path)
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 74, step - 2)
    assert "File too large" in found["error"] and "bytes are needed" in found["error"]
    assert len(list(tmp_path.glob("checkpoints/step-*"))) == step // 2 - 1
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert begin(drawn, tmp_path) == 0
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_disk_that_is_full_at_the_start_is_found_out_before_any_photograph_is_read(
    drawn: Path, tmp_path: Path, room: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_source", lambda *_: pytest.fail("it went on"))
    with disks.files_up_to(room):
        code = begin(drawn, tmp_path / "run")
    assert code == 74
    assert f"cannot write {tmp_path / 'run'}" in capsys.readouterr().err
    if room > 100:  # the status itself had room
        assert status(tmp_path / "run")["exit_code"] == 74
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_index_for_which_there_is_no_room_ends_the_run_with_74(drawn: Path, tmp_path: Path) -> None:
    with disks.files_up_to(6000):  # its documents are smaller
        assert begin(drawn, tmp_path) == 74
    assert "index.npz: " in status(tmp_path)["error"] and "bytes are needed" in status(tmp_path)["error"]
    assert begin(drawn, tmp_path) == 0


@pytest.mark.parametrize("kind", ["limit", *(["disk"] if disks.can_mount() else [])])
def test_a_full_disk_has_room_for_the_reason_in_the_old_status(tmp_path: Path, kind: str) -> None:
    reason = "no room left: " + 3000 * "é"
    with disks.disk(tmp_path / "disk", "64k") if kind == "disk" else contextlib.nullcontext(tmp_path) as folder:
        finish.write_status(folder, "running", step=7, best=None)
        if kind == "disk":
            disks.fill(folder)
            assert files.free_bytes(folder) == 0
            finish.fail(folder, 74, reason)
        else:
            with disks.files_up_to(4096):
                finish.fail(folder, 74, reason)
        found = status(folder)
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 74, 7)
    assert reason.startswith(found["error"]) and len(found["error"]) > 50


# Who only looks on.


class Broken:
    """A library that fails at its n-th use."""

    def __init__(self, error: Exception, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("a bug"), PermissionError(13, "no")]
)
@pytest.mark.parametrize("name", ["add_scalar", "add_images", "add_embedding", "close", "__init__"])
def test_tensorboard_that_fails_ends_no_training(
    drawn: Path,
    tmp_path: Path,
    name: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(SummaryWriter, name, Broken(error, 3 if name == "add_scalar" else 0))
    assert begin(drawn, tmp_path, "--phases.scratch.steps=2", "--projector") == 0
    said = capsys.readouterr().out
    assert said.count("warning: TensorBoard's files cannot be written") == 1
    assert status(tmp_path)["log_failures"] >= 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4


@pytest.mark.parametrize("place", ["metrics.jsonl", "tensorboard", "evaluation.json", "report.html"])
def test_a_place_where_the_log_cannot_be_written_ends_no_training(
    drawn: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "tensorboard":
        (tmp_path / place).write_text("in the way")
    else:
        (tmp_path / place / "in the way").mkdir(parents=True)
    assert begin(drawn, tmp_path, "--phases.scratch.steps=2") == 0
    assert capsys.readouterr().out.count("warning: ") == 1
    assert status(tmp_path)["state"] == "done" and status(tmp_path)["log_failures"] >= 1
    assert checkpoint.newest(tmp_path) is not None


def test_curves_whose_folder_goes_in_the_middle_end_no_training(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = checkpoint.save

    def save(folder: Path, at: int, **rest: Any) -> Path:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        return real(folder, at, **rest)

    monkeypatch.setattr(checkpoint, "save", save)
    assert begin(drawn, tmp_path) == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert (said.out + said.err).count("warning: TensorBoard's files cannot be written") == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_takes_nothing_ends_no_training(drawn: Path, tmp_path: Path, stream: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "facefast.train", *TINY, f"--data.root={drawn}", f"--out={tmp_path}"],
            stdout=full if stream == "stdout" else subprocess.PIPE,
            stderr=full if stream == "stderr" else subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert ended.returncode == 0, ended
    assert status(tmp_path)["state"] == "done"


# A run folder that goes away.


def remove(folder: Path) -> None:
    """Until nothing is left: a checkpoint may be in the making there, by another thread."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def leave_a_folder(folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.mkdir()


@pytest.mark.parametrize(
    ("away", "said"),
    [
        (remove, "it was removed, renamed or unmounted"),
        (lambda folder: folder.rename(folder.with_name("away")), "it was removed, renamed or unmounted"),
        (leave_a_folder, "another folder has its name now"),
    ],
)
@pytest.mark.parametrize("moment", ["update", "save", "end"])
def test_a_run_whose_folder_is_gone_ends_with_74_and_makes_nothing_anew(
    drawn: Path,
    tmp_path: Path,
    away: Callable[[Path], Any],
    said: str,
    moment: str,
    undisturbed: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    if moment == "update":
        real = step.train_step

        def train_step(state: Any, *rest: Any) -> Any:
            if state.step == 2:
                away(out)
            return real(state, *rest)

        monkeypatch.setattr(train, "train_step", train_step)
    elif moment == "save":
        write = checkpoint.write_tensors

        def write_tensors(path: Path, named: Any) -> None:
            if path.parent.name == ".step-0000004.tmp" and out.exists():
                away(out)
            write(path, named)

        monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    else:
        report = choice.report_phase

        def last(*rest: Any) -> None:
            report(*rest)
            away(out)

        monkeypatch.setattr(train, "report_phase", last)
    assert begin(drawn, out, "--projector") == 74
    message = capsys.readouterr().err
    assert f"the run folder {out} is gone: {said}" in message and "Traceback" not in message
    assert not out.exists() or list(out.iterdir()) == []
    if away is not remove:
        monkeypatch.undo()
        shutil.rmtree(out, ignore_errors=True)
        (tmp_path / "away").rename(out)
        assert begin(drawn, out, "--projector") == 0
        assert_ends_like(out, undisturbed)


# Folders that refuse.


@pytest.mark.parametrize("place", ["a file", "below a file", "a link to nowhere that is a file's", "too long"])
def test_an_out_that_can_be_no_folder_is_refused_before_any_photograph_is_read(
    drawn: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "find_source", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "below")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "a link to nowhere that is a file's": tmp_path / "link",
        "too long": tmp_path / (300 * "x"),
    }[place]
    assert begin(drawn, out) == 74
    said = capsys.readouterr().err
    assert "cannot write" in said and "choose another --out" in said and "Traceback" not in said
    assert (tmp_path / "file").read_text() == "mine"


def as_another(call: Callable[[], int]) -> int:
    """What a call returns in a process that is not root, to whom nothing is forbidden."""
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            code = call()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_folders_without_permission_are_refused_before_any_work() -> None:
    def refused(path: Path, folder: bool) -> int:
        try:
            files.require_writable(path, folder=folder)
        except StorageError as error:
            return 74 if "Permission denied" in str(error) or "it is a file" in str(error) else 1
        return 0

    with tempfile.TemporaryDirectory() as name:  # pytest's own lets nobody else in
        top = Path(name)
        top.chmod(0o755)
        for mode, expected in ((0o555, 74), (0o777, 0)):
            place = top / oct(mode)
            place.mkdir()
            place.chmod(mode)
            for path in (place / "out", place / "deep" / "out"):
                for folder in (True, False):
                    assert as_another(functools.partial(refused, path, folder)) == expected
            assert as_another(functools.partial(refused, place, True)) == expected
        for folder in (True, False):
            assert as_another(functools.partial(refused, Path("/dev/null"), folder)) == (74 if folder else 0)


if disks.can_mount():

    def test_a_read_only_disk_is_refused_before_any_photograph_is_read(
        drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(train, "find_source", lambda *_: pytest.fail("it went on"))
        with disks.disk(tmp_path / "disk", "64k") as folder:
            (folder / "old").mkdir()
            disks.remount(folder, "ro")
            for out in (folder / "new", folder / "old"):
                assert begin(drawn, out) == 74
                assert "Read-only file system" in capsys.readouterr().err
