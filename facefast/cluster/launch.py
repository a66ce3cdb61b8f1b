"""One node's part of a run, for schedulers: torchrun that ends with the run's own exit code and takes its time to stop.

    python -m facefast.cluster.launch [torchrun's options] -- [RECIPE] [facefast train's options]

torchrun alone ends with 1 whatever its workers said, and kills them 30 seconds after it was asked to stop, which may be
less than a checkpoint takes. Here it ends with their exit code (`facefast.runtime.exits`), and a signal goes to the
workers and nobody else: they save, leave with 75, and torchrun finds nothing left to kill. It waits for as long as the
scheduler does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from facefast.runtime import exits, terminal

# Torch is imported when the signals are heard: the first process of a container is deaf to those it has no handler for.

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
USAGE = "python -m facefast.cluster.launch [torchrun's options] -- [RECIPE] [facefast train's options]"
MODULE = "facefast.train"
SENT = 128
"""What shells add to the number of a signal that ended a process."""
FATAL = (exits.EXIT_USAGE, exits.EXIT_DATA, exits.EXIT_NUMERICS, exits.EXIT_STORAGE)
"""What the same command meets again."""


class Stop:
    """Whether a signal has asked the run to stop; hands every signal on to the workers."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        found = workers()
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        if not found:  # still waiting for other nodes: there is nothing to save
            raise SystemExit(exits.EXIT_PREEMPTED)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within it signals to stop come here."""
        before = {number: signal.signal(number, self) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def workers() -> list[int]:
    """Processes of the run on this node: children of this one that know their local rank."""
    found, mine = [], str(os.getpid()).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
            if parent == mine and b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def code_of(codes: Sequence[int], asked: bool) -> int:
    """The run's exit code by those of the workers that failed, minus a signal's number where that ended one.

    What the same command would meet again comes before what it goes on from, and a worker that was killed from outside
    before those that only missed it. A worker that was asked to stop before it could hear has nothing to save.
    """
    codes = [code for code in codes if code != exits.EXIT_DONE]
    if asked and all(code == exits.EXIT_PREEMPTED or code < 0 for code in codes):
        return exits.EXIT_PREEMPTED
    for code in (*FATAL, exits.EXIT_BUG):
        if code in codes:
            return code
    unknown = [code for code in codes if code > 0 and code != exits.EXIT_PREEMPTED]
    killed = [SENT - code for code in codes if code < 0 and code != -signal.SIGTERM]  # SIGTERM: by torchrun, as others
    terminated = [SENT - code for code in codes if code < 0]
    ended = [code for code in codes if code == exits.EXIT_PREEMPTED]
    return next(iter([*unknown, *killed, *ended, *terminated]), exits.EXIT_BUG)


def launch(torchrun: list[str], train: list[str], stop: Stop) -> int:
    """Runs this node's workers to their end; returns the run's exit code.

    Args:
        torchrun: its options.
        train: the words of `facefast train`.
    """
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    # SIGQUIT alone stays torchrun's.
    asked = run.parse_args([*torchrun, "--signals-to-handle", "SIGQUIT", "-m", MODULE, *train])
    # Where this node stands among those of the job: Kubernetes' word for it, or that of a step of Slurm's.
    index = os.environ.get("JOB_COMPLETION_INDEX", os.environ.get("SLURM_NODEID"))
    asked.rdzv_conf = _with_host(asked, index)
    if asked.log_dir and index is not None:
        asked.log_dir = os.path.join(asked.log_dir, f"node-{index}")  # torchrun numbers ranks by node
    try:
        run.run(asked)
    except ChildFailedError as error:
        return code_of(_codes(error), stop.asked)
    except (RendezvousError, DistError) as error:
        failed = error.__context__
        if isinstance(failed, ChildFailedError):  # the store went while torchrun left it
            return code_of(_codes(failed), stop.asked)
        terminal.complain(f"error: {terminal.message(f'the other nodes cannot be reached: {error}; try again')}")
        return exits.EXIT_PREEMPTED
    return exits.EXIT_DONE


def _codes(error: Any) -> list[int]:
    return [failure.exitcode for failure in error.failures.values()]


def _with_host(asked: Any, index: str | None) -> str:
    """torchrun's rendezvous settings, in which the first node of a job keeps the store.

    torchrun would look its own name up to find that out, which the cluster may not know yet.
    """
    settings = str(asked.rdzv_conf)
    if index is None or asked.rdzv_backend != "c10d" or asked.standalone or "is_host" in settings:
        return settings
    return ",".join(filter(None, (settings, f"is_host={'true' if index == '0' else 'false'}")))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    stop = Stop()
    # A bug of torchrun's own is told as one; `on_failure`: what workers print is their own affair.
    with exits.exit_codes(lambda code, text: None) as outcome, stop.heard():
        if "--" not in words:
            raise ValueError(f"the words of facefast train stand behind a -- of their own: {USAGE}")
        cut = words.index("--")
        outcome.code = launch(words[:cut], words[cut + 1 :], stop)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
