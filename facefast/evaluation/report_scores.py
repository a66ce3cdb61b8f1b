"""Charts of scores: how pairs lie, what thresholds do to them, and whether probabilities mean what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from facefast.evaluation.report_charts import ACCENT, PERCENT, QUIET, SECOND, Chart, axis, colors, sheet, tips


def score_histogram(found: Sequence[Mapping[str, Any]], thresholds: Sequence[tuple[str, float]]) -> Chart:
    """Cosines of pairs of one person and of two, with thresholds as lines."""
    kinds = {"one person": "same", "two people": "different"}
    totals = {key: sum(row[key] for row in found) or 1 for key in kinds.values()}
    values = [
        {"from": row["from"], "to": row["to"], "kind": kind, "pairs": row[key], "share": row[key] / totals[key]}
        for kind, key in kinds.items()
        for row in found
    ]
    lines = [{"threshold": value, "label": label} for label, value in thresholds]
    x = {
        "field": "from",
        "bin": {"binned": True, "step": 0.025},
        "type": "quantitative",
        "title": "cosine of the two pictures",
    }
    layers: list[Mapping[str, Any]] = [
        {
            "data": {"values": values},
            "mark": {"type": "bar", "opacity": 0.6, "binSpacing": 0},
            "encoding": {
                "x": x | {"axis": {"tickCount": 8, "format": ".1f", "values": [k / 5 for k in range(-5, 6)]}},
                "x2": {"field": "to"},
                "y": axis("share", "part of the pairs of that kind", format="~%") | {"stack": None},
                "color": {
                    "field": "kind",
                    "type": "nominal",
                    "scale": {"domain": list(kinds), "range": [ACCENT, SECOND]},
                },
                "tooltip": [
                    {"field": "kind", "title": "pairs of"},
                    *tips(
                        **{
                            "from": ("from", ".3f"),
                            "to": ("to", ".3f"),
                            "pairs": ("pairs", ","),
                            "share": ("part", ".2%"),
                        }
                    ),
                ],
            },
        },
    ]
    for k, line in enumerate(lines):
        at = {"field": "threshold", "type": "quantitative"}
        layers += [
            {
                "data": {"values": [line]},
                "mark": {"type": "rule", "strokeDash": [4, 3], "stroke": "var(--ink)"},
                "encoding": {"x": at},
            },
            {
                "data": {"values": [line]},
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10, "fill": "var(--ink)"},
                "encoding": {"x": at, "y": {"value": 8 + 13 * k}, "text": {"field": "label"}},
            },
        ]
    rows = [[row["from"], row["to"], row["same"], row["different"]] for row in found]
    note = "How alike pictures of one person and of two are, by the model; dashed lines are thresholds."
    return Chart(
        "Scores of pairs", note, sheet(230, *layers), ["cosine from", "to", "pairs of one person", "pairs of two"], rows
    )


Curve = Sequence[tuple[float, float, float]]
"""(threshold, false match rate, false non-match rate)."""


def error_curves(curves_of: Mapping[str, Curve]) -> Iterator[Chart]:
    """ROC and DET of one model or of several."""
    for name, title, note in (
        ("tar", "ROC", "True accepts against false accepts, at every threshold. Up and to the left is better."),
        (
            "fnmr",
            "DET",
            "Misses against false accepts, at every threshold, both logarithmic. Down and to the left is better.",
        ),
    ):
        values: list[dict[str, Any]] = []
        for of, curve in curves_of.items():
            for threshold, fmr, fnmr in curve:
                if fmr > 0 and (name == "tar" or fnmr > 0):  # a logarithm has no place for 0
                    values.append({"of": of, "threshold": threshold, "fmr": fmr, "tar": 1 - fnmr, "fnmr": fnmr})
        if not values:
            continue
        lowest = 10 ** math.floor(math.log10(min(value["fmr"] for value in values)))
        y: dict[str, Any] = axis("tar", "true accept rate", zero=False, format="~%")
        if name == "fnmr":
            least = 10 ** math.floor(math.log10(min(value["fnmr"] for value in values)))
            y = axis("fnmr", "false non-match rate", type="log", domain=[least, 1], format="~%", values=_decades(least))
        place = {
            "x": axis("fmr", "false match rate", type="log", domain=[lowest, 1], format="~%", values=_decades(lowest)),
            "y": y,
            "color": {"value": ACCENT},
        }
        if len(curves_of) > 1:
            names = list(curves_of)
            place["color"] = {
                "field": "of",
                "type": "nominal",
                "scale": {"domain": names, "range": colors(len(names))},
            }
        shown = tips(
            of=("", None),
            fmr=("FMR", ".3~%"),
            **({"tar": ("TAR", ".2%")} if name == "tar" else {"fnmr": ("FNMR", ".3~%")}),
            threshold=("cosine", ".3f"),
        )
        hover = {
            "name": "near",
            "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"},
        }
        spec = sheet(
            250,
            {
                "mark": {"type": "line", "interpolate": "step-before", "clip": True},
                "encoding": place | {"order": {"field": "fmr"}},
            },
            {
                "params": [hover],
                "mark": {"type": "point", "filled": True, "size": 45},
                "encoding": place
                | {
                    "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                    "tooltip": shown if len(curves_of) > 1 else shown[1:],
                },
            },
            data={"values": values},
        )
        header = ["run", "threshold", "FMR", "TAR" if name == "tar" else "FNMR"]
        rows = [[value["of"], value["threshold"], value["fmr"], value[name]] for value in values]
        if len(curves_of) == 1:
            header, rows = header[1:], [row[1:] for row in rows]
        yield Chart(title, note, spec, header, rows)


def _decades(lowest: float) -> list[float]:
    """Powers of ten up to 1: what a logarithmic axis is labelled by."""
    return [10.0**k for k in range(round(math.log10(lowest)), 1)]


def reliability(bins: Sequence[Mapping[str, Any]], ece: float | None) -> Chart:
    """How sure the answers are, and how often they are right."""
    values = [
        {
            "probability": row["probability"],
            "accuracy": row["accuracy"],
            "pictures": row["pictures"],
            "low": row["interval"][0],
            "high": row["interval"][1],
        }
        for row in bins
    ]
    x = axis("probability", "probability of the answer", domain=[0, 1], format="~%")
    spec = sheet(
        250,
        {
            "data": {"values": [{"probability": 0, "accuracy": 0}, {"probability": 1, "accuracy": 1}]},
            "mark": {"type": "line", "strokeDash": [4, 4], "strokeWidth": 1.2, "color": QUIET},
            "encoding": {"x": x, "y": axis("accuracy", "part that is right", domain=[0, 1], format="~%")},
        },
        {
            "mark": {"type": "rule", "color": ACCENT, "opacity": 0.4, "strokeWidth": 2},
            "encoding": {"x": x, "y": axis("low", "part that is right"), "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "color": ACCENT, "opacity": 1},
            "encoding": {
                "x": x,
                "y": axis("accuracy", "part that is right"),
                "size": {"field": "pictures", "type": "quantitative", "scale": {"range": [30, 260]}, "legend": None},
                "tooltip": tips(
                    probability=("probability", PERCENT), accuracy=("right", PERCENT), pictures=("pictures", ",")
                ),
            },
        },
        data={"values": values},
    )
    told = "" if ece is None else f" Expected calibration error {100 * ece:.1f} %."
    note = f"On the dashed line probabilities mean what they say; larger dots hold more pictures.{told}"
    rows = [[v["probability"], v["accuracy"], v["low"], v["high"], v["pictures"]] for v in values]
    return Chart("Calibration", note, spec, ["probability", "right", "95 % from", "to", "pictures"], rows)
