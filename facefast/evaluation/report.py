"""report.html: one self-contained page about a run, from the files of its folder alone; and the table of results as
text. Without being asked for it shows no photographs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from markupsafe import Markup

from facefast import __version__
from facefast.evaluation import report_about as about
from facefast.evaluation import report_results as shown
from facefast.evaluation.baselines import BASELINES
from facefast.evaluation.metrics import wilson_interval
from facefast.evaluation.report_files import RunFiles
from facefast.evaluation.report_page import Page, folded, joined, name, paragraph, plain
from facefast.evaluation.report_pictures import NAMED, Album
from facefast.evaluation.report_results import TITLES
from facefast.runtime import files

WIDTH = 80
"""Letters of a line of text: what a terminal has at least."""
FIRST = ("top1", "verification_accuracy", "known_verification_accuracy", "validation", "tar@1e-2")
"""Columns that a narrow table has before others."""


def results_text(results: dict[str, dict[str, float]], handed_on: str = "", width: int = WIDTH) -> list[str]:
    """The table as lines of text.

    Args:
        results: numbers by row.
        handed_on: the row to be marked.
        width: letters of a line at most. Columns that find no room are named below.
    """
    names = [f"{name} *" if name == handed_on else name for name in results]
    free = width - max(map(len, ["phase", *names]))
    columns = {}  # by key: the lines of its header, its cells
    left_out = []
    titles = _titles(results)
    for key in sorted(titles, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST)):
        cells = [_cell(key, found) for found in results.values()]
        room = max(map(len, [*cells, *titles[key].split()]))
        while len(textwrap.wrap(titles[key], room)) > 2:
            room += 1
        if free < room + 2:
            left_out.append(key)
            continue
        free -= room + 2
        columns[key] = textwrap.wrap(titles[key], room), [cell.rjust(room) for cell in cells]
    shown = [columns[key] for key in titles if key in columns]
    height = max((len(header) for header, _ in shown), default=1)
    padded = [[""] * (height - len(header)) + header for header, _ in shown]
    first = max(map(len, ["phase", *names]))
    lines = [["" if line < height - 1 else "phase", *(header[line] for header in padded)] for line in range(height)]
    lines += [[name, *(cells[number] for _, cells in shown)] for number, name in enumerate(names)]
    widths = [first, *(len(cells[0]) if cells else 0 for _, cells in shown)]
    text = [
        "  ".join(
            part.rjust(size) if place else part.ljust(size)
            for place, (part, size) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if left_out:
        rest = ", ".join(titles[key] for key in titles if key in left_out)
        text += textwrap.wrap(f"in report.html as well: {rest}", width)
    return [line.rstrip() for line in text]


def _titles(results: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The columns of the table in their order."""
    present = {key for found in results.values() for key in found}
    attributes = sorted(key for key in present if key.endswith(("/accuracy", "/auc", "/mae")))
    known = {key: title for key, title in TITLES.items() if key in present and key != "tasks"}
    return known | {key: key.replace("/", " ") for key in attributes}


def _cell(key: str, found: Mapping[str, float]) -> str:
    value = found.get(key, math.nan)
    if not math.isfinite(value):
        return "-"
    if f"{key}_low" in found:
        return f"{value:.2%} ({100 * found[f'{key}_low']:.1f}-{100 * found[f'{key}_high']:.1f})"
    return f"{value:.2f}" if key.endswith("/mae") else f"{value:.2%}"


def with_baselines(evaluation: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Rows of the table for the source model untrained; the first has its verification too."""
    rows: dict[str, dict[str, float]] = {}
    for key, title in BASELINES.items():
        if key in evaluation:
            rows[title] = {"top1": evaluation[key]}
            if total := int(evaluation.get("test_rows") or 0):
                low, high = wilson_interval(round(evaluation[key] * total), total)
                rows[title] |= {"top1_low": low, "top1_high": high}
    if rows:
        first = next(iter(rows.values()))
        first.update({k: v for k, v in evaluation.items() if "verification" in k or "tar@" in k or k.endswith("auc")})
    return rows


def write(
    folder: Path, out: Path | None = None, *, pictures: bool = False, tell: Callable[[str], None] | None = None
) -> Path:
    """Writes the report of a run; returns its path.

    Args:
        folder: of the run.
        out: another place than `report.html` there.
        pictures: show photographs of the people, from where they lie; those that cannot be read are left out.
        tell: told what is not on the page, since it could not be read.

    Raises:
        ValueError: it is no run folder.
        StorageError: it cannot be written.
    """
    run = RunFiles.read(folder)
    album = Album(run) if pictures else None
    text = page_of(run, album)
    for told in (unread(run), album.unread() if album else ""):
        if told and tell is not None:
            tell(told)
    return save(text, out or folder / "report.html")


def page_of(run: RunFiles, album: Album | None = None) -> str:
    """The page as text."""
    page = Page(f"{run.name} - facefast report")
    page.section("results", "Results", lambda page: shown.results(run, page))
    page.section("names", "Names and mistakes", lambda page: shown.naming(run, page, album))
    page.section("pairs", "Pairs", lambda page: shown.verification(run, page, album))
    page.section("training", "Training", lambda page: about.training(run, page))
    page.section("data", "Photographs", lambda page: about.data(run, page, album))
    page.section("speed", "Speed", lambda page: about.speed(run, page))
    page.section("card", "Model card", lambda _: about.card_of(run))
    page.section("recipe", "Recipe", lambda _: about.recipe(run))
    page.section("environment", "Environment", lambda _: about.environment(run))
    head = shown.headline(run)
    if told := unread(run):
        head += paragraph(plain(told), "warn")
    if album and album.shown:
        head += paragraph("This page shows photographs of people: hand it on to nobody who may not see them.", "warn")
    if album and (told := album.unread()):
        head += paragraph(plain(told), "warn")
        if len(album.lost) > NAMED:
            listed = Markup("<ul>{}</ul>").format(joined(Markup("<li>{}</li>").format(name(n)) for n in album.lost))
            head += folded("Photographs that could not be read", listed)
    if why := shown.not_examined(run):
        head += paragraph(why, "small")
    foot = Markup("Written by facefast {} from the files of the run folder. It asks no network for anything.")
    return page.html(head, foot.format(__version__))


def unread(run: RunFiles) -> str:
    """What of the run folder is not on the page, since it could not be read; empty where all could."""
    return f"What these hold is not on the page: {'; '.join(run.faults)}." if run.faults else ""


def save(text: str, path: Path) -> Path:
    """Writes a page.

    Raises:
        StorageError: it cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    with files.replacing(path, len(content)) as aside:
        aside.write_bytes(content)
    return path
