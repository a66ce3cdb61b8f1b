"""Runs side by side on one page: what differs in their options, their curves over each other, their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from facefast import __version__
from facefast.evaluation.report import save, unread
from facefast.evaluation.report_about import facts, points
from facefast.evaluation.report_charts import Chart, Series, curves, forest, number
from facefast.evaluation.report_files import RunFiles
from facefast.evaluation.report_page import (
    EMPTY,
    Page,
    between,
    folded,
    name,
    paragraph,
    percent,
    plain,
    table,
)
from facefast.evaluation.report_results import TITLES, curve_chart, data_name, interval_of, source_name
from facefast.recipe.jsonable import flat

Runs = Mapping[str, RunFiles]
"""Runs by the name that tells them apart."""
NOWHERE = "not there"


def write(folders: Sequence[Path], out: Path, tell: Callable[[str], None] | None = None) -> Path:
    """Writes a page that compares runs; returns its path. `tell` is told what could not be read.

    Raises:
        ValueError: one of them is no run folder, or is named twice.
        StorageError: it cannot be written.
    """
    places = Counter(folder.resolve() for folder in folders)
    if twice := [place for place, count in places.items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice; a run is compared with others")
    runs = named([RunFiles.read(folder) for folder in folders])
    page = Page(f"{len(runs)} runs - facefast report")
    page.section("results", "Results", lambda page: _results(runs, page))
    page.section("training", "Training", lambda page: _training(runs, page))
    page.section("pairs", "Pairs", lambda page: [page.charts(curve_chart(runs))])
    page.section("options", "Options that differ", lambda _: _options(runs))
    page.section("runs", "The runs", lambda _: _about(runs))
    head = Markup('<p class="eyebrow">facefast report</p><h1>{} runs compared</h1>').format(len(runs))
    head += Markup('<p class="lead">{}</p>').format(Markup(", ").join(name(label) for label in runs))
    for label, run in runs.items():
        if told := unread(run):
            if tell is not None:
                tell(f"{label}: {told}")
            head += paragraph(Markup("{}: {}").format(name(label), plain(told)), "warn")
    if warning := _other_pictures(runs):
        head += paragraph(warning, "warn")
    foot = Markup("Written by facefast {} from the files of the run folders. It asks no network for anything.")
    return save(page.html(head, foot.format(__version__)), out)


def named(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Runs by the ends of their paths, as short as they tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return {str(Path(*path[-depth:])): run for path, run in zip(parts, runs, strict=True)}


def _other_pictures(runs: Runs) -> str:
    """A warning where the test parts differ: their numbers do not compare."""
    digests = {
        label: ((run.model.get("metrics") or {}).get("evaluation_set") or {}).get("digest")
        for label, run in runs.items()
    }
    if None in digests.values():
        return "Not every run says which pictures it was measured on: whether the numbers compare is not known."
    if len(set(digests.values())) > 1:
        return "The runs were measured on different test pictures: differences may be those of the pictures."
    return ""


def _results(runs: Runs, page: Page) -> Iterator[Any]:
    rows = {label: run.rows.get(run.handed_on, {}) for label, run in runs.items()}
    present = [key for key in TITLES if any(number(row.get(key)) is not None for row in rows.values())]
    charts = []
    for key in present:
        if key in ("validation", "top5", "per_class"):
            continue
        values = []
        for label, run in runs.items():
            value = number(rows[label].get(key))
            if value is not None:
                low, high = interval_of(run, run.handed_on, key)
                values.append({"name": label, "value": value, "low": low, "high": high})
        if len(values) > 1:
            charts.append(forest(TITLES[key][0].upper() + TITLES[key][1:], "Of the model handed on.", values))
    yield paragraph(
        "Of the model that each run hands on, on its test part. Where intervals overlap, a difference may be chance."
    )
    yield page.charts(charts)
    best = {key: max(value for row in rows.values() if (value := number(row.get(key))) is not None) for key in present}
    body = []
    for label, run in runs.items():
        cells = []
        for key in present:
            value = number(rows[label].get(key))
            if value is None:
                cells.append("–")
                continue
            told = Markup("<b>{}</b>" if value == best[key] else "{}").format(percent(value))
            inside = between(interval_of(run, run.handed_on, key))
            cells.append(told + (Markup('<span class="interval">{}</span>').format(inside) if inside else EMPTY))
        body.append([name(label), name(run.handed_on or "–"), *cells])
    header = ["", "handed on", *(TITLES[key] for key in present)]
    yield table(header, body, "Results of the runs", words=(0, 1))


def _training(runs: Runs, page: Page) -> Iterator[Any]:
    def over(key: str, split: str = "train") -> dict[str, list[tuple[float, float]]]:
        return {label: points(run, key, split) for label, run in runs.items()}

    def drawn(title: str, note: str, series: Series, **more: Any) -> Chart | None:
        return curves(title, note, series, among=list(runs), **more)

    metrics = {str(run.best.get("metric") or "top1") for run in runs.values()}
    yield page.charts(
        [
            drawn("Training loss", "The whole objective; losses of different kinds do not compare.", over("loss")),
            *(
                drawn(
                    f"On validation: {TITLES.get(key, key)}",
                    "What chose the checkpoint.",
                    over(key, "validation"),
                    percent=True,
                    dots=list(runs),
                )
                for key in sorted(metrics)
            ),
            drawn("Accuracy of training batches", "Of augmented pictures.", over("accuracy"), percent=True),
            drawn("Learning rate", "Of the schedule.", over("lr"), form=".3~g", zero=True),
            drawn("Images a second", "Over all processes.", over("images_per_second"), zero=True),
            drawn("Data wait", "Part of the time.", over("data_wait_fraction"), percent=True, zero=True),
        ]
    )


def _options(runs: Runs) -> Iterator[Any]:
    flats = {label: dict(flat(run.recipe)) for label, run in runs.items()}
    keys = list(dict.fromkeys(key for options in flats.values() for key in options))
    rows: list[list[Any]] = []
    only: list[list[Any]] = []
    for key in keys:
        values = [options.get(key, NOWHERE) for options in flats.values()]
        if all(value == values[0] for value in values):
            continue
        row = [Markup("<code>{}</code>").format(plain(key)), *(name(_told(value)) for value in values)]
        (only if NOWHERE in values else rows).append(row)
    header, words = ["option", *map(plain, runs)], range(len(runs) + 1)
    if not rows and not only:
        yield paragraph("None: the recipes are the same.")
    if rows:
        yield table(header, rows, "Options that differ", words=list(words))
    if only:
        drawn = table(header, only, "Options that not every run has", words=list(words))
        yield folded(f"{len(only)} options of phases that not every run has", drawn)


def _told(value: Any) -> str:
    return "none" if value in ("", None) else str(value)


def _about(runs: Runs) -> Iterator[Any]:
    for label, run in runs.items():
        rate, found = number(run.status.get("images_per_second")), run.environment
        bound = f", bound by {plain(run.status['bound_by'])}" if run.status.get("bound_by") else ""
        known = found.get("world_size") and found.get("device")
        yield Markup("<h3>{}</h3>").format(name(label))
        yield facts(
            [
                ("Folder", name(run.folder)),
                ("State", plain(run.status.get("state", "unknown"))),
                ("Photographs", name(data_name(run))),
                ("Source", name(source_name(run) or "random weights")),
                ("Model", plain(run.model.get("backbone", ""))),
                ("Speed", "" if not rate else f"{rate:.0f} images/s{bound}"),
                ("Machine", name(f"{found['world_size']} processes on {found['device']}") if known else ""),
            ]
        )
