"""report.html and the table on the terminal: what the test part gave, curves, and nothing that a browser would run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from facefast.evaluation import report
from facefast.runtime import files

RESULTS = {
    "scratch": {"loss": 1.5, "top1": 0.5, "auc": 0.91234, "tar@1e-3": float("nan")},
    "finetune": {"loss": 0.5, "top1": 1.0},
}


def test_the_table_is_aligned_and_shows_only_numbers_that_somebody_has() -> None:
    header, first, second = report.results_text(RESULTS)
    assert header.split() == ["phase", "top-1", "TAR", "at", "FAR", "0.1", "%", "AUC"]
    assert first.split() == ["scratch", "50.00%", "-", "91.23%"]  # 40 pairs cannot show a rate of one in a thousand
    assert second.split() == ["finetune", "100.00%", "-", "-"]
    assert len({len(line) for line in (header, first, second)}) == 1


def test_accuracies_come_with_their_intervals_those_of_the_baselines_too() -> None:
    evaluation = {"top1": 0.5, "class_means_top1": 0.75, "test_rows": 100, "auc": 0.9}
    (means,) = report.with_baselines(evaluation).values()
    _, line = report.results_text({"class means": means})
    assert line.split()[2:4] == ["75.00%", "(65.7-82.5)"]  # Wilson's interval of 75 in 100


def test_the_row_that_is_handed_on_is_marked_and_no_other() -> None:
    header, first, second = report.results_text(RESULTS, "finetune")
    assert second.startswith("finetune *") and "*" not in header + first
    assert first.index("50.00%") + len("50.00%") == second.index("100.00%") + len("100.00%")
    assert report.results_text(RESULTS, "nobody") == report.results_text(RESULTS)


class Page(HTMLParser):
    """Tags, attributes and text of a page, with every tag that needs it closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def train_line(step: int, phase: str, loss: float | None, speed: float = 100.0) -> dict[str, Any]:
    return {"step": step, "phase": phase, "split": "train", "loss": loss, "images_per_second": speed}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run <b>1"
    folder.mkdir()
    best = {"phase": "<i>finetune</i>", "metric": "top1", "value": 0.75, "validation": 0.875}
    status = {"state": "done", "step": 6, "best": best, "bound_by": "compute", "advice": "use less"}
    files.write_json(folder / "status.json", status)
    files.write_json(folder / "recipe.json", {"source": "<script>alert(1)</script>"})
    files.write_json(folder / "plan.json", {"phases": []})
    files.write_json(folder / "environment.json", {"torch": "2"})
    lines = [
        *(train_line(step, "scratch", 4.0 / step) for step in (1, 2, 3)),
        {"step": 3, "phase": "scratch", "split": "validation", "top1": 0.1},
        {"step": 3, "phase": "scratch", "split": "test", "top1": 0.125, "tar@1e-3": None, "validation": 0.1},
        train_line(4, "<i>finetune</i>", None),  # all its updates were skipped
        {"step": 4, "phase": "<i>finetune</i>", "split": "validation", "top1": 0.875},
        *(train_line(step, "<i>finetune</i>", 1.0) for step in (5, 6)),
        {"step": 6, "phase": "<i>finetune</i>", "split": "validation", "top1": 0.3},
        {"step": 6, "phase": "<i>finetune</i>", "split": "test", "top1": 0.25, "validation": 0.875},
        {"step": 6, "phase": "<i>finetune</i>", "split": "test", "top1": 0.75, "validation": 0.875},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_page_shows_what_the_test_part_gave_and_marks_what_is_handed_on(folder: Path) -> None:
    assert report.write(folder) == folder / "report.html"
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert (
        "State: done at step 6. Handed on: <i>finetune</i> (*), top1 75.00% on the test part. "
        "Bound by compute; use less." in text
    )
    assert "On the test part, which has chosen nothing" in text
    assert "<i>finetune</i> *75.00%87.50%" in text  # the last line of a row, with what has chosen it
    assert "scratch12.50%10.00%" in text  # which is not marked
    assert "30.00%" not in text and "25.00%" not in text  # another checkpoint's, and one that was asked again
    assert "TAR at FAR 0.1 %" not in text  # nobody has it
    for name in ("status.json", "recipe.json", "plan.json", "environment.json"):
        assert name in text


def test_a_page_from_before_the_test_part_was_asked_says_that_nothing_was_measured(folder: Path) -> None:
    status = files.read_json(folder / "status.json")
    files.write_json(folder / "status.json", status | {"best": status["best"] | {"value": None}})
    text = Page(report.write(folder).read_text(encoding="utf-8")).text
    assert "Handed on: <i>finetune</i> (*), not measured on the test part." in text


def test_nothing_on_the_page_is_run_or_fetched(folder: Path) -> None:
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert {"script", "img", "link", "i", "b"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "run <b>1" in page.text


def test_every_curve_has_a_line_a_phase_whose_points_lie_inside_the_chart(folder: Path) -> None:
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2
    curves = [re.findall(r"([\d.-]+),([\d.-]+)", value or "") for name, value in page.attributes if name == "points"]
    assert [len(curve) for curve in curves] == [3, 2, 3, 3]  # loss, then speed; a null is no point
    points = [(float(x), float(y)) for curve in curves for x, y in curve]
    assert all(50 <= x <= 710 and 20 <= y <= 180 for x, y in points)
    losses = [float(y) for _, y in curves[0]]
    assert losses == sorted(losses)  # it falls, and pictures count downwards
    assert losses[0] == 20  # the greatest value touches the top


def test_a_run_that_was_never_examined_has_a_page_too(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    files.write_json(folder / "status.json", {"state": "failed", "step": None, "best": None})
    text = Page(report.write(folder).read_text(encoding="utf-8")).text
    assert "Handed on: none." in text
    assert text.count("no values") == 2
