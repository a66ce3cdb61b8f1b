"""report.html and the table on the terminal: what the test part gave, in words that no name can change."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from facefast.evaluation import report, report_page
from facefast.evaluation.report_charts import bars, curves, forest, thinned
from facefast.evaluation.report_files import EVALUATION, RunFiles
from facefast.evaluation.report_page import Page
from facefast.evaluation.report_results import TITLES
from facefast.recipe import Phase, Recipe, to_json
from facefast.runtime import files
from tests.support.reported import HOSTILE, write_run

RESULTS = {
    "scratch": {"loss": 1.5, "top1": 0.5, "auc": 0.91234, "tar@1e-3": float("nan")},
    "finetune": {"loss": 0.5, "top1": 1.0},
}


def test_the_table_is_aligned_and_shows_only_numbers_that_somebody_has() -> None:
    above, header, first, second = report.results_text(RESULTS)
    assert above.split() == ["TAR", "at"]
    assert header.split() == ["phase", "top-1", "FAR", "0.1", "%", "AUC"]
    assert first.split() == ["scratch", "50.00%", "-", "91.23%"]  # 40 pairs cannot show a rate of one in a thousand
    assert second.split() == ["finetune", "100.00%", "-", "-"]
    assert len({len(line) for line in (header, first, second)}) == 1


def test_the_table_fits_a_terminal_and_names_the_columns_that_do_not() -> None:
    wide = {key: 0.5 for name in TITLES for key in (name, f"{name}_low", f"{name}_high")}
    lines = report.results_text({"adapted class means": wide, "last": wide}, "last")
    assert max(map(len, lines)) <= report.WIDTH
    assert "top-1" in lines[1] and "people never seen" in lines[1]
    assert "in report.html as well: top-5" in "\n".join(lines)
    whole = report.results_text({"last": wide}, width=1000)
    assert "in report.html" not in "\n".join(whole) and "per class" in whole[1]


def test_accuracies_come_with_their_intervals_those_of_the_baselines_too() -> None:
    evaluation = {"top1": 0.5, "class_means_top1": 0.75, "test_rows": 100, "auc": 0.9}
    (means,) = report.with_baselines(evaluation).values()
    _, line = report.results_text({"class means": means})
    assert line.split()[2:4] == ["75.00%", "(65.7-82.5)"]  # Wilson's interval of 75 in 100


def test_the_row_that_is_handed_on_is_marked_and_no_other() -> None:
    _, header, first, second = report.results_text(RESULTS, "finetune")
    assert second.startswith("finetune *") and "*" not in header + first
    assert first.index("50.00%") + len("50.00%") == second.index("100.00%") + len("100.00%")
    assert report.results_text(RESULTS, "nobody") == report.results_text(RESULTS)


class Read(HTMLParser):
    """Tags, attributes, text and scripts of a page, with every tag that needs it closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data

    @property
    def specs(self) -> list[dict[str, Any]]:
        """Of its charts."""
        found: list[dict[str, Any]] = json.loads(self.scripts[0])
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of people with names of all kinds; the last phase bears the first of them."""
    return write_run(tmp_path_factory.mktemp("runs") / "run <b>1", HOSTILE)


def page_of(folder: Path) -> Read:
    return Read(report.write(folder).read_text(encoding="utf-8"))


def copy_of(folder: Path, target: Path) -> Path:
    """A run folder that may be damaged."""
    for path in folder.rglob("*.json*"):
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def test_names_of_all_kinds_are_shown_as_text_and_line_feeds_and_marks_of_direction_as_escapes(folder: Path) -> None:
    page = page_of(folder)
    for name in HOSTILE:
        assert report_page.plain(name) in page.text, name
    assert "line\\nfeed\\r\\n\\ttab" in page.text and "turned \\u202e round" in page.text
    assert not re.search("[\u202e\u2028\u0000]", page.text)
    assert "run <b>1" in page.text
    assert page.tags.count("script") == 3 and {"img", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "style", "onerror") and name != "style"]
    assert {value for name, value in page.attributes if name == "dir"} == {"auto"}


def test_nothing_is_asked_of_a_network(folder: Path) -> None:
    page = page_of(folder)
    links = [value or "" for name, value in page.attributes if name in ("src", "href")]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = (value or "" for name, value in page.attributes if name == "content" and "default-src" in (value or ""))
    assert "default-src 'none'" in policy and "connect-src" not in policy and "img-src data:" in policy
    anchors = {value for name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links} <= anchors


def test_the_data_of_charts_stands_in_a_script_that_no_name_can_end(folder: Path) -> None:
    page = page_of(folder)
    assert not re.search("[<>&\u2028]", page.scripts[0])
    values = json.dumps(page.specs)
    assert "\\u003c" not in values and "<script>alert(1)</script>" in values  # a phase and a row of the table
    assert not re.search(r"</script|<!--", page.scripts[1], re.I)


def test_the_headline_says_what_was_trained_on_whom_how_good_it_is_and_what_chose_it(folder: Path) -> None:
    text = re.sub(r"\s+", " ", page_of(folder).text)
    right = files.read_json(folder / "status.json")["best"]["value"]
    assert "mobilefacenet at 32 px, moved from <script>alert(1)</script> to 12 people, by 96 photographs" in text
    assert f"{100 * right:.1f} % of 48 test pictures get their right name, 95 % interval" in text
    assert "class means of the untrained source give 70.0 %" in text
    assert "It was chosen by top-1 on 40 validation pictures (90.0 %)" in text
    assert f"{100 * (right - 0.7):+.1f} points" in text


def test_the_report_has_every_part_and_a_table_behind_every_chart(folder: Path) -> None:
    page = page_of(folder)
    titles = ["Results", "Names and mistakes", "Pairs", "Training", "Photographs", "Speed", "Model card", "Recipe"]
    for title in titles:
        assert title in page.text
    drawn = [value for name, value in page.attributes if name == "data-chart"]
    assert drawn == [str(k) for k in range(len(page.specs))] and len(drawn) >= 14
    assert page.text.count("Data as a table") == len(drawn)
    for title in ("ROC", "DET", "CMC", "Calibration", "Scores of pairs", "Training loss", "Learning rate", "Data wait"):
        assert title in page.text
    assert "People named worst" in page.text and "Who is taken for whom" in page.text
    assert "One person, least alike" in page.text and "Names, by group" in page.text
    assert "3 pictures were left out before training." in page.text
    assert "This part cannot be shown" not in page.text


def test_curves_have_axes_values_to_point_at_and_the_phases(folder: Path) -> None:
    (loss,) = (spec for spec in page_of(folder).specs if "loss" in json.dumps(spec) and "rect" in json.dumps(spec))
    shade, names, line, point = loss["layer"]
    assert [row["label"][:4] for row in names["data"]["values"]] == ["last", "<scr"]
    assert shade["data"]["values"][0]["from"] == 20 and shade["data"]["values"][0]["to"] == 40
    assert line["encoding"]["x"]["title"] == "step" and line["encoding"]["y"]["title"] == "loss"
    assert [row["y"] for row in line["data"]["values"]][:2] == [4.0, 2.0]
    assert {tip["field"] for tip in point["encoding"]["tooltip"]} == {"x", "y"}


def test_what_differs_from_the_defaults_comes_before_the_whole_recipe(folder: Path) -> None:
    text = page_of(folder).text
    part = text[text.index("options that differ") : text.index("The whole recipe")]
    assert "model.source" in part and "data.root" in part
    assert "phases.last.steps" in part and "eval.pairs" not in part


def test_a_row_that_was_asked_twice_is_shown_by_its_last_line(folder: Path, tmp_path: Path) -> None:
    run = copy_of(folder, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40, "phase": "class means", "split": "test", "top1": 0.123}) + "\n")
    text = page_of(run).text
    assert "12.3\u00a0%" in text and "70.0\u00a0%" not in text


DAMAGE: dict[str, Any] = {
    "recipe.json": [{}, {"phases": 3}, {"data": "x", "model": []}],
    "plan.json": [{"phases": [{}]}, {"phases": "no"}],
    "environment.json": [{"packages": [1], "command": 4}],
    EVALUATION: [
        {"photographs": 3},
        {"closed_set": {"pictures": "<b>"}},
        {"verification": [1]},
        {"photographs": {"parts": 1}},
    ],
    "checkpoints/best/model.json": [{"thresholds": 1}, {"provenance": 3, "image": "x"}, {"metrics": {"selected": {}}}],
    "status.json": [{}, {"best": 4, "state": ["<b>"]}, {"best": {"value": "high", "metric": 3}}],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_costs_the_part_that_is_made_of_it_and_no_more(folder: Path, tmp_path: Path, name: str) -> None:
    for number, document in enumerate(DAMAGE[name]):
        run = copy_of(folder, tmp_path / str(number))
        files.write_json(run / name, document)
        page = page_of(run)
        assert {"Training loss", "Results"} <= set(re.findall("Training loss|Results", page.text)), document
        assert "<b>1" not in page.text or page.tags.count("script") == 3
    (run / name).write_bytes(b"\xff{")
    assert "Results" in page_of(run).text


def test_a_run_that_was_never_examined_has_a_page_too(folder: Path, tmp_path: Path) -> None:
    run = copy_of(folder, tmp_path / "run")
    (run / EVALUATION).unlink()
    (run / "metrics.jsonl").unlink()
    files.write_json(run / "status.json", {"state": "failed", "exit_code": 70, "error": "not <i>finite</i>"})
    text = page_of(run).text
    assert "not <i>finite</i>" in text and "Nothing has been measured yet." in text
    assert "The test part has not been asked yet." in text
    assert "This run left no evaluation.json" in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.jsonl", b'{"step": 3, "sp', "1 of 51 lines of metrics.jsonl are torn"),
        ("metrics.jsonl", b'[1]\n\n{"step": "x"}\n' + b"[" * 50_000 + b"\n", "3 of 53 lines of metrics.jsonl"),
        (EVALUATION, b'{"closed_set": {', "evaluation.json is no JSON that can be read"),
        (EVALUATION, b"[]", "evaluation.json holds a JSON list"),
        (EVALUATION, b'{"closed_set": []}', "evaluation.json holds a JSON list as closed_set"),
        (EVALUATION, b"[" * 50_000, "evaluation.json is no JSON that can be read"),
        ("recipe.json", b"\xff", "recipe.json is no JSON that can be read"),
        ("status.json", b'{"best": [1]}', "status.json holds a JSON list as best"),
        ("checkpoints/best/model.json", b"3", "checkpoints/best/model.json holds a JSON int"),
    ],
)
def test_what_cannot_be_read_of_a_run_is_said_on_the_page(
    folder: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    run = copy_of(folder, tmp_path / "run")
    assert not RunFiles.read(run).faults
    lines = (run / "metrics.jsonl").read_bytes()
    whole = len(lines.splitlines())
    (run / name).write_bytes(lines + content if name == "metrics.jsonl" else content)
    text = page_of(run).text
    added = int(told.partition(" of ")[0]) if name == "metrics.jsonl" else 0
    assert told.replace(f"{50 + added} lines", f"{whole + added} lines") in text
    assert "left no evaluation.json" not in text


@pytest.mark.parametrize("best", [None, {"metric": "top1", "value": None, "validation": None}])
@pytest.mark.parametrize("key", ["top1", "known_verification_accuracy"])
def test_without_a_validation_part_the_headline_has_the_number_of_the_test_part_and_says_so(
    folder: Path, tmp_path: Path, best: dict[str, Any] | None, key: str
) -> None:
    run = copy_of(folder, tmp_path / "run")
    status, model = (files.read_json(run / name) for name in ("status.json", "checkpoints/best/model.json"))
    model["metrics"]["selected"] = None
    status["best"] = best if best is None else {"phase": status["best"]["phase"], **best}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if key != "top1":
        for line in lines:
            if line["split"] == "test":
                line.pop("top1")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.write_json(run / "status.json", status)
    files.write_json(run / "checkpoints/best/model.json", model)
    head = re.sub(r"\s+", " ", page_of(run).text).partition("Every number here")[0]
    number = next(line[key] for line in lines if line["split"] == "test" and line["phase"] == HOSTILE[0])
    what = "of 48 test pictures get their right name" if key == "top1" else "of the pairs of test pictures"
    assert f"{100 * number:.1f} % {what}" in head and "Nothing was validated" in head


def test_what_a_run_that_failed_early_had_not_settled_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "status.json", {"state": "failed", "error": "no room", "images_per_second": 3})
    files.write_json(tmp_path / "run" / "recipe.json", to_json(Recipe(phases=(Phase(start="scratch"),))))
    text = page_of(tmp_path / "run").text
    assert "A model, trained" in text and "no room" in text
    head = text.partition("options that differ")[0].partition("Recipe")[0]
    assert not re.search(r"\bauto\b|\b0 px|None", head)


def test_what_is_no_run_folder_is_said_to_be_none(tmp_path: Path) -> None:
    for path, what in ((tmp_path, "is no run folder"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=what):
            RunFiles.read(path)


def test_ten_thousand_people_make_a_page_of_less_than_three_megabytes(tmp_path: Path) -> None:
    names = [*HOSTILE, *(f"person {k} with a name of some length" for k in range(10_000 - len(HOSTILE)))]
    run = write_run(tmp_path / "run", names, steps=5000)
    page = report.write(run)
    assert page.stat().st_size < 3_000_000
    assert "10\u202f000 people" in Read(page.read_text(encoding="utf-8")).text
    assert (run / EVALUATION).stat().st_size < 300_000


def test_long_curves_are_thinned_to_means_and_short_ones_are_kept() -> None:
    points = [(float(k), float(k % 2)) for k in range(10_000)]
    kept = thinned(points, 100)
    assert len(kept) == 100 and kept[-1][0] == 9999
    assert all(y == 0.5 for _, y in kept)
    assert thinned(points[:100], 100) == points[:100]


def test_a_chart_without_points_is_none_and_a_section_without_content_is_left_out() -> None:
    assert curves("a", "b", {"c": []}) is None and forest("a", "b", []) is None
    page = Page("nothing")
    page.section("empty", "Empty", lambda page: [page.chart(None), page.charts([None])])
    assert not page.sections
    text = page.html(report_page.EMPTY, report_page.EMPTY)
    assert "<script" not in text  # nor the libraries that would draw


def test_without_the_library_of_the_charts_the_page_has_their_data_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise ImportError("No module named 'vl_convert'")

    monkeypatch.setattr(report_page, "bundle", missing)
    text = report.write(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Read(text)
    assert "The charts are not drawn (No module named 'vl_convert')" in page.text
    assert "script" not in page.tags and page.text.count("Data as a table") >= 14


def test_numbers_that_json_does_not_have_come_out_as_null() -> None:
    page = Page("numbers")
    page.section("one", "One", lambda page: [page.chart(bars("a", "b", [(0, 1, math.nan)], "x", "y"))])
    assert Read(page.html(report_page.EMPTY, report_page.EMPTY)).specs[0]["data"]["values"][0]["height"] is None
