"""Contact sheets: photographs side by side under a line of text, for a person to decide by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from facefast.data import FaceIndex, oracle
from facefast.labels.clustering import Floats, Numbers
from facefast.labels.suspects import Suspect, Suspects
from facefast.runtime.files import replacing, storing
from facefast.runtime.terminal import escape_letter

TILE = 96
"""Pixels on a side of one photograph."""
GAP = 12
"""Pixels between groups of photographs."""
LINE = 15
"""Pixels of a line of text."""
PAGE = (10 * TILE + 3 * GAP, 12 * (TILE + 2 * LINE))
"""Width and height of a sheet, about, in pixels."""


@dataclass(frozen=True)
class Strip:
    """Two lines of text over groups of photographs, given by their rows in an index."""

    title: str
    text: str
    groups: list[list[int]]

    @property
    def width(self) -> int:
        """Pixels that it takes."""
        return sum(len(group) * TILE + GAP for group in self.groups)


def write_sheets(folder: Path, name: str, strips: Sequence[Strip], index: FaceIndex) -> list[Path]:
    """Writes `name`_01.jpg and so on, and removes those of an earlier time; returns what was written.

    Raises:
        StorageError: a sheet cannot be written; those of an earlier time are then as they were.
    """
    pages = _pages(strips)
    written = [folder / f"{name}_{number:02d}.jpg" for number in range(1, len(pages) + 1)]
    with contextlib.ExitStack() as together, storing(folder, what="contact sheets to "):
        folder.mkdir(parents=True, exist_ok=True)
        # Each takes its place when all of them could be written.
        for path, page in zip(written, pages, strict=True):
            draw_sheet(page, index).save(together.enter_context(replacing(path)), "JPEG", quality=88)
    with storing(folder):
        for old in set(folder.glob(f"{name}_*.jpg")) - set(written):
            if re.fullmatch(r"\d\d+", old.stem.removeprefix(f"{name}_")):  # nothing that is the user's
                old.unlink()
    return written


Placed = tuple[int, int, Strip]
"""x, y in pixels."""


def _pages(strips: Sequence[Strip]) -> list[list[Placed]]:
    """Strips from left to right, then down, then on a new page."""
    pages: list[list[Placed]] = []
    x = y = 0
    for strip in strips:
        if x and x + strip.width > PAGE[0]:
            x, y = 0, y + TILE + 2 * LINE
        if not pages or y >= PAGE[1]:
            pages.append([])
            x = y = 0
        pages[-1].append((x, y, strip))
        x += strip.width
    return pages


def draw_sheet(page: Sequence[Placed], index: FaceIndex) -> Image.Image:
    """One sheet; a photograph that cannot be read is grey."""
    width = max(x + strip.width for x, _, strip in page)
    height = max(y for _, y, _ in page) + TILE + 2 * LINE
    sheet = Image.new("RGB", (max(width, PAGE[0]), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for x, y, strip in page:
        for line, text in enumerate((strip.title, strip.text)):
            text = "".join(map(escape_letter, text))  # a line end would make the pen refuse
            text = text[: strip.width // 3]  # no letter is narrower for long: the loop below stays short
            while text and pen.textlength(text, font) > strip.width - GAP // 2:
                text = text[:-1]
            pen.text((x, y + line * LINE), text, "black", font)
        for group in strip.groups:
            for row in group:
                sheet.paste(tile(index, row), (x + 1, y + 2 * LINE + 1))
                x += TILE
            x += GAP
    return sheet


def tile(index: FaceIndex, row: int) -> Image.Image:
    """A photograph whole in a square of `TILE` - 2 pixels; one that cannot be read is grey."""
    square = Image.new("RGB", (TILE - 2, TILE - 2), "lightgrey")
    try:
        picture = Image.fromarray(oracle.decode(oracle.read_bytes(index, row)))
    except ValueError:
        return square
    picture.thumbnail(square.size)
    square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    return square


SHOWN = 4
"""Pictures of an identity beside a suspect."""


class Album:
    """The pictures of each identity, to find those most like another picture.

    Args:
        embeddings: [N, D] of length 1.
        wrong: [N] probability that a label is wrong; None where nothing is known against any.
    """

    def __init__(self, index: FaceIndex, embeddings: Floats, wrong: Floats | None = None) -> None:
        self.embeddings, self.wrong = embeddings, wrong
        self.order = np.argsort(index.labels, kind="stable")
        self.ends = np.searchsorted(index.labels[self.order], np.arange(index.num_classes + 1))

    def of(self, label: int) -> Numbers:
        """Rows of an identity."""
        return self.order[self.ends[label] : self.ends[label + 1]]

    def like(self, row: int, label: int, count: int) -> list[int]:
        """Pictures of an identity most like `row`, those whose label is not in doubt first."""
        rows = self.of(label)
        rows = rows[rows != row]
        key = self.embeddings[rows] @ self.embeddings[row]
        if self.wrong is not None:
            key = key - 2 * (self.wrong[rows] >= 0.5)
        return list(rows[np.argsort(-key, kind="stable")][:count].tolist())


def strips(index: FaceIndex, embeddings: Floats, suspects: Suspects, kind: str, most: int) -> list[Strip]:
    """What the contact sheets of one kind show, the first `most` findings."""
    doubts = suspects.doubt
    like = Album(index, embeddings, doubts.wrong).like

    def describe(suspect: Suspect) -> Strip:
        who = index.class_names[suspect.label] if suspect.label >= 0 else "unknown"
        other = index.class_names[suspect.suggested] if suspect.suggested >= 0 else "unknown"
        sure = f"{suspect.confidence:.0%} {suspect.action}"
        if suspect.kind == "duplicate":
            title, kept = (index.name(row).rsplit("/")[-1] for row in (suspect.row, suspect.other_row))
            pair = [suspect.row, suspect.other_row]
            return Strip(f"{title} ({who})", f"{sure}: {kept} ({other})", [pair])
        if suspect.kind == "merge":
            rows = [like(suspect.row, suspect.label, SHOWN), like(suspect.other_row, suspect.suggested, SHOWN)]
            return Strip(
                f"{who} = {other}?",
                f"{sure}, cosine {suspect.other_score:.2f}",
                [[suspect.row, *rows[0]], [suspect.other_row, *rows[1]]],
            )
        nearest = int(doubts.suggested[suspect.row])
        groups = [[suspect.row], like(suspect.row, suspect.label, SHOWN)]
        groups += [like(suspect.row, nearest, SHOWN)] if nearest >= 0 else []
        title = f"{index.name(suspect.row)}: {who} ({suspect.score:.2f})"
        closest = f", nearest {index.class_names[nearest]} ({suspect.other_score:.2f})" if nearest >= 0 else ""
        return Strip(title, f"{sure}, suggested {other}{closest}", groups)

    return [describe(suspect) for suspect in suspects.found if suspect.kind == kind][:most]
