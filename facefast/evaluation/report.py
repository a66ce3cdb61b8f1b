"""report.html: one self-contained page about a run, from the files of its folder alone; it shows no photographs."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facefast.evaluation.baselines import BASELINES
from facefast.evaluation.metrics import wilson_interval
from facefast.runtime import files
from facefast.runtime.lines import read_lines

COLUMNS = (
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("per_class", "per class"),
    ("verification_accuracy", "verification, people never seen"),
    ("tar@1e-2", "TAR at FAR 1 %"),
    ("tar@1e-3", "TAR at FAR 0.1 %"),
    ("auc", "AUC"),
    ("known_verification_accuracy", "verification, known people"),
    ("known_tar@1e-2", "TAR at FAR 1 %, known people"),
    ("validation", "on validation"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { background: #fafafa; border: 1px solid #ddd }
pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""


def results_text(results: dict[str, dict[str, float]], handed_on: str = "") -> list[str]:
    """The table as lines of text; `handed_on` is the row to be marked."""
    header, rows = _cells(results)
    rows = _marked(rows, handed_on)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]


def _marked(rows: list[list[str]], handed_on: str) -> list[list[str]]:
    return [[f"{name} *" if name == handed_on else name, *cells] for name, *cells in rows]


def _cells(results: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    present = {key for found in results.values() for key in found}
    attributes = sorted(key for key in present if key.endswith(("/accuracy", "/auc", "/mae")))
    columns = [(key, title) for key, title in COLUMNS if key in present] + [
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


def write(folder: Path) -> Path:
    """Writes `report.html` from recipe.json, plan.json, environment.json, status.json and metrics.jsonl.

    Raises:
        StorageError: it cannot be written.
    """
    lines = read_lines(folder / "metrics.jsonl")
    status = files.read_json(folder / "status.json")
    asked = {line["phase"]: line for line in lines if line.get("split") == "test"}  # a row is its last line
    header, rows = _cells({row: {k: v for k, v in line.items() if v is not None} for row, line in asked.items()})
    rows = _marked(rows, (status.get("best") or {}).get("phase", ""))
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    train = [line for line in lines if line.get("split") == "train"]
    charts = "".join(
        f"<h3>{title}</h3>{_chart(train, key)}"
        for key, title in (("loss", "Training loss"), ("images_per_second", "Images per second"))
    )
    documents = "".join(
        f"<h3>{name}</h3><pre>{html.escape((folder / name).read_text())}</pre>"
        for name in ("status.json", "recipe.json", "plan.json", "environment.json")
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>facefast run {html.escape(folder.name)}</h1><p>{html.escape(_sentence(status))}</p>"
        f"<h2>On the test part, which has chosen nothing</h2><table><tr>{head}</tr>{cells}</table>"
        f"<h2>Curves</h2>{charts}<h2>Everything else</h2>{documents}"
    )
    path, content = folder / "report.html", page.encode("utf-8", "backslashreplace")
    with files.replacing(path, len(content)) as aside:
        aside.write_bytes(content)
    return path


def _sentence(status: dict[str, Any]) -> str:
    best = status.get("best")
    value = "not measured" if not best or best["value"] is None else f"{best['metric']} {best['value']:.2%}"
    named = f"{best['phase']} (*), {value} on the test part" if best else "none"
    return (
        f"State: {status['state']} at step {status.get('step')}. Handed on: {named}. "
        f"Bound by {status.get('bound_by')}; {status.get('advice')}."
    )


def _chart(lines: list[dict[str, Any]], key: str, width: int = 720, height: int = 200) -> str:
    """A polyline per phase as SVG."""
    points = [(line["step"], line[key], line["phase"]) for line in lines if line.get(key) is not None]
    if not points:
        return "<p>no values</p>"
    last = max(step for step, _, _ in points)
    top = max(value for _, value, _ in points) or 1.0
    phases = list(dict.fromkeys(phase for _, _, phase in points))
    colors = ("#0b6", "#06c", "#c60", "#90c", "#c06")
    drawn = []
    for number, phase in enumerate(phases):
        path = " ".join(
            f"{50 + (width - 60) * step / last:.1f},{height - 20 - (height - 40) * value / top:.1f}"
            for step, value, of in points
            if of == phase
        )
        color = colors[number % len(colors)]
        drawn.append(f"<polyline fill=none stroke='{color}' stroke-width=1.5 points='{path}'/>")
        drawn.append(f"<text x={60 + 110 * number} y=14 fill='{color}'>{html.escape(phase)}</text>")
    axis = (
        f"<text x=4 y=24>{top:.3g}</text><text x=4 y={height - 16}>0</text>"
        f"<text x={width - 60} y={height - 4}>{last}</text>"
    )
    return f"<svg width={width} height={height} font-size=12>{axis}{''.join(drawn)}</svg>"
