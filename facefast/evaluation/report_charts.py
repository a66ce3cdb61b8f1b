"""Charts of a report: Vega-Lite specifications with their data, and the same data as a table.

Colours are the page's CSS variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 240
"""Of one line of a chart: about as many as the pixels of a phone. More are means of as many stretches."""
PALETTE = [f"var(--c{k})" for k in range(1, 9)]
ACCENT, SECOND, QUIET = "var(--accent)", "var(--second)", "var(--quiet)"
PERCENT = ".1%"
CONFIG: dict[str, Any] = {
    "aria": False,  # the page names each chart itself, and has its data as a table
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelLimit": 190,
        "labelPadding": 6,
        "ticks": False,
        "labelOverlap": "greedy",
        "labelSeparation": 6,
    },
    "axisX": {"grid": False, "tickCount": 6},
    "axisY": {"domain": False, "tickCount": 5},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "labelLimit": 240,
        "symbolStrokeWidth": 2.5,
        "offset": 6,
        "columns": 4,
    },
    "line": {"strokeWidth": 1.8, "strokeJoin": "round"},
    "range": {"category": PALETTE},
}


@dataclass(frozen=True)
class Chart:
    """A drawing and the table behind it."""

    title: str
    note: str
    """Under the title: what the axes are, and what to look for."""
    spec: dict[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[Any]] = field(repr=False, default=())


Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) of each line, x rising."""


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means over stretches of equal length, at the last place of each."""
    if len(points) <= most:
        return list(points)
    found = []
    for k in range(most):
        part = points[k * len(points) // most : (k + 1) * len(points) // most]
        found.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return found


def sheet(height: int, *layers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A whole drawing, as wide as its place on the page."""
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": CONFIG,
        "layer": [layer for layer in layers if layer],
        **more,
    }


def axis(name: str, title: str | None, **more: Any) -> dict[str, Any]:
    """A quantitative position."""
    scale = {key: more.pop(key) for key in ("zero", "domain", "type", "nice", "clamp") if key in more}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, **({"axis": more} if more else {})}


def tips(**fields: Any) -> list[dict[str, Any]]:
    """What a pointer shows: a field and its title, with a format where it is a number."""
    return [
        {"field": name, "title": told[0], **({"type": "quantitative", "format": told[1]} if told[1] else {})}
        for name, told in fields.items()
    ]


def shading(phases: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Every other phase in another shade, with its name where there is room for it."""
    if len(phases) < 2:
        return []
    whole = max(end for _, _, end in phases) or 1.0
    values = [{"from": begin, "to": end, "label": _fitting(name, (end - begin) / whole)} for name, begin, end in phases]
    x = {"field": "from", "type": "quantitative"}
    return [
        {
            "data": {"values": values[1::2]},
            "mark": {"type": "rect", "fill": "var(--shade)"},
            "encoding": {"x": x, "x2": {"field": "to"}},
        },
        {
            "data": {"values": values},
            "mark": {
                "type": "text",
                "align": "left",
                "baseline": "bottom",
                "dx": 2,
                "dy": -4,
                "fontSize": 10,
                "fill": "var(--muted)",
            },
            "encoding": {"x": x, "y": {"value": 0}, "text": {"field": "label"}},
        },
    ]


def _fitting(name: str, part: float) -> str:
    """A phase's name, cut to about the room that its part of the chart has."""
    room = int(part * 60)
    return name if len(name) <= room else f"{name[: room - 1]}…" if room > 4 else ""


def curves(
    title: str,
    note: str,
    series: Series,
    *,
    x: str = "step",
    y: str = "",
    form: str = ".4~g",
    phases: Sequence[tuple[str, float, float]] = (),
    height: int = 200,
    dots: Sequence[str] = (),
    zero: bool = False,
    log: bool = False,
    percent: bool = False,
    x_form: str = "~s",
    steps: bool = False,
    among: Sequence[str] = (),
) -> Chart | None:
    """Lines over a common axis, whose values a pointer shows; None where there is not one point.

    Args:
        dots: names of series whose points are marked, for they are few.
        log: a logarithmic vertical axis, where all values allow it.
        x_form: of the numbers below.
        steps: values stay until the next one, instead of moving towards it.
        among: names of series that keep their colours from chart to chart, those without points here among them.
    """
    lines = {name: thinned(points) for name, points in series.items() if points}
    if not lines:
        return None
    values = [{"x": a, "y": b, "series": name} for name, points in lines.items() for a, b in points]
    log = log and min(b for points in lines.values() for _, b in points) > 0
    scale: dict[str, Any] = {"type": "log"} if log else {"zero": zero, "nice": True}
    color: dict[str, Any] = {"value": ACCENT}
    if len(lines) > 1 or among:
        names = list(among or lines)
        color = {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": names, "range": colors(len(names))},
            "legend": {"offset": 20 if len(phases) > 1 else 6},  # the phases' names stand between it and the lines
        }
    place = {
        "x": axis("x", x, nice=False, format=x_form),
        "y": axis("y", y or None, **scale, **({"format": "~%"} if percent else {"format": "~g"} if log else {})),
        "color": color,
    }
    shown = tips(
        series=("", None), x=(x, ",.6~g" if x_form == "~s" else x_form), y=(y or "value", PERCENT if percent else form)
    )
    hover = {"name": "near", "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}}
    spec = sheet(
        height,
        *shading(phases),
        {
            "data": {"values": values},
            "mark": {"type": "line", "interpolate": "step-after" if steps else "linear"},
            "encoding": place,
        },
        {
            "data": {"values": values},
            "params": [hover],
            "mark": {"type": "point", "filled": True, "size": 45},
            "encoding": {
                **place,
                "opacity": {
                    "condition": [
                        {"param": "near", "empty": False, "value": 1},
                        {"test": {"field": "series", "oneOf": list(dots)}, "value": 1},
                    ],
                    "value": 0,
                },
                "tooltip": shown if len(lines) > 1 or among else shown[1:],
            },
        },
    )
    rows = [[name, a, b] for name, points in lines.items() for a, b in points]
    if len(lines) == 1:
        return Chart(title, note, spec, [x, y or title.lower()], [row[1:] for row in rows])
    return Chart(title, note, spec, ["line", x, y or "value"], rows)


def colors(count: int) -> list[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(count)]


def forest(title: str, note: str, rows: Sequence[Mapping[str, Any]], marked: str = "", what: str = "") -> Chart | None:
    """Rates with their intervals, a line each.

    Args:
        rows: name, value, low and high; the last two may be None.
        marked: the name that stands out.
    """
    if not rows:
        return None
    values = [dict(row) | {"marked": row["name"] == marked} for row in rows]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelColor": "var(--ink)", "labelFontSize": 12, "domain": False, "grid": False},
    }
    color = {"condition": {"test": "datum.marked", "value": ACCENT}, "value": QUIET}
    ends = [x for row in rows for x in (row["low"], row["value"], row["high"]) if x is not None]
    margin = max(0.08 * (max(ends) - min(ends)), 0.015)
    domain = [max(0.0, min(ends) - margin), min(1.0, max(ends) + margin)]
    spec = sheet(
        max(60, 30 * len(rows) + 34),
        {
            "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round", "opacity": 0.55},
            "encoding": {
                "x": axis("low", what or None, domain=domain, nice=False, format="~%", grid=True),
                "x2": {"field": "high"},
                "y": y,
                "color": color,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
            "encoding": {
                "x": axis("value", what or None),
                "y": y,
                "color": color,
                "tooltip": tips(name=("", None), value=("rate", ".2%"), low=("95 % from", ".2%"), high=("to", ".2%")),
            },
        },
        data={"values": values},
    )
    return Chart(
        title,
        note,
        spec,
        ["", "value", "95 % from", "to"],
        [[r["name"], r["value"], r["low"], r["high"]] for r in rows],
    )


def bars(title: str, note: str, values: Sequence[tuple[float, float, float]], x: str, y: str) -> Chart:
    """A histogram of (from, to, height)."""
    rows = [{"from": low, "to": high, "height": height} for low, high, height in values]
    spec = sheet(
        200,
        {
            "mark": {"type": "bar", "color": ACCENT, "binSpacing": 1, "opacity": 0.85},
            "encoding": {
                "x": {"field": "from", "bin": "binned", "type": "quantitative", "title": x, "axis": {"tickCount": 8}},
                "x2": {"field": "to"},
                "y": axis("height", y, tickMinStep=1),
                "tooltip": tips(**{"from": ("above", "~g"), "to": ("to", "~g"), "height": (y, ",")}),
            },
        },
        data={"values": rows},
    )
    return Chart(title, note, spec, [f"{x}, above", "to", y], [list(value) for value in values])


def shares(title: str, note: str, parts: Sequence[tuple[str, float]]) -> Chart:
    """Parts of a whole as bars from 0 to 100 %."""
    spec = sheet(
        max(60, 30 * len(parts) + 34),
        {
            "mark": {"type": "bar", "color": ACCENT, "height": 14, "cornerRadius": 3, "opacity": 0.85},
            "encoding": {
                "x": axis("part", None, domain=[0, 1], format="~%", grid=True),
                "y": {
                    "field": "name",
                    "type": "nominal",
                    "sort": None,
                    "title": None,
                    "axis": {"labelColor": "var(--ink)", "labelFontSize": 12, "domain": False, "grid": False},
                },
                "tooltip": tips(name=("", None), part=("part", PERCENT)),
            },
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 11, "fill": "var(--ink)"},
            "encoding": {
                "x": axis("part", None),
                "y": {"field": "name", "type": "nominal", "sort": None},
                "text": {"field": "part", "type": "quantitative", "format": PERCENT},
            },
        },
        data={"values": [{"name": name, "part": part} for name, part in parts]},
    )
    return Chart(title, note, spec, ["", "part"], [list(part) for part in parts])
