"""What people read: names that cannot steer a terminal, warnings of one line, and an output that may be closed, full or
ASCII."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Literal, TextIO

Manner = Literal["words", "quiet", "json"]
"""How a run speaks: in words; in warnings and its results alone; or standard output has JSON, and words go to standard
error."""
GREEN, YELLOW = "32", "33"
"""Of what is better than before, and of warnings, where a terminal shows colours."""

# Marks that turn the direction of writing, and so let a name pretend to end elsewhere.
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def escape_letter(letter: str) -> str:
    """A letter as it is, or as `\\n`, `\\x1b` or `\\u202e` where it ends a line or steers a terminal; a byte that is no
    UTF-8 as the file system's names have it is `\\xff`."""
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _DIRECTION:
        # Only bytes are written as \x80 and above.
        return letter.encode("unicode_escape").decode() if letter < "\x80" else f"\\u{ord(letter):04x}"
    return letter


def plain(text: str) -> str:
    """A text that cannot steer a terminal, whatever names it holds; its line ends stay.

    Backslashes stay single: names that were escaped before come out as they went in.
    """
    return text if text.isascii() and text.isprintable() else "\n".join(_escaped(line) for line in text.split("\n"))


def message(text: str) -> str:
    """`plain`, and a line end is one only where two blanks follow: what a name holds cannot begin a line, and so cannot
    pass for a message of ours."""
    return "\n".join(map(_escaped, re.split(r"\n(?=  )", text)))


def _escaped(text: str) -> str:
    return "".join(map(escape_letter, text))


class OutputError(OSError):
    """What was printed does not arrive: nobody reads it any more, as after head, or its disk is full."""


def say(text: str) -> None:
    """Prints a result at once; paths and names in it are escaped where that is needed.

    Raises:
        OutputError: it does not arrive.
    """
    try:
        print(plain(text), flush=True)
    except OSError as error:
        _silence(sys.stdout)
        raise OutputError(_why(error)) from error


def complain(text: str) -> None:
    """A message on standard error, or nothing where nobody hears it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def tell(text: str, *, escaped: bool = False) -> None:
    """`say` for what must not end its caller: lost where nobody listens.

    Args:
        escaped: the text went through `plain` before, and has colours since.
    """
    with heard():
        print(text if escaped else plain(text), file=sys.stderr if _manner == "json" else sys.stdout, flush=True)


_manner: Manner = "words"


def manner() -> Manner:
    """How this process speaks."""
    return _manner


@contextlib.contextmanager
def speaking(how: Manner) -> Iterator[None]:
    """Within it this process speaks in another manner."""
    global _manner
    before, _manner = _manner, how
    try:
        yield
    finally:
        _manner = before


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at a stream as it is written; a terminal that cannot go back in a line is none."""
    with contextlib.suppress(AttributeError, ValueError):  # a stream of somebody else's, or a closed one
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """A text in a colour, if there is one, where the stream is a terminal and NO_COLOR (no-color.org) is not set."""
    if not colour or os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """What is said into a closed pipe or onto a full disk is lost, and no more than that."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: a closed file
        empty_broken()


def empty_broken() -> None:
    """Throws away what standard output and error could not write; what is said later is tried again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _empty(stream)


def _empty(stream: TextIO) -> None:
    """Throws away what a stream could not write: it would fail again at the interpreter's end, with a code of its
    own."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        here, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, number)
            stream.flush()
        finally:
            os.dup2(here, number)
            os.close(here)
            os.close(nowhere)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Makes printing safe: streams that were closed at the start swallow what is said, letters that the terminal does
    not have are escaped, and a warning is one line without the place in our code."""
    _open_missing()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream of somebody else's, in a notebook
            if stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    before = warnings.formatwarning
    warnings.formatwarning = _format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


def _open_missing() -> None:
    # The next file that is opened would get the number of a closed stream, and what libraries print with it.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 -- as long as the process


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {_escaped(' '.join(str(message).split()))}\n"


def broken_output() -> OutputError | None:
    """Why what was printed does not arrive, None if it does; what is still to be written then goes nowhere."""
    lost = []
    for stream in (sys.stdout, sys.stderr):
        try:
            if _has_no_reader(stream):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            stream.flush()
        except OSError as error:
            _silence(stream)
            lost.append(OutputError(_why(error)))
        except ValueError:  # closed by whoever called us
            continue
    return lost[0] if lost else None


def _why(error: OSError) -> str:
    if error.errno == errno.EPIPE:
        return "nobody reads the output any more"
    return f"the output cannot be written: {error.strerror}; give it another place"


def _silence(stream: TextIO) -> None:
    # Otherwise the interpreter writes once more at its end, fails, and leaves with a code of its own.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_no_reader(stream: TextIO) -> bool:
    try:
        output = select.poll()
        output.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in output.poll(0))
    except (OSError, ValueError):  # an output without a file has no reader to lose
        return False
