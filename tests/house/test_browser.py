"""The browser that tests of pages look through: what it must not let pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.support import browser as support
from tests.support.browser import Watched, watch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser
PAGE = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page</title>{head}</head><body>{body}</body>'


def page(folder: Path, body: str = "<main><h1>Text</h1></main>", head: str = "") -> Path:
    path = folder / "page.html"
    path.write_text(PAGE.format(head=head, body=body))
    return path


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>console.error('boom')</script>", "error: boom"),
        ("<script>console.warn('hm')</script>", "warning: hm"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
        ("<img src='https://example.org/a.png' alt='a'>", "https://example.org/a.png"),
        ("<style>@import url(http://example.org/a.css);</style>", "http://example.org/a.css"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "http://127.0.0.1:9/x"),
    ],
)
def test_a_complaint_and_a_request_to_another_host_are_failures(
    browser: Browser, tmp_path: Path, body: str, fault: str
) -> None:
    watched = watch(browser, str(page(tmp_path, body)))
    watched.page.wait_for_load_state("networkidle")
    watched.page.context.close()
    assert fault in "\n".join(watched.faults + watched.outside)
    with pytest.raises(AssertionError):
        watched.require_quiet()


def test_a_page_that_shuts_people_out_is_told_from_one_that_does_not(
    look: Callable[..., Watched], tmp_path: Path
) -> None:
    look(page(tmp_path)).require_accessible()
    (tmp_path / "bad").mkdir()
    bad = look(page(tmp_path / "bad", "<main><h1>Text</h1><img src='data:,'><button></button></main>"))
    with pytest.raises(AssertionError, match="image-alt"):
        bad.require_accessible()


def test_pictures_are_taken_for_a_laptop_a_phone_the_dark_and_print(
    look: Callable[..., Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FACEFAST_SCREENSHOTS", raising=False)
    dark = "<style>@media(prefers-color-scheme:dark){body{background:#000}}@media print{body{background:red}}</style>"
    colours, widths = [], []
    for path in look(page(tmp_path, head=dark)).photograph(tmp_path / "seen", "page"):
        with Image.open(path) as picture:
            widths.append(picture.width)
            colours.append(picture.convert("RGB").getpixel((picture.width - 2, 2)))
    assert widths == [1280, 390, 1280, 1280]
    assert colours == [(255, 255, 255), (255, 255, 255), (0, 0, 0), (255, 0, 0)]


def test_a_page_wider_than_a_phone_does_not_fit(look: Callable[..., Watched], tmp_path: Path) -> None:
    wide = look(page(tmp_path, "<main><h1>Text</h1><div style='width:600px'>.</div></main>"), width=390)
    with pytest.raises(AssertionError, match="608 pixels"):
        wide.require_fits()


def test_without_a_browser_a_test_is_skipped_or_fails_where_one_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("FACEFAST_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        support.require_chromium()
    monkeypatch.setenv("FACEFAST_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="FACEFAST_REQUIRE_BROWSER is 1"):
        support.require_chromium()
