"""What a run says while it trains: progress bar, metrics.jsonl, TensorBoard and the verdict on what bounds it.

Written by rank 0 alone. The device is read when a line is due, never in between.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from facefast.runtime import files
from facefast.runtime.exits import NumericsError
from facefast.runtime.terminal import empty_broken, escape_letter, heard, plain, tell

HEADLINES = ("loss", "top1", "verification_accuracy", "tar@1e-2", "known_verification_accuracy")
STATS = ("loss_sum", "correct", "rows", "skipped", "labelled", "loss_rows")
"""What an update adds up on the device, float32, over all ranks, before the terms of the objective."""
LOST_UPDATES = 20
"""Updates in a row with a non-finite gradient after which a run stops."""


class Position(NamedTuple):
    """Where a run stands after an update."""

    step: int
    """Updates done in the whole run."""
    phase: str
    epoch: float
    lr: float
    last: bool
    """Whether the phase ends here."""


class Speed(NamedTuple):
    """What was done between two metric lines, and how long it took."""

    updates: int
    pictures: int
    seconds: float
    waited: float


class RunLog:
    """Writes one run's metrics; on a rank other than 0 it only counts.

    What it writes is for people to look at: where it cannot, a full disk or a bug of a library, that is said once and
    counted, and training goes on.

    Args:
        first_step: that of the checkpoint a run goes on from; None for a new start, which keeps nothing of a run that
            was in the folder before.
    """

    def __init__(self, folder: Path, *, enabled: bool, total_steps: int, first_step: int | None, every: int) -> None:
        self._enabled = enabled
        self._every = every
        self._lost = 0
        self._said_unknown = False
        self.speeds: list[Speed] = []
        self.failures = 0
        """Lines, curves and pictures that could not be written."""
        self._failed: set[str] = set()
        self._restart()
        self._loader_waited = 0.0
        self._lines: _Lines | None = None
        self._board: SummaryWriter | None = None
        if enabled:
            self._bar = tqdm(disable=True)
            with heard():
                self._bar = tqdm(
                    total=total_steps, initial=first_step or 0, unit="step", dynamic_ncols=True, mininterval=1
                )
            self._excepthook = _without_tensorboards_thread()
            with self.tolerant("metrics.jsonl"):
                self._lines = _Lines(folder / "metrics.jsonl", first_step)
            purge = 0 if first_step is None else first_step + 1  # TensorBoard hides what was logged from there on
            with self.tolerant("TensorBoard's files"):
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    @contextlib.contextmanager
    def tolerant(self, what: str) -> Iterator[None]:
        """Within it nothing that fails ends the run: it is said once for each `what`, and counted."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            if what not in self._failed:
                self._failed.add(what)
                reason = f"{type(error).__name__}: {error}" if not files.is_refusal(error) else str(error)
                text = f"warning: {what} cannot be written ({reason}); training goes on, what is lost is counted"
                (self.say if self._enabled else tell)(text)

    def _restart(self) -> None:
        self._sums: Tensor | None = None
        self._updates = self._pictures = 0
        self._waited = 0.0
        self._since = self._stepped = time.perf_counter()

    def step(
        self,
        at: Position,
        stats: Tensor,
        pictures: int,
        loader_waited: float,
        terms: tuple[str, ...] = ("identity",),
        explain: Callable[[], str] = str,
    ) -> None:
        """Takes one update; writes a line, and reads the device for it, when one is due.

        Args:
            at: where the run stands.
            stats: [6 + 2 T] float32 on the device: `STATS`, the terms' sums, and 1 for each term that is not finite.
            pictures: pictures of this update, over all ranks.
            loader_waited: seconds for which this rank has waited for data since its loader was opened.
            terms: names of the objective's T terms.
            explain: what is wrong with this update, asked where the run ends with it.

        Raises:
            NumericsError: `LOST_UPDATES` updates in a row were skipped for a non-finite gradient.
        """
        if loader_waited < self._loader_waited:  # a new phase opened another loader
            self._loader_waited = 0.0
        self._waited += loader_waited - self._loader_waited
        self._loader_waited = loader_waited
        self._sums = stats if self._sums is None else self._sums + stats  # on the device: nothing is waited for
        self._updates += 1
        self._pictures += pictures
        self._stepped = time.perf_counter()
        if at.step % self._every and not at.last:
            return
        # The one moment when the host waits for the device. Every rank does it, also those that write nothing: all must
        # stop at the same update where too many are lost.
        loss_sum, correct, rows, skipped, labelled, loss_rows, *others = self._sums.tolist()
        sums, broken = others[: len(terms)], others[len(terms) :]
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self.speeds.append(Speed(self._updates, self._pictures, seconds, self._waited))
        # Counted by whole lines: which of a line's updates were skipped is not known.
        self._lost = self._lost + self._updates if skipped == self._updates else 0
        fields = {
            "loss": loss_sum / loss_rows if loss_rows else math.nan,
            "lr": at.lr,
            "accuracy": correct / labelled if labelled else math.nan,
            "images_per_second": self._pictures / seconds,
            "data_wait_fraction": self._waited / seconds,
            "rows": int(rows),
            "unreadable_rows": self._pictures - int(rows),
            "skipped_steps": int(skipped),
        }
        if len(terms) > 1:
            fields |= {
                f"loss/{name}": total / loss_rows if loss_rows else math.nan
                for name, total in zip(terms, sums, strict=True)
            }
        self._write(at, "train", fields)
        if self._enabled:
            with heard():
                self._bar.n = at.step
                self._bar.set_description(at.phase)
                self._bar.set_postfix_str(
                    f"loss {fields['loss']:.3f} acc {fields['accuracy']:.3f} lr {at.lr:.2g} "
                    f"{fields['images_per_second']:.0f} img/s, data wait {fields['data_wait_fraction']:.1%}"
                )
        self._restart()
        if self._lost >= LOST_UPDATES:
            names = [name for name, count in zip(terms, broken, strict=True) if count]
            lost = f"the loss terms {', '.join(names)} are not finite" if names else "every loss term is finite"
            why = _answer(explain)
            raise NumericsError(
                f"the last {self._lost} updates, up to step {at.step} of phase {at.phase}, had non-finite "
                f"gradients and were skipped: {lost}; {why}. The newest checkpoint is sound; lower the learning "
                "rate or the loss scale, or use precision fp32"
            )

    def evaluation(self, at: Position, results: dict[str, float], metric: str, improved: bool) -> None:
        """Logs what the validation part gave and prints its headlines, as `_evaluated` does; says whether the deciding
        `metric` is the best so far."""
        self._evaluated(at, "validation", results, f"  (best {metric} so far)" if improved else "")

    def report(self, at: Position, row: str, results: dict[str, float]) -> None:
        """Logs a row of the final table, which the test part gave, and prints its headlines."""
        self._evaluated(at._replace(phase=row), "test", results, "")

    def _evaluated(self, at: Position, split: str, results: dict[str, float], remark: str) -> None:
        """The time since the last update does not count as training."""
        self._write(at, split, results)
        shown = [name for name in results if name in HEADLINES or name.endswith(("/accuracy", "/mae"))]
        numbers = ", ".join(f"{name} {_human(name, results[name])}" for name in shown)
        self.say(f"{at.phase} epoch {at.epoch:.3g}, {split}: {numbers}{remark}")
        unknown = [name for name, value in results.items() if math.isnan(value)]
        if unknown and not self._said_unknown:
            self._said_unknown = True
            self.say(f"note: the evaluation set has too few pairs for {', '.join(unknown)}: they stay empty")
        # As if the clock had stood still: the line's time begins later by what the evaluation took.
        self._since += time.perf_counter() - self._stepped
        self._stepped = time.perf_counter()

    def _write(self, at: Position, split: str, fields: Mapping[str, float]) -> None:
        """One JSON object in metrics.jsonl and its scalars in TensorBoard."""
        if not self._enabled:
            return
        finite = files.strict(fields)
        record = {"step": at.step, "phase": at.phase, "epoch": round(at.epoch, 4), "split": split}
        with self.tolerant("metrics.jsonl"):
            if self._lines is None:
                raise OSError("it could not be opened")
            # What a run that goes on asks the test part again, it has the same answer to: one line is enough.
            if split != "test" or not self._lines.had(record | finite):
                self._lines.append(record | finite)

        def draw(board: SummaryWriter) -> None:
            for name, value in finite.items():
                if value is not None:
                    board.add_scalar(f"{split}/{name}", value, at.step)

        self._on_board(draw)

    def _on_board(self, draw: Callable[[SummaryWriter], Any]) -> None:
        with self.tolerant("TensorBoard's files"):
            if self._board is None:
                raise OSError("they could not be opened")
            try:
                draw(self._board)
            except Exception:
                self._board = None  # its writer does not recover
                raise

    def pictures(self, name: str, pictures: NDArray[np.uint8], step: int) -> None:
        """A batch as TensorBoard pictures: uint8 [B, H, W, 3], RGB."""
        if self._enabled:
            self._on_board(lambda board: board.add_images(name, pictures, step, dataformats="NHWC"))

    def embeddings(
        self, embeddings: Tensor, names: list[str], step: int, pictures: NDArray[np.uint8] | None = None
    ) -> None:
        """[N, D] embeddings with a name each, for TensorBoard's projector, and uint8 [N, S, S, 3] small pictures of
        them."""
        if self._enabled:
            lines = ["".join(map(escape_letter, name)) for name in names]  # a line and a column of its table each
            shown = None if pictures is None else torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
            self._on_board(
                lambda board: board.add_embedding(embeddings, metadata=lines, label_img=shown, global_step=step)
            )

    def outcome(self, options: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """What TensorBoard's HPARAMS page compares runs by.

        Args:
            options: of the recipe; those that are no number, text or yes or no are written as text.
            results: final numbers, which become scalars `final/NAME`.
            step: the last.
        """
        plain_options = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in options.items()
        }
        finals = {f"final/{name}": value for name, value in results.items() if math.isfinite(value)}

        def draw(board: SummaryWriter) -> None:
            # SummaryWriter.add_hparams would begin a second run beside this one, named by the time.
            for part in hparams(plain_options, finals):
                board._get_file_writer().add_summary(part)
            for name, value in finals.items():
                board.add_scalar(name, value, step)

        if self._enabled:
            self._on_board(draw)

    def precision_and_recall(self, name: str, right: NDArray[np.bool_], scores: NDArray[np.float64], step: int) -> None:
        """A curve over all thresholds, of [N] trials and their scores from 0 to 1."""
        if self._enabled and right.any():
            self._on_board(lambda board: board.add_pr_curve(name, right.astype(np.int64), scores, step))

    def say(self, text: str) -> None:
        """A line on the terminal that does not break the progress bar."""
        if self._enabled:
            text = plain(text)
            try:
                self._bar.write(text)
            except (OSError, ValueError):  # of the bar or of the text: they go to two places
                empty_broken()
                tell(text)

    def all_speeds(self) -> list[Speed]:
        """`speeds`; of a run that had nothing left to do, those that its lines tell of."""
        return self.speeds or (_speeds_in(self._lines.path) if self._lines is not None else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        if self._enabled:
            if self._board is not None:
                self._on_board(SummaryWriter.close)
            if self._lines is not None:
                self._lines.close()
            with heard():
                self._bar.close()
            threading.excepthook = self._excepthook
            self._enabled = False


def _answer(explain: Callable[[], str]) -> str:
    """What is wrong, or why that cannot be said: the run's own end must not be hidden by the search for its cause."""
    try:
        return explain()
    except Exception as error:
        return f"the search for the cause failed ({error})"


class _Lines:
    """metrics.jsonl: each line is there whole or not at all, also on a disk that is full for a while.

    Args:
        path: begun without the lines that a run wrote after the checkpoint it resumes from, and without damaged ones.
        first_step: the checkpoint's; None keeps none.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, first_step: int | None) -> None:
        self.path = path
        # The run makes the updates after its checkpoint again: with the old lines every one of them would stand twice.
        lines = [] if first_step is None else [line for line, at in _records(path) if at["step"] <= first_step]
        kept, self._kept = b"".join(lines), set(lines)
        before = path.read_bytes() if path.exists() else b""
        if not before.startswith(kept):
            with files.replacing(path, len(kept)) as aside:
                aside.write_bytes(kept)
        # Unbuffered: a run that is killed leaves every line, and what a full disk did not take is known at once.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed by `close`
        self._file.truncate(len(kept))  # which needs no room
        self._torn = False

    def had(self, record: Mapping[str, Any]) -> bool:
        """Whether the run had written this line before it was taken up again."""
        return _line(record) in self._kept

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError where the line cannot be written."""
        line = _line(record)
        if self._torn:  # what is left of the line before ends here
            line = b"\n" + line
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._torn = True
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._torn = False
            raise
        self._torn = False

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of metrics.jsonl with what they say; those that a crash or a full disk has torn are left out."""
    content = path.read_bytes() if path.is_file() else b""
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:  # of bytes that are no text, too
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and line.endswith(b"\n"):
            yield line, record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What the whole lines of metrics.jsonl say; none where there is no such file."""
    return [record for _, record in _records(path)]


def _speeds_in(path: Path) -> list[Speed]:
    found, before = [], 0
    with contextlib.suppress(OSError):
        for line in read_lines(path):
            rate, waited = line.get("images_per_second"), line.get("data_wait_fraction")
            if line.get("split") != "train" or not rate or waited is None:
                continue
            pictures = line["rows"] + line["unreadable_rows"]
            found.append(Speed(line["step"] - before, pictures, pictures / rate, waited * pictures / rate))
            before = line["step"]
    return found


def _without_tensorboards_thread() -> Callable[[threading.ExceptHookArgs], Any]:
    """Lets TensorBoard's writer thread end without a traceback: its error is raised again where the next is written.

    Returns:
        What showed the errors of threads before.
    """
    before = threading.excepthook

    def show(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = show
    return before


def _human(name: str, value: float) -> str:
    return f"{value:.4g}" if name == "loss" or name.endswith("/mae") else f"{value:.2%}"


def verdict(speeds: list[Speed], allreduce_seconds: float, transfer_seconds: float = 0.0) -> dict[str, Any]:
    """What bounded the run, and what would change that.

    Args:
        speeds: `RunLog.speeds`.
        allreduce_seconds: measured time of one all-reduce of the gradients, 0 with one process.
        transfer_seconds: measured time of one picture's way to the device, 0 on the CPU.

    Returns:
        {"bound_by", "advice", "images_per_second", "data_wait_fraction", "transfer_fraction", "allreduce_fraction"}.
    """
    seconds = max(sum(speed.seconds for speed in speeds), 1e-9)
    wait = sum(speed.waited for speed in speeds) / seconds
    allreduce = min(1.0, allreduce_seconds * sum(speed.updates for speed in speeds) / seconds)
    pictures = sum(speed.pictures for speed in speeds)
    transfer = min(1.0, transfer_seconds * pictures / seconds)
    advice = {
        "decode": "raise --threads, decode on a GPU, or store pictures nearer to image.size",
        "transfer": "store pictures nearer to image.size, or use a machine with a faster way to its GPU",
        "all-reduce": "raise the batch size or phases.K.accumulate, or use a faster network",
        "compute": "use precision bf16 where the hardware has it, --compile, a smaller backbone or image.size",
    }
    if wait > 0.1:  # the step waits for pictures: for their bytes' way, where that alone explains most of it
        bound = "transfer" if transfer > wait / 2 else "decode"
    else:
        bound = "all-reduce" if allreduce > 0.3 else "compute"
    return {
        "bound_by": bound,
        "advice": advice[bound],
        "images_per_second": pictures / seconds,
        "data_wait_fraction": wait,
        "transfer_fraction": transfer,
        "allreduce_fraction": allreduce,
    }


PACKAGES = ("facefast", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "timm", "safetensors")


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Command, versions and hardware, for environment.json."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "world_size": world_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "packages": versions,
    }
