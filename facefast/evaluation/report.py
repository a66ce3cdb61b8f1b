"""report.html: one self-contained page about a run, from the files of its folder alone; and the table of results as
text. Without being asked for it shows no photographs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from facefast import __version__
from facefast.evaluation import report_about as about
from facefast.evaluation import report_results as shown
from facefast.evaluation.baselines import BASELINES
from facefast.evaluation.metrics import wilson_interval
from facefast.evaluation.report_files import RunFiles
from facefast.evaluation.report_page import Page, paragraph
from facefast.evaluation.report_pictures import Album
from facefast.evaluation.report_results import TITLES
from facefast.runtime import files


def results_text(results: dict[str, dict[str, float]], handed_on: str = "") -> list[str]:
    """The table as lines of text; `handed_on` is the row to be marked."""
    header, rows = _cells(results)
    rows = [[f"{name} *" if name == handed_on else name, *cells] for name, *cells in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]


def _cells(results: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    present = {key for found in results.values() for key in found}
    attributes = sorted(key for key in present if key.endswith(("/accuracy", "/auc", "/mae")))
    columns = [(key, title) for key, title in TITLES.items() if key in present and key != "tasks"] + [
        (k, k.replace("/", " ")) for k in attributes
    ]
    rows = [[phase, *(_cell(key, found) for key, _ in columns)] for phase, found in results.items()]
    return ["phase", *(title for _, title in columns)], rows


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


def write(folder: Path, out: Path | None = None, *, pictures: bool = False) -> Path:
    """Writes the report of a run; returns its path.

    Args:
        folder: of the run.
        out: another place than `report.html` there.
        pictures: show photographs of the people, from where they lie.

    Raises:
        ValueError: it is no run folder, or the photographs are not where they were.
        StorageError: it cannot be written.
    """
    run = RunFiles.read(folder)
    return save(page_of(run, Album(run) if pictures else None), out or folder / "report.html")


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
    if album:
        head += paragraph("This page shows photographs of people: hand it on to nobody who may not see them.", "warn")
    if why := shown.not_examined(run):
        head += paragraph(why, "small")
    foot = Markup("Written by facefast {} from the files of the run folder. It asks no network for anything.")
    return page.html(head, foot.format(__version__))


def save(text: str, path: Path) -> Path:
    """Writes a page.

    Raises:
        StorageError: it cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    with files.replacing(path, len(content)) as aside:
        aside.write_bytes(content)
    return path
