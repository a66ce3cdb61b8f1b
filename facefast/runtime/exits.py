"""How a process ends: exit codes, the errors that stand for them, and who sees a message instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 64
EXIT_DATA = 65
EXIT_NUMERICS = 70
EXIT_STORAGE = 74
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C, as shells have it; training saves and leaves with `EXIT_PREEMPTED` instead."""


class DataError(ValueError):
    """More photographs are bad than the run accepts; the process ends with exit code 65."""


class NumericsError(RuntimeError):
    """Gradients stayed non-finite; the process ends with exit code 70."""


class StorageError(OSError):
    """A checkpoint could not be written or read; the process ends with exit code 74."""


class RankError(RuntimeError):
    """Another rank ended or no longer answers; the process ends with that one's exit code, else with 75: the same
    command goes on."""

    def __init__(self, text: str, code: int = EXIT_PREEMPTED) -> None:
        super().__init__(text)
        self.code = code


def exit_code(error: BaseException) -> int | None:
    """The exit code for an error that a user can act on; None for a bug, which is shown with its traceback."""
    if isinstance(error, RankError):
        return error.code
    codes = {DataError: EXIT_DATA, NumericsError: EXIT_NUMERICS, StorageError: EXIT_STORAGE}
    for kind, code in codes.items():
        if isinstance(error, kind):
            return code
    return EXIT_USAGE if isinstance(error, ValueError) else None


@dataclass
class Outcome:
    """What a command came to."""

    code: int = EXIT_DONE


@contextlib.contextmanager
def exit_codes(on_failure: Callable[[int, str], None] = lambda code, text: None) -> Iterator[Outcome]:
    """Runs a command so that it ends with one of the exit codes above: an error that a user can act on prints one
    message, a bug its traceback (exit code 1)."""
    outcome = Outcome()
    try:
        yield outcome
    except SystemExit as error:  # the argument parser's: 2 is its usage error
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
        outcome.code = EXIT_USAGE if error.code == 2 or isinstance(error.code, str) else int(error.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        outcome.code = EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            error = StorageError("nobody reads the output any more")
        code = exit_code(error)
        if code is None:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        outcome.code = EXIT_BUG if code is None else code
        on_failure(outcome.code, str(error))


def _output_is_gone() -> bool:
    """Whether who read our output has left, as head does; what is still to be written then goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # an output without a file has no reader either
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if any(event & select.POLLERR for _, event in output.poll(0)):
            # Without this the interpreter writes once more at its end, fails, and leaves with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False
