"""Photographs of a report, for whoever asks for them: read where they lie, as the model sees them, into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from facefast.data import FaceIndex, oracle
from facefast.evaluation.report_files import RunFiles
from facefast.evaluation.report_page import EMPTY, joined, name, plain
from facefast.recipe import AugmentSpec, ImageSpec, from_json

SIZE = 120
"""Pixels on the longer side."""
MOST = 150
"""Photographs on a page: each takes about 4 KB."""
NAMED = 3
"""Photographs that could not be read and are named in a sentence."""


class Album:
    """The photographs of a run.

    Args:
        run: whose `index.npz` says where they are.

    """

    def __init__(self, run: RunFiles) -> None:
        self.shown = 0
        """Photographs on the page so far."""
        self.lost: dict[str, str] = {}
        """Photographs that were asked for and could not be read, by name, and why."""
        self._why, self._index, self._rows = "", None, {}
        self._left, self._run = MOST, run
        path = run.folder / "index.npz"
        try:
            if not path.is_file():
                raise ValueError(f"{path} does not exist: without it nobody knows where the photographs are")
            index = FaceIndex.load(path)
            self._image = from_json(ImageSpec, run.model["image"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            known = run.model.get("image") is not None
            self._why = str(error) if known else "no checkpoint's model.json tells how the model sees photographs"
            return
        self._index = index
        self._rows = {index.name(row): row for row in range(len(index))}

    def unread(self) -> str:
        """Which photographs could not be read, and why, for people; empty where all could."""
        if not self.lost:
            return ""
        names = ", ".join(list(self.lost)[:NAMED]) + (", ..." if len(self.lost) > NAMED else "")
        count = "1 photograph" if len(self.lost) == 1 else f"{len(self.lost)} photographs"
        verb, them = ("is", "it was") if len(self.lost) == 1 else ("are", "they were")
        return (
            f"{count} could not be read and {verb} not shown: {names} ({next(iter(self.lost.values()))}). Bring back "
            f"what is gone to where {them}, and write the report anew."
        )

    def face(self, picture: Any, alt: str) -> Markup:
        """A photograph by its name in the index; empty where it cannot be read, or the page is full."""
        pixels = self._pixels(str(picture), None, 0)
        return EMPTY if pixels is None else _inline(pixels, alt)

    def augmented(self, pictures: Sequence[Any]) -> Markup:
        """Training pictures as the last phase saw them in its first epoch."""
        phase, plan = self._run.recipe["phases"][-1], self._run.plan["phases"][-1]
        augment = None if phase["augment"] is None else from_json(AugmentSpec, phase["augment"])
        shown = [
            Markup("<li>{}</li>").format(_inline(pixels, "a training picture, augmented"))
            for picture in pictures
            if (pixels := self._pixels(str(picture), augment, int(plan["seed"]))) is not None
        ]
        return Markup('<ul class="faces">{}</ul>').format(joined(shown)) if shown else EMPTY

    def _pixels(self, picture: str, augment: AugmentSpec | None, seed: int) -> oracle.Picture | None:
        """A photograph as the model sees it; None where it cannot be read, which is noted, or the page is full."""
        if self._left <= 0:
            return None
        row = self._rows.get(picture)
        if self._index is None or row is None:
            self.lost.setdefault(picture, self._why or f"{self._run.folder / 'index.npz'} does not have it")
            return None
        try:
            images = oracle.render(self._index, np.array([row]), self._image, augment, seed, 0)
        except ValueError as error:
            self.lost.setdefault(picture, str(error))
            return None
        self._left -= 1
        self.shown += 1
        pixels: oracle.Picture = oracle.to_picture(images, self._image)[0]
        return pixels


def side_by_side(album: Album, entries: Sequence[tuple[Sequence[tuple[Any, str]], Markup]]) -> Markup:
    """Pictures in groups with a line under each.

    Args:
        entries: pictures (name in the index, what they show), and the line.
    """
    found = []
    for pictures, line in entries:
        faces = [album.face(picture, alt) for picture, alt in pictures if picture]
        if faces and all(faces):  # the line would be about one who is not there
            found.append(Markup('<li><div class="pair">{}</div>{}</li>').format(joined(faces), line))
    return Markup('<ul class="faces">{}</ul>').format(joined(found)) if found else EMPTY


def wrong_pictures(album: Album, wrong: Sequence[Mapping[str, Any]]) -> Markup:
    """Wrong test pictures, each beside a training picture of whom it was taken for."""
    return side_by_side(
        album,
        [
            (
                [
                    (row["picture"], f"a picture of {plain(row['name'])}"),
                    (row["example"], f"a picture of {plain(row['taken_for'])}"),
                ],
                Markup("<b>{}</b> taken for <b>{}</b>, {:.0f}\u00a0%").format(
                    name(row["name"]), name(row["taken_for"]), 100 * row["probability"]
                ),
            )
            for row in wrong
        ],
    )


def hard_pairs(album: Album, pairs: Sequence[Mapping[str, Any]]) -> Markup:
    """Pairs of pictures with their score."""
    return side_by_side(
        album,
        [
            (
                [(row["a"], "one of the two"), (row["b"], "the other")],
                Markup("cosine <b>{:.3f}</b>").format(row["cosine"]),
            )
            for row in pairs
        ],
    )


def _inline(pixels: oracle.Picture, alt: str) -> Markup:
    content, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((SIZE, SIZE))
    picture.save(content, "JPEG", quality=82)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return Markup('<img src="data:image/jpeg;base64,{}" alt="{}">').format(text, alt)
