"""What a run leaves of its training: lines of metrics.jsonl and of the terminal, TensorBoard, what bounded it.

Written by rank 0 alone. The device is read when a line is due, never in between.
"""

from __future__ import annotations

import contextlib
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

from facefast.runtime import files
from facefast.runtime.exits import NumericsError
from facefast.runtime.lines import Lines, read_lines
from facefast.runtime.progress import Progress
from facefast.runtime.terminal import escape_letter, tell

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
    epochs: float
    """Epochs of the phase."""
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
        self._lines: Lines | None = None
        self._board: SummaryWriter | None = None
        self._ended: Position | None = None  # of an epoch that is over and was not told yet
        self._of_epoch: Tensor | None = None
        self._rate = math.nan
        self._progress: Progress | None = None
        if enabled:
            self._progress = Progress(total_steps, first_step or 0)
            self._excepthook = _without_tensorboards_thread()
            with self.tolerant("metrics.jsonl"):
                self._lines = Lines(folder / "metrics.jsonl", first_step)
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
        self._tell_epoch()
        if loader_waited < self._loader_waited:  # a new phase opened another loader
            self._loader_waited = 0.0
        self._waited += loader_waited - self._loader_waited
        self._loader_waited = loader_waited
        self._sums = stats if self._sums is None else self._sums + stats  # on the device: nothing is waited for
        self._of_epoch = stats if self._of_epoch is None else self._of_epoch + stats
        if at.epoch == int(at.epoch):
            self._ended = at
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
        self._rate = fields["images_per_second"]
        if self._progress is not None:
            waits = f"  data wait {fields['data_wait_fraction']:.0%}" if fields["data_wait_fraction"] > 0.02 else ""
            self._progress.update(
                at.step,
                f"{at.phase} {_of(at)}",
                f"{_learnt(fields['loss'], fields['accuracy'])}  {self._rate:.0f} img/s{waits}",
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

    def evaluation(
        self, at: Position, results: Mapping[str, float], metric: str, best: float | None, improved: bool
    ) -> None:
        """Logs what the validation part gave and tells of the epoch that it ended.

        Args:
            at: where the run stands.
            results: every number.
            metric: the one of them that decides.
            best: the best it was so far; None where it decides nothing.
            improved: whether it is that now.
        """
        self._write(at, "validation", results)
        told = f"{metric} {_human(metric, results[metric])}"
        self._tell_epoch(at, told if best is None else f"{told}  best {_human(metric, best)}", improved)
        self._note_unknown(results)
        self._let_pass()

    def report(self, at: Position, row: str, results: Mapping[str, float]) -> None:
        """Logs a row of the final table, which the test part gave, and says its headlines."""
        self._write(at._replace(phase=row), "test", results)
        known = [name for name, value in results.items() if not math.isnan(value)]
        shown = [name for name in known if name in HEADLINES or name.endswith(("/accuracy", "/mae"))]
        self.say(f"{row}, test: {', '.join(f'{name} {_human(name, results[name])}' for name in shown)}")
        self._note_unknown(results)
        self._let_pass()

    def _note_unknown(self, results: Mapping[str, float]) -> None:
        unknown = [name for name, value in results.items() if math.isnan(value)]
        if unknown and not self._said_unknown:
            self._said_unknown = True
            self.say(f"note: the evaluation set has too few pairs for {', '.join(unknown)}: they stay empty")

    def _let_pass(self) -> None:
        """The time since the last update does not count as training."""
        # As if the clock had stood still: the line's time begins later by what the evaluation took.
        self._since += time.perf_counter() - self._stepped
        self._stepped = time.perf_counter()

    def _tell_epoch(self, at: Position | None = None, measured: str = "", improved: bool = False) -> None:
        """One line about the epoch that is over, if one is: `Epoch 3/10  PHASE  loss ...  acc ...  METRIC ...  best
        ...`.

        Args:
            at: where the run stands; a measurement between two epochs has a line, too.
            measured: what validation gave.
            improved: whether that is the best so far.
        """
        at, self._ended = at or self._ended, None
        if at is None:
            return
        sums, self._of_epoch = self._of_epoch, None
        if self._progress is None:
            return
        learnt = ""
        if sums is not None:  # waits for the device, which an evaluation has done and a checkpoint will do anyhow
            loss_sum, correct, _, _, labelled, loss_rows, *_ = sums.tolist()
            learnt = _learnt(
                loss_sum / loss_rows if loss_rows else math.nan, correct / labelled if labelled else math.nan
            )
        parts = [f"Epoch {_of(at)}", at.phase, learnt, measured]
        self._progress.say("  ".join(part for part in parts if part), good=improved)

    def _write(self, at: Position, split: str, fields: Mapping[str, float]) -> None:
        """One JSON object in metrics.jsonl and its scalars in TensorBoard."""
        if not self._enabled:
            return
        finite = files.strict(fields)
        record = {"step": at.step, "phase": at.phase, "epoch": round(at.epoch, 4), "split": split}
        if self._progress is not None:
            self._progress.record(record | finite)
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
        if self._enabled and self._progress is not None:
            self._tell_epoch()
            self._progress.say(text)

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
            self._tell_epoch()
            if self._progress is not None:
                self._progress.close()
            threading.excepthook = self._excepthook
            self._enabled = False


def _answer(explain: Callable[[], str]) -> str:
    """What is wrong, or why that cannot be said: the run's own end must not be hidden by the search for its cause."""
    try:
        return explain()
    except Exception as error:
        return f"the search for the cause failed ({error})"


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


def _of(at: Position) -> str:
    return f"{at.epoch:.3g}/{at.epochs:.3g}"


def _learnt(loss: float, accuracy: float) -> str:
    return f"loss {loss:.3f}  acc {accuracy:.2%}"


def _human(name: str, value: float) -> str:
    return f"{value:.4g}" if name == "loss" or name.endswith("/mae") else f"{value:.2%}"


def verdict(speeds: list[Speed], allreduce_seconds: float, transfer_seconds: float = 0.0) -> dict[str, Any]:
    """What bounded the run, and what would change that.

    Args:
        speeds: `RunLog.speeds`.
        allreduce_seconds: measured time of one all-reduce of the gradients, 0 with one process.
        transfer_seconds: measured time of one picture's way to the device, 0 on the CPU.

    Returns:
        {"bound_by", "advice", "images_per_second", "data_wait_fraction", "transfer_fraction", "allreduce_fraction"};
        "bound_by" and "advice" are empty where there was no update.
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
        "": "",
        "compute": "use precision bf16 where hardware and network gain by it, --compile always, a smaller backbone or "
        "image.size",
    }
    if wait > 0.1:  # the step waits for pictures: for their bytes' way, where that alone explains most of it
        bound = "transfer" if transfer > wait / 2 else "decode"
    else:
        bound = "all-reduce" if allreduce > 0.3 else "compute"
    if not pictures:
        bound = ""
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
