"""Photographs with what was said of the faces on them: boxes, names, and "unknown", to be looked at."""

from __future__ import annotations

import html
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image, ImageDraw

from facefast.data import oracle
from facefast.data.walk import find_pictures
from facefast.deploy import fonts
from facefast.deploy.photographs import UNKNOWN
from facefast.runtime import files
from facefast.runtime.terminal import escape_letter

ADVICE = "choose another --annotate, or make room"
"""What to do where the photographs cannot be written."""
LIST = "annotated.json"
"""What a folder of annotated photographs holds, so that nothing else in it is ever replaced."""
PAGE = "index.html"
SMALLEST = 640
"""Pixels of the long side of what is written at least: text on a smaller picture could not be read."""
TEXT = 0.032
"""Height of letters in short sides of the picture."""
LEAST_TEXT = 14
"""Pixels that letters have at least."""
KNOWN, STRANGE = ("#0b57d0", "#ffffff"), ("#ffb300", "#000000")
"""Plate and letters of a face with a name, and of one without; who sees no colours tells them apart by the text."""
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


def places(given: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Where each photograph's picture goes: by its absolute path, the path within `folder`, each its own.

    Args:
        given: photographs and folders of them, as the command was told.
        folder: where the pictures go.

    Raises:
        ValueError: a photograph would be replaced, or be found as a photograph the next time.
    """
    target = Path(os.path.realpath(folder))
    written = set(files.read_object(folder / LIST).get("written", ()))
    taken: set[str] = set()
    found: dict[str, Path] = {}
    for one in given:
        root = Path(os.path.realpath(one))
        if root.is_dir() and target.is_relative_to(root):
            raise ValueError(
                f"--annotate {folder} lies in {one}, whose photographs it would be taken for the next time; "
                "give a folder elsewhere"
            )
        for path in find_pictures([one]):
            whole = os.path.abspath(path)
            inside = os.path.relpath(path, one) if os.path.isdir(one) else Path(path).name
            if whole in found:
                continue
            place = _free(inside, taken)
            taken.add(place.casefold())  # some file systems do not tell A.jpg from a.jpg
            found[whole] = Path(place)
            there = folder / place
            if os.path.lexists(there) and place not in written:
                raise ValueError(
                    f"{there} is there, and is none of an earlier --annotate; give a new or an empty folder"
                )
    return found


def _free(name: str, taken: set[str]) -> str:
    ending = os.path.splitext(name)[1].lower()
    base, last = (name[: -len(ending)], name[-len(ending) :]) if ending in (".jpg", ".jpeg") else (name, ".jpg")
    number, free = 1, base + last
    while free.casefold() in taken:
        number += 1
        free = f"{base}-{number}{last}"
    return free


@dataclass
class Annotated:
    """What was drawn, and what could not be."""

    folder: Path
    written: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    """By name, its letters that no font here has."""
    shortened: set[str] = field(default_factory=set)

    def said(self) -> list[str]:
        """Notes for whoever asked for it."""
        notes = []
        if self.lost:
            name, letters = next(iter(self.lost.items()))
            why = (
                f"no font here has ({fonts.INSTALL})"
                if fonts.shapes()
                else "cannot be joined or turned without fribidi, or no font has (apt-get install libfribidi0)"
            )
            notes.append(
                f"note: {len(self.lost)} names have letters that {why}; they are drawn as numbers (first: {name}: "
                f"{letters})"
            )
        if self.shortened:
            notes.append(f"note: {len(self.shortened)} names are longer than their picture is wide, and end in …")
        return notes


def annotate(answers: Iterable[dict[str, Any]], where: dict[str, Path], folder: Path, page: bool) -> Annotated:
    """Writes a picture for each photograph that can be read.

    Args:
        answers: of `facefast.deploy.photographs.answer`.
        where: of `places`.
        folder: where they go.
        page: whether a page of all of them, `index.html`, is written too.

    Raises:
        StorageError: they cannot be written.
    """
    done, told = Annotated(folder), []
    listed = set(files.read_object(folder / LIST).get("written", ()))

    def keep() -> None:
        with files.storing(folder, advice=ADVICE):
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / LIST, {"written": sorted(listed | set(done.written))})

    # Listed before they are there: after a crash in between nothing of ours is taken for somebody else's.
    listed |= {str(path) for path in where.values()} | ({PAGE} if page else set())
    if page and os.path.lexists(folder / PAGE) and PAGE not in files.read_object(folder / LIST).get("written", ()):
        raise ValueError(f"{folder / PAGE} is there, and is none of an earlier --annotate; give another folder")
    keep()
    for answer in answers:
        place = where[answer["path"]]
        told.append((answer, place))
        try:
            picture = Image.fromarray(oracle.decode(answer["path"]))
        except ValueError:
            done.unread.append(answer["path"])
            continue
        drawn = draw(picture, answer, done)
        with files.replacing(folder / place, advice=ADVICE, parents=True) as aside:
            drawn.save(aside, "JPEG", quality=92)
        done.written.append(str(place))
    if page:
        content = page_of(told, set(done.written)).encode("utf-8", "backslashreplace")
        with files.replacing(folder / PAGE, len(content), ADVICE) as aside:
            aside.write_bytes(content)
    return done


def said(face: dict[str, Any]) -> tuple[str, str]:
    """A face's name, and how sure that is; "unknown" with its score."""
    names = face.get("names") or [""]
    if names[0] == UNKNOWN and "nearest" in face:
        return UNKNOWN, f"{face['score']:.2f}"
    if "probabilities" in face:
        return names[0], f"{face['probabilities'][0]:.0%}"
    return names[0], f"{face['scores'][0]:.2f}" if face.get("scores") else ""


def draw(picture: Image.Image, answer: dict[str, Any], done: Annotated) -> Image.Image:
    """The photograph with its faces; a small one is enlarged, so that its text can be read."""
    scale = max(1, math.ceil(SMALLEST / max(picture.size)))
    picture = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    size = max(LEAST_TEXT, round(TEXT * min(picture.size)))
    thick = max(2, size // 8)
    faces = answer.get("faces") or []
    plates: list[Box] = []
    for face in faces:
        if "box" in face:
            x, y, width, height = (scale * value for value in face["box"])
            plate, _ = STRANGE if _is_strange(face) else KNOWN
            # Light within dark: one of the two stands out from whatever is behind it.
            for grown, colour in ((thick, "black"), (0, plate)):
                corners = (x - grown / 2, y - grown / 2, x + width + grown / 2, y + height + grown / 2)
                pen.rectangle(_inside(corners, picture.size), outline=colour, width=thick)
    if not faces:
        _plate(pen, picture.size, (answer.get("fault", ""), ""), STRANGE, None, size, plates, done)
    for face in faces:
        box = None
        if "box" in face:
            x, y, width, height = (scale * value for value in face["box"])
            box = (x, y, x + width, y + height)
        name = said(face)
        if name[0]:
            _plate(pen, picture.size, name, STRANGE if _is_strange(face) else KNOWN, box, size, plates, done)
    return picture


def _is_strange(face: dict[str, Any]) -> bool:
    return "nearest" in face or not face.get("names")


def _inside(box: Box, size: tuple[int, int]) -> Box:
    width, height = size
    left, top = min(max(box[0], 0), width - 2), min(max(box[1], 0), height - 2)
    return left, top, max(min(box[2], width - 1), left + 1), max(min(box[3], height - 1), top + 1)


def _plate(
    pen: ImageDraw.ImageDraw,
    room: tuple[int, int],
    text: tuple[str, str],
    colours: tuple[str, str],
    box: Box | None,
    size: int,
    plates: list[Box],
    done: Annotated,
) -> None:
    """A name on a plate above its face, or where there is room for it, wholly inside the picture."""
    name, sure = text
    line, rest = fonts.line(name), fonts.line(f" {sure}" if sure else "")
    if line.lost:
        done.lost[name] = line.lost
    pad = max(2, size // 4)
    # Half the picture beside other faces, or as much as its own face has: it would hide those otherwise.
    most = room[0] if box is None else min(room[0], max(room[0] / 2, box[2] - box[0]))
    most -= 2 * pad + rest.width(size)
    if line.width(size) > most:
        done.shortened.add(name)
        line = shorten(name, most, size)
    width, height = line.width(size) + rest.width(size) + 2 * pad, size * 1.35 + pad
    left, top = _room_for(width, height, box, room, plates)
    plates.append((left, top, left + width, top + height))
    pen.rectangle(_inside(plates[-1], room), fill=colours[0])
    baseline = top + pad / 2 + size * 1.02
    line.draw(pen, left + pad, baseline, size, colours[1])
    rest.draw(pen, left + pad + line.width(size), baseline, size, colours[1])


def shorten(name: str, most: float, size: int) -> fonts.Line:
    """As many of the first letters as have room, and an ellipsis; an accent is not torn from its letter."""
    low, high = 0, len(name)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if fonts.line(f"{name[:middle]}…").width(size) <= most:
            low = middle
        else:
            high = middle - 1
    while 0 < low < len(name) and unicodedata.combining(name[low]):
        low -= 1
    return fonts.line(f"{name[:low]}…")


def _room_for(
    width: float, height: float, box: Box | None, room: tuple[int, int], plates: list[Box]
) -> tuple[float, float]:
    """Left and top of a plate: above the box, below it, in it, else the first free line of the picture."""
    right, bottom = max(0.0, room[0] - width), max(0.0, room[1] - height)
    tries = [(0.0, bottom)] if box is None else [(box[0], box[1] - height), (box[0], box[3]), (box[0], box[1])]
    column = 0.0 if box is None else box[0]
    tries += [(column, step * height) for step in range(int(room[1] / height))]
    for place, (x, y) in enumerate(tries):
        if not 0 <= y <= bottom and place < 2:
            continue
        x, y = min(max(x, 0.0), right), min(max(y, 0.0), bottom)
        if not any(x < p[2] and p[0] < x + width and y < p[3] and p[1] < y + height for p in plates):
            return x, y
    return min(max(column, 0.0), right), min(max(tries[0][1], 0.0), bottom)  # a crowd: one lies over another


STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c1e21;--soft:#54595f;--line:#c9ced4}
@media(prefers-color-scheme:dark){:root{--back:#15171a;--text:#e8eaed;--soft:#aab0b7;--line:#3c4248}}
body{font:15px/1.4 system-ui,sans-serif;margin:0 auto;padding:16px;max-width:1400px}
body{background:var(--back);color:var(--text)}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:20px}
article{border:1px solid var(--line);border-radius:8px;padding:10px;break-inside:avoid;min-width:0}
h1{font-size:20px}h2{font-size:14px;margin:8px 0 4px;overflow-wrap:anywhere}
img{width:100%;height:auto;max-height:70vh;object-fit:contain;display:block;border-radius:4px}
ol{margin:0;padding-left:1.6em}li{overflow-wrap:anywhere}p{margin:4px 0;color:var(--soft);overflow-wrap:anywhere}
a:focus-visible{outline:3px solid #0b57d0;outline-offset:2px}
"""


def text(value: str) -> str:
    """A name as HTML: it cannot begin a tag, end an attribute, break a line or turn what follows it."""
    return f"<bdi>{html.escape(''.join(map(escape_letter, value)))}</bdi>"


def page_of(told: Sequence[tuple[dict[str, Any], Path]], written: set[str]) -> str:
    """All photographs on one page, which loads nothing but the pictures beside it."""
    articles = []
    for answer, place in told:
        faces = answer.get("faces") or []
        lines = "".join(f"<li>{_line(face)}</li>" for face in faces)
        body = f"<ol>{lines}</ol>" if faces else f"<p>{text(answer.get('fault', ''))}</p>"
        picture = ""
        if str(place) in written:
            address = html.escape(quote(os.fsencode(place)), quote=True)
            names = ", ".join(said(face)[0] or "a face" for face in faces) or "no face"
            label = html.escape("".join(map(escape_letter, f"{place}: {names}")), quote=True)
            picture = f'<a href="{address}"><img src="{address}" alt="{label}" loading="lazy"></a>'
        name = str(place.parent / Path(answer["path"]).name)  # the photograph's own
        articles.append(f"<article>{picture}<h2>{text(name)}</h2>{body}</article>\n")
    count = sum(len(answer.get("faces") or []) for answer, _ in told)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>Faces on {len(told)} photographs</title><style>{STYLE}</style></head><body>"
        f"<h1>{count} faces on {len(told)} photographs</h1><main>\n{''.join(articles)}</main></body></html>\n"
    )


def _line(face: dict[str, Any]) -> str:
    names, sures = face.get("names") or [], face.get("probabilities") or face.get("scores") or []
    if not names:
        return "a face"
    if names[0] == UNKNOWN and "nearest" in face:
        near = f", nearest {text(face['nearest'][0])}" if face["nearest"] else ""
        return f"unknown (score {face['score']:.3f}{near})"
    form = ".1%" if "probabilities" in face else ".3f"
    return ", ".join(f"{text(name)} {format(sure, form)}" for name, sure in zip(names, sures, strict=True))
