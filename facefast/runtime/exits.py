"""How a process ends: exit codes, the errors that stand for them, and who sees a message instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from facefast.runtime import terminal

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


# What only the machine and the paths that people give can cause, wherever it is met. A file that is missing may be our
# own mistake: that is told where it is opened.
_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
_PATHS = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How libraries say it in errors of other types."""


def exit_code(error: BaseException) -> int | None:
    """The exit code for an error that a user can act on; None for a bug, which is shown with its traceback."""
    if isinstance(error, RankError):
        return error.code
    codes = {
        DataError: EXIT_DATA,
        NumericsError: EXIT_NUMERICS,
        StorageError: EXIT_STORAGE,
        terminal.OutputError: EXIT_STORAGE,
    }
    for kind, code in codes.items():
        if isinstance(error, kind):
            return code
    if _is_out_of_memory(error):
        return EXIT_USAGE
    if isinstance(error, OSError):
        if error.errno in _PATHS and error.filename is not None:
            return EXIT_USAGE
        return EXIT_STORAGE if error.errno in _STORAGE or _has_no_folder(error) else None
    return EXIT_USAGE if isinstance(error, ValueError) else None


def reason(error: BaseException) -> str:
    """What is said of an error that has an exit code."""
    if isinstance(error, StorageError | terminal.OutputError):
        return str(error)
    if _is_out_of_memory(error):
        asked = next(iter(str(error).splitlines()), "") or "no more was given"
        return (
            f"there is not enough memory ({asked}); ask for less at once (a smaller batch_size or image.size, fewer "
            "threads), or take a machine with more"
        )
    if _has_no_folder(error):
        return "the folder that this was started in is gone; change to another one"
    if isinstance(error, OSError) and error.strerror:
        if not isinstance(error.filename, str | bytes | os.PathLike):
            return f"it cannot be written: {error.strerror}; make room, or give it another place"
        path = os.fsdecode(error.filename)
        return f"the system refuses {path}: {error.strerror}; mend its permissions or its place, or give another path"
    return str(error) or type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    known = isinstance(error, RankError | NumericsError)  # which say so of others
    return isinstance(error, RuntimeError) and not known and any(words in str(error) for words in _NO_MEMORY)


def _has_no_folder(error: BaseException) -> bool:
    """Whether a relative path was asked for in a folder that has been removed."""
    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return False
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


@dataclass
class Outcome:
    """What a command came to."""

    code: int = EXIT_DONE


@contextlib.contextmanager
def exit_codes(on_failure: Callable[[int, str], None] | None = None) -> Iterator[Outcome]:
    """Runs a command so that it ends with one of the exit codes above: an error that a user can act on prints one
    message, a bug its traceback (exit code 1).

    Args:
        on_failure: told the code and the message. Such a command leaves its result elsewhere; without it the result is
            what was printed, and a command whose output does not arrive has failed.
    """
    outcome = Outcome()
    with terminal.prepared():
        try:
            yield outcome
        except SystemExit as error:  # the argument parser's: 2 is its usage error
            if isinstance(error.code, str):
                terminal.complain(terminal.plain(error.code))
            outcome.code = EXIT_USAGE if error.code == 2 or isinstance(error.code, str) else int(error.code or 0)
        except KeyboardInterrupt:
            terminal.complain("interrupted")
            outcome.code = EXIT_INTERRUPTED
        except Exception as error:
            outcome.code = _fail(error, on_failure)
        lost = terminal.broken_output()
        if lost and outcome.code == EXIT_DONE and on_failure is None:
            outcome.code = _fail(lost, None)


def _fail(error: Exception, on_failure: Callable[[int, str], None] | None) -> int:
    """Says what went wrong; returns the exit code."""
    if isinstance(error, OSError) and error.filename is None and (lost := terminal.broken_output()):
        error = lost
    code = exit_code(error)
    if code is None:
        terminal.complain(terminal.plain("".join(traceback.format_exception(error)).rstrip()))
        text = str(error)
    else:
        text = reason(error)
        terminal.complain(f"error: {terminal.message(text)}")
    if on_failure is not None:
        on_failure(EXIT_BUG if code is None else code, text)
    return EXIT_BUG if code is None else code
