"""Text lists that people hand in: lines with their numbers, in UTF-8 or marked UTF-16; whole numbers read exactly."""

from __future__ import annotations

import os
import re

from facefast.runtime import untrusted
from facefast.runtime.exits import DataError

LARGEST = 1 << 28
"""Bytes of a list; a longer one is refused unread. CelebA's longest has a tenth of it."""
MOST_LINES = 1 << 22
LONGEST_LINE = 1 << 16
"""Bytes."""
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that hold anything, without blanks at the ends; "# ..." is a comment.

    Bytes that are no UTF-8 become surrogates, as in the names of files: `require_text` refuses what is left of them.

    Raises:
        DataError: it is no regular file, too long, cannot be read, or is UTF-16 without a mark or no text.
    """
    content = read_whole(path, LARGEST)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Windows writes text that it calls Unicode
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{os.fspath(path)} begins like UTF-16 and is not ({error}); write it in UTF-8") from error
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    ends = text.count("\n") + text.count("\r")
    if ends > 2 * MOST_LINES:  # before there is a string for each
        raise DataError(f"{os.fspath(path)} has more than {MOST_LINES} lines; divide it")
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n|\n|\r", text), 1)]
    for number, line in lines:
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{os.fspath(path)}, line {number}: it has {len(line)} letters; at most {LONGEST_LINE} are read"
            )
        if "\0" in line:
            raise DataError(f"{os.fspath(path)}, line {number}: it holds a byte 0, which is no text; write it in UTF-8")
    return [(number, line) for number, line in lines if line and line != "#" and not line.startswith("# ")]


def read_whole(path: str | os.PathLike[str], largest: int) -> bytes:
    """The content of a regular file; a pipe or a device is never opened.

    Raises:
        DataError: it is none, too long, or cannot be read.
    """
    try:
        return untrusted.read_whole(path, largest)
    except ValueError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read ({error.strerror})") from error


def require_text(path: str | os.PathLike[str], number: int, text: str) -> None:
    """Refuses a line with bytes that are no UTF-8.

    Raises:
        DataError: with the file, the line and the first of them.
    """
    bad = next((letter for letter in text if "\udc80" <= letter <= "\udcff"), None)
    if bad is not None:
        raise DataError(
            f"{os.fspath(path)}, line {number}: byte 0x{ord(bad) - 0xDC00:02x} is no UTF-8 ({shown(text)}); write the "
            "file in UTF-8, as in: iconv -f LATIN1 -t UTF-8"
        )


def whole(text: str) -> int | None:
    """The whole number that a text is, exactly, however large (18 digits at most); None if it is none.

    "7.0" is 7. An exponent has been rounded by whoever wrote it, and is refused.
    """
    found = _WHOLE.fullmatch(text)
    return int(found[1]) if found else None


def shown(text: str) -> str:
    """A piece of a list as an error shows it."""
    return repr(text[:80])
