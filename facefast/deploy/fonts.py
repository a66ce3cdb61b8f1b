"""Letters of any script on pictures: which font here has them, and in which direction they run."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fontTools.ttLib import TTCollection, TTFont
from PIL import ImageDraw, ImageFont, features

from facefast.runtime.terminal import escape_letter

PACKAGES = ("fontpkg_noto_sans", "justmytype_intl_rtl", "justmytype_intl_cjk")
"""Wheels that hold fonts: `pip install 'facefast[fonts]'`."""
FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts",
)  # fmt: skip
FIRST = ("NotoSans[", "NotoSans-Regular", "DejaVuSans.", "LiberationSans-Regular", "NotoSans")
"""Beginnings of files' names, the plainest first; then all others."""
STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "narrow", "emoji")
"""Words in a file's name that make it the later choice."""
WEIGHTS = (b"Medium", b"Regular")
"""Of a font with many: the default of some is the thinnest."""
INSTALL = "apt-get install fonts-noto-core fonts-noto-cjk, or pip install 'facefast[fonts]', brings fonts"

# Scripts whose letters change with their neighbours, besides those written from right to left.
_JOINED = ((0x0900, 0x109F), (0x1780, 0x17FF), (0x1A20, 0x1AAF), (0xA800, 0xABFF))
_NOTHING_TO_DRAW = ("Cf", "Zs", "Mn", "Me")
"""Categories of letters that no font needs a glyph of its own for, when it has those around them."""


@dataclass(frozen=True)
class Face:
    """A font's file, and the place in it where it holds several."""

    path: str
    number: int = 0

    def letters(self) -> frozenset[int]:
        """Code points that it has glyphs for; none of one that cannot be read."""
        return _letters(self)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at so many pixels."""
        return _sized(self, size)


@functools.cache
def _letters(face: Face) -> frozenset[int]:
    try:
        # fontTools leaves a file that it cannot read open.
        with open(face.path, "rb") as file, TTFont(file, fontNumber=face.number, lazy=True) as font:
            if "glyf" not in font and "CFF " not in font and "CFF2" not in font:  # bitmaps of one size
                return frozenset()
            return frozenset(font.getBestCmap() or ())
    except Exception:  # a damaged font is one that has no letters
        return frozenset()


@functools.lru_cache(256)
def _sized(face: Face, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(face.path, size, index=face.number)
    try:
        names = font.get_variation_names()
    except OSError:  # it has one weight
        return font
    for weight in WEIGHTS:
        if weight in names:
            font.set_variation_by_name(weight)
            break
    return font


@functools.cache
def installed() -> tuple[Face, ...]:
    """The fonts of this machine and of installed wheels, the plainest first."""
    found: list[str] = []
    for folder in _folders():
        for place, _, names in os.walk(folder):
            found += [os.path.join(place, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
    return tuple(face for path in sorted(set(found), key=_preference) for face in _faces(path))


def _folders() -> Iterator[str]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        yield from (spec.submodule_search_locations or ()) if spec else ()
    yield from map(os.path.expanduser, FOLDERS)
    if sys.platform == "win32":
        yield os.path.join(os.environ.get("WINDIR", "C:/Windows"), "Fonts")


def _preference(path: str) -> tuple[int, int, str]:
    name = Path(path).name
    rank = next((place for place, begin in enumerate(FIRST) if name.startswith(begin)), len(FIRST))
    return sum(style in name.lower() for style in STYLES), rank, name


def _faces(path: str) -> list[Face]:
    if not path.lower().endswith(".ttc"):
        return [Face(path)]
    try:
        with open(path, "rb") as file, TTCollection(file, lazy=True) as collection:
            return [Face(path, number) for number in range(len(collection.fonts))]
    except Exception:  # damaged, as above
        return []


@dataclass(frozen=True)
class Run:
    """Letters that one font draws; None is the font that Pillow brings, for ASCII where there is no other."""

    text: str
    face: Face | None
    rightwards: bool = True

    def at(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """The font at so many pixels."""
        return ImageFont.load_default(size) if self.face is None else self.face.at(size)


@dataclass(frozen=True)
class Line:
    """A text as it is drawn, runs from left to right, and what of it could not be."""

    runs: tuple[Run, ...]
    lost: str = ""
    """Letters that no font here has, or that cannot be joined here: drawn as their numbers, such as \\u738b."""

    def width(self, size: int) -> float:
        """Pixels at a size of so many."""
        return sum(_length(run, size) for run in self.runs)

    def draw(self, pen: ImageDraw.ImageDraw, x: float, baseline: float, size: int, colour: str) -> None:
        """Draws it from x on."""
        for run in self.runs:
            pen.text((x, baseline), run.text, colour, run.at(size), anchor="ls", direction=_direction(run))
            x += _length(run, size)


def _length(run: Run, size: int) -> float:
    return float(run.at(size).getlength(run.text, direction=_direction(run)))


def _direction(run: Run) -> str | None:
    if run.face is None or not shapes():  # Pillow's own font knows one direction
        return None
    return "ltr" if run.rightwards else "rtl"


@functools.cache
def shapes() -> bool:
    """Whether Pillow can join and turn letters here: it needs fribidi, which Debian has as libfribidi0."""
    return bool(features.check("raqm"))


def is_leftwards(letter: str) -> bool:
    """Whether it is written from right to left."""
    return unicodedata.bidirectional(letter) in ("R", "AL")


def _needs_shaping(letter: str) -> bool:
    return is_leftwards(letter) or any(first <= ord(letter) <= last for first, last in _JOINED)


@functools.lru_cache(4096)
def line(text: str) -> Line:
    """How to draw a text, by the fonts that are installed.

    A letter that none of them has becomes its number: an empty box would look like any other letter that is missing.
    """
    text = unicodedata.normalize("NFC", "".join(map(escape_letter, text)))
    lost = ""
    if not shapes():
        lost = "".join(dict.fromkeys(filter(_needs_shaping, text)))
        text = _numbered(text, lost)
    known = _covering(text)
    if known is None:
        missing = "".join(letter for letter in dict.fromkeys(text) if _covering(letter) is None and not _bare(letter))
        text, lost = _numbered(text, missing), lost + missing
        known = _covering(text)
    leftwards = next((is_leftwards(c) for c in text if unicodedata.bidirectional(c) in ("L", "R", "AL")), False)
    if known is not None:
        return Line((Run(text, known or None, not leftwards),), lost)
    runs = [Run(part, face, not leftwards) for part, face in _parts(text)]
    return Line(tuple(reversed(runs) if leftwards else runs), lost)


def _numbered(text: str, letters: str) -> str:
    return "".join(
        (f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}") if letter in letters else letter
        for letter in text
    )


def _bare(letter: str) -> bool:
    return unicodedata.category(letter) in _NOTHING_TO_DRAW


def _covering(text: str) -> Face | None | Literal[False]:
    """The first font that has all letters; False for Pillow's own, None where there is none."""
    wanted = {ord(letter) for letter in text if not _bare(letter) or unicodedata.category(letter) == "Mn"}
    for face in installed():
        if wanted <= face.letters():
            return face
    return False if text.isascii() else None


def _parts(text: str) -> Iterable[tuple[str, Face | None]]:
    """Pieces that a font each has all letters of; accents and blanks stay with the letter before them."""
    part, holder = "", None
    for letter in text:
        tried = _covering(part + letter)
        if part and not _bare(letter) and tried is None:
            yield part, holder or None
            part, tried = "", _covering(letter)
        part += letter
        if tried is not None:
            holder = tried if isinstance(tried, Face) else None
    if part:
        yield part, holder
