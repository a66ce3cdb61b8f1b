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


class Album:
    """The photographs of a run.

    Args:
        run: whose `index.npz` says where they are.

    Raises:
        ValueError: there is no index, or not one of its pictures is where it was.
    """

    def __init__(self, run: RunFiles) -> None:
        path = run.folder / "index.npz"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: without it nobody knows where the photographs are")
        self._index = FaceIndex.load(path)
        self._rows = {self._index.name(row): row for row in range(len(self._index))}
        self._image = from_json(ImageSpec, run.model["image"])
        self._left = MOST
        self._run = run
        oracle.read_bytes(self._index, 0)

    def face(self, picture: Any, alt: str) -> Markup:
        """A photograph by its name in the index; empty where it cannot be read, or the page is full."""
        row = self._rows.get(str(picture))
        if row is None or self._left <= 0:
            return EMPTY
        try:
            pixels = oracle.to_picture(oracle.render(self._index, np.array([row]), self._image), self._image)[0]
        except ValueError:
            return EMPTY
        self._left -= 1
        return _inline(pixels, alt)

    def augmented(self, pictures: Sequence[Any]) -> Markup:
        """Training pictures as the last phase saw them in its first epoch."""
        phase, plan = self._run.recipe["phases"][-1], self._run.plan["phases"][-1]
        augment = None if phase["augment"] is None else from_json(AugmentSpec, phase["augment"])
        rows = [self._rows[str(picture)] for picture in pictures if str(picture) in self._rows]
        shown = []
        for row in rows[: max(self._left, 0)]:
            try:
                images = oracle.render(self._index, np.array([row]), self._image, augment, int(plan["seed"]), 0)
            except ValueError:
                continue
            shown.append(
                Markup("<li>{}</li>").format(
                    _inline(oracle.to_picture(images, self._image)[0], "a training picture, augmented")
                )
            )
        self._left -= len(shown)
        return Markup('<ul class="faces">{}</ul>').format(joined(shown)) if shown else EMPTY


def side_by_side(album: Album, entries: Sequence[tuple[Sequence[tuple[Any, str]], Markup]]) -> Markup:
    """Pictures in groups with a line under each.

    Args:
        entries: pictures (name in the index, what they show), and the line.
    """
    found = []
    for pictures, line in entries:
        faces = joined(album.face(picture, alt) for picture, alt in pictures if picture)
        if faces:
            found.append(Markup('<li><div class="pair">{}</div>{}</li>').format(faces, line))
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
