"""suspects.html shows names as text, whatever they hold, and loads nothing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facefast.data import FaceIndex
from facefast.labels.pages import write_page
from facefast.labels.sheets import TILE, Strip
from tests.support.pictures import encode, smooth_picture


class Reader(HTMLParser):
    """The tags with their attributes, and the text, as a browser has them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style><svg/onload=alert(1)>",
    "a&lt;b & c",
    "محمد",
    "李",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_everywhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.png").write_bytes(encode(smooth_picture(40, 30), "PNG"))
    index = FaceIndex.build(tmp_path, [b"0.png"], [0], (name,))
    write_page(tmp_path / "page.html", name, [name], {name: [Strip(name, f"is {name}?", [[0]])]}, index)
    read = Reader((tmp_path / "page.html").read_text("utf-8"))
    assert [tag for tag, _ in read.tags].count("img") == 1
    assert not {"script", "svg", "link", "iframe"} & {tag for tag, _ in read.tags}
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert read.text.count(name) == 6  # title, heading, line, section, and both lines of the strip


def test_paths_are_text_in_attributes(tmp_path: Path) -> None:
    name = '"onerror="alert(1)".png'
    (tmp_path / name).write_bytes(encode(smooth_picture(40, 30), "PNG"))
    index = FaceIndex.build(tmp_path, [name.encode()], [0], ("ann",))
    write_page(tmp_path / "page.html", "t", [], {"k": [Strip("a", "b", [[0]])]}, index)
    (image,) = (found for tag, found in Reader((tmp_path / "page.html").read_text("utf-8")).tags if tag == "img")
    assert image["title"] == image["alt"] == name
    assert set(image) == {"src", "alt", "title"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("\u202egpj", r"\u202egpj"), ("\x1b[31m", r"\x1b[31m"), ("\udcff", r"\xff")],
)
def test_line_ends_and_codes_of_direction_are_shown_as_codes(tmp_path: Path, name: str, shown: str) -> None:
    index = FaceIndex.build(tmp_path, [b"gone.png"], [0], (name,))
    write_page(tmp_path / "page.html", name, [name], {"k": [Strip(name, "", [[0]])]}, index)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert Reader(page).text.count(shown) == 4
    assert name not in page


def test_photographs_are_in_the_page_and_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encode(Image.new("RGB", (50, 50), (200, 0, 0)), "PNG"))
    index = FaceIndex.build(tmp_path, [b"0.png", b"gone.png"], [0, 0], ("ann",))
    write_page(tmp_path / "page.html", "t", [], {"k": [Strip("a", "b", [[0], [1, 0]])], "empty": []}, index)
    page = (tmp_path / "page.html").read_text("utf-8")
    sources = [found["src"] or "" for tag, found in Reader(page).tags if tag == "img"]
    assert len(sources) == 3 and sources[0] == sources[2] != sources[1]
    head, content = sources[0].split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (TILE - 2, TILE - 2)
        assert np.asarray(picture)[47, 47, 0] > 190
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert "empty" not in page
