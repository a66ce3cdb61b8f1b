"""Pages in a headless Chromium, driven by Playwright: what they complain about, what they ask of others, whom they shut
out, and how they look.

A test asks for the fixture `look`, marks itself `browser`, and gets a page by `look(address)`. When it ends, a message
on the console, a fault of a script or a request to another host is a failure, whatever the test itself looked at.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""What distributions call it."""
WIDTHS = (1280, 390)
"""Pixels: a laptop and a phone."""
SERIOUS = ("serious", "critical")
"""Impacts, by axe-core, that no page may have."""
INLINE = ("data", "blob", "about")
"""Schemes of addresses that ask nobody for anything."""
PATIENCE = 30_000
"""Milliseconds for anything to come about: the machine may be busy."""


def chromium() -> str | None:
    """The browser's path, or None where this machine has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Watched:
    """A page, and what it did that no page of ours does."""

    page: Page
    address: str
    faults: list[str] = field(default_factory=list)
    """Warnings and errors of the console, and scripts that failed."""
    outside: list[str] = field(default_factory=list)
    """Addresses of other hosts that it asked for; none of them was answered."""

    def require_quiet(self) -> None:
        """No complaint and no request to others so far."""
        assert not self.faults, self.faults
        assert not self.outside, self.outside

    def require_accessible(self) -> None:
        """axe-core finds no serious fault on the page as it is now."""
        self.page.evaluate((importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text())
        found: dict[str, Any] = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert found["passes"], "axe-core looked at nothing"
        faults = [
            f"{fault['id']}: {fault['help']}: {[node['html'][:200] for node in fault['nodes'][:3]]}"
            for fault in found["violations"]
            if fault["impact"] in SERIOUS
        ]
        assert not faults, "\n".join(faults)

    def require_fits(self) -> None:
        """The page is not wider than the window: nobody scrolls sideways to read it."""
        wide, window = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, f"the page is {wide} pixels wide in a window of {window}"

    def photograph(self, folder: Path, name: str) -> list[Path]:
        """Screenshots of the whole page: NAME-1280.png, NAME-390.png, NAME-dark.png and NAME-print.png.

        The first two must fit their window. FACEFAST_SCREENSHOTS names another folder, for people to look at.
        """
        folder = Path(os.environ.get("FACEFAST_SCREENSHOTS") or folder)
        folder.mkdir(parents=True, exist_ok=True)
        before, taken = self.page.viewport_size, []

        def shoot(what: str) -> None:
            taken.append(folder / f"{name}-{what}.png")
            self.page.screenshot(path=taken[-1], full_page=True)

        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 800})
            self.require_fits()
            shoot(str(width))
        self.page.set_viewport_size({"width": WIDTHS[0], "height": 800})
        self.page.emulate_media(color_scheme="dark")
        shoot("dark")
        self.page.emulate_media(color_scheme="light", media="print")
        shoot("print")
        self.page.emulate_media(media="screen")
        if before is not None:
            self.page.set_viewport_size(before)
        return taken


def watch(browser: Browser, address: str, width: int = WIDTHS[0], scheme: str = "light") -> Watched:
    """Opens an address (a URL, or a file's path) in a window of its own; `require_quiet` is for the end."""
    if "://" not in address:
        address = Path(address).absolute().as_uri()
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    watched, own = Watched(page, address), urlsplit(address)

    def ask(route: Route, request: Request) -> None:
        asked = urlsplit(request.url)
        if asked.scheme in INLINE or (asked.scheme, asked.netloc) == (own.scheme, own.netloc):
            route.continue_()
        else:
            watched.outside.append(request.url)
            route.abort()

    def say(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            watched.faults.append(f"{message.type}: {message.text}")

    context.route("**/*", ask)
    page.on("console", say)
    page.on("pageerror", lambda error: watched.faults.append(f"script: {error}"))
    page.goto(address)
    return watched


def require_chromium() -> str:
    """The browser's path. Where there is none the test is skipped, or fails where FACEFAST_REQUIRE_BROWSER is 1."""
    path = chromium()
    if path is None:
        reason = f"no {' or '.join(NAMES)} on PATH; apt-get install chromium brings one"
        if os.environ.get("FACEFAST_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and FACEFAST_REQUIRE_BROWSER is 1")
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, as `require_chromium` finds it."""
    path = require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's sandbox refuses to run as root, which is what a container's user is.
        found = driver.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        yield found
        found.close()


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens pages, as `watch` does it; in the end each of them has said nothing and asked nobody else."""
    opened: list[Watched] = []

    def open_page(address: str | Path, width: int = WIDTHS[0], scheme: str = "light") -> Watched:
        opened.append(watch(browser, str(address), width, scheme))
        return opened[-1]

    yield open_page
    for one in opened:
        one.page.context.close()
    for one in opened:
        one.require_quiet()
