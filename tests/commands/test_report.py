"""facefast report: a run's page anew, several runs side by side, and both in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facefast import report, train
from facefast.data import FaceIndex
from facefast.evaluation.report_files import EVALUATION
from facefast.runtime import files
from tests.support import small
from tests.support.browser import Watched
from tests.support.reported import HOSTILE, write_run

PLAIN = ("ann", "bo", "cy", "dee")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first", HOSTILE)


def test_a_report_is_written_into_the_run_folder_or_where_one_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_several_runs_are_compared_by_their_options_numbers_and_curves(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second", HOSTILE, seed=1, lr=0.002)
    assert report.main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "2 runs compared" in page and ">first</bdi>" in page and ">second</bdi>" in page
    part = page.partition("Options that differ</h2>")[2].partition("</section>")[0]
    assert "phases.last.lr" in part and "0.002" in part and "phases.last.steps" not in part and "eval.pairs" not in part
    for title in ("Training loss", "On validation: top-1", "Learning rate", "ROC", "DET"):
        assert title in page
    assert "measured on different test pictures" not in page  # paths and names are the same
    assert page.count("data-chart=") == page.count("Data as a table")


def test_runs_that_were_measured_on_other_pictures_are_said_to_be(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "first", PLAIN)  # of the same name, in another folder
    assert report.main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "measured on different test pictures" in page
    labels = set(re.findall(r'<h3><bdi dir="auto">(.*?)</bdi></h3>', page))
    assert labels == {str(Path(*run.parts[-2:])), str(Path(*other.parts[-2:]))}
    assert "options of phases that not every run has" in page


def test_a_run_without_results_is_compared_all_the_same(run: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    files.write_json(tmp_path / "begun" / "status.json", {"state": "running"})
    assert report.main([str(run), str(tmp_path / "begun"), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "This part cannot be shown" not in page and ">begun</bdi>" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no run is named"),
        (["{run}", "{run}"], "is named twice"),
        (["{run}", "{nowhere}"], "does not exist"),
        (["{here}"], "is no run folder"),
        (["{run}", "{nowhere}", "--pictures"], "--pictures has no effect on a comparison"),
    ],
)
def test_what_cannot_be_reported_ends_with_64_and_a_sentence(
    run: Path, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"run": run, "nowhere": tmp_path / "nowhere", "here": tmp_path}
    assert report.main([word.format(**places) for word in words]) == 64
    assert told in capsys.readouterr().err


def test_a_place_that_cannot_be_written_ends_with_74(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    assert report.main([str(run), "--out", str(tmp_path / "taken")]) == 74


def test_photographs_are_shown_to_whoever_asks_for_them_and_lie_in_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = small.draw(tmp_path / "people"), tmp_path / "run"
    words = ["scratch", "--data.format=celeba", "--data.test-fraction=0.5", "--image.size=32", "--precision=fp32"]
    words += [
        "--model.embedding=16",
        "--phases.0.steps=2",
        "--phases.0.batch-size=4",
        "--eval.pairs=12",
        "--eval.folds=2",
    ]
    assert train.main([*words, f"--data.root={root}", f"--out={out}"]) == 0
    assert files.read_json(out / EVALUATION)["photographs"]["batch"]
    assert "data:image" not in (out / "report.html").read_text().partition("<script")[0]
    page = tmp_path / "page.html"
    assert report.main([str(out), "--pictures", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') >= 3 and "As training sees them" in text
    assert "hand it on to nobody" in text
    root.rename(tmp_path / "moved")
    capsys.readouterr()
    assert report.main([str(out), "--pictures", "--out", str(page)]) == 0
    text, told = page.read_text(), capsys.readouterr().err
    assert "data:image/jpeg" not in text.partition("<script")[0] and "hand it on to nobody" not in text
    for said in (text, told):
        assert "photographs could not be read and are not shown" in said and str(root) in said
    (tmp_path / "moved").rename(root)
    (out / "index.npz").unlink()
    assert report.main([str(out), "--pictures", "--out", str(page)]) == 0
    assert "index.npz does not exist" in page.read_text() and "index.npz does not exist" in capsys.readouterr().err


def test_one_photograph_that_is_gone_is_named_and_the_others_are_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(run, copy)
    gone = files.read_json(copy / EVALUATION)["closed_set"]["wrong"][0]["picture"]
    root = tmp_path / "faces"
    pictures = [f"{label}/{k}.jpg" for label in range(len(HOSTILE)) for k in range(8)]
    for picture in pictures:
        (root / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(root / picture)
    (root / gone).unlink()
    paths = [picture.encode() for picture in pictures]
    FaceIndex.build(str(root), paths, np.zeros(len(paths), np.int32), ("ann",)).save(copy / "index.npz")
    assert report.main([str(copy), "--pictures", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') > 24 and "hand it on to nobody" in text
    for words in (text, capsys.readouterr().err):
        assert f"1 photograph could not be read and is not shown: {gone} (cannot read {root / gone}" in words


@pytest.mark.parametrize("several", [False, True])
def test_what_could_not_be_read_is_said_on_the_page_and_on_the_terminal(
    run: Path, tmp_path: Path, several: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(run, copy)
    (copy / "plan.json").write_text('{"phases": [')
    assert report.main([str(copy), *([str(run)] if several else []), "--out", str(page)]) == 0
    assert "plan.json is no JSON that can be read" in page.read_text()
    assert "plan.json is no JSON that can be read" in capsys.readouterr().err


@pytest.mark.browser
def test_a_report_is_drawn_read_and_printed_without_a_complaint(
    run: Path, tmp_path: Path, look: Callable[..., Watched]
) -> None:
    assert report.main([str(run)]) == 0
    page = look(run / "report.html")
    page.page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg'))")
    assert page.page.title() == "first - facefast report"  # no name has changed it
    assert page.page.locator(".plot svg").count() >= 14
    page.require_accessible()
    page.photograph(tmp_path, "report")
    point = page.page.locator("#training .plot svg").first
    point.hover()
    page.page.wait_for_selector("#vg-tooltip-element.visible")
    assert "loss" in page.page.locator("#vg-tooltip-element").inner_text()
    page.page.locator("figure summary").first.click()
    assert page.page.locator("figure table").first.is_visible()
    page.require_fits()


@pytest.mark.browser
def test_a_report_at_night_is_as_readable(run: Path, look: Callable[..., Watched]) -> None:
    assert report.main([str(run)]) == 0
    page = look(run / "report.html", scheme="dark")
    page.page.wait_for_selector(".plot svg")
    page.require_accessible()
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"


@pytest.mark.browser
def test_a_comparison_is_drawn_without_a_complaint(run: Path, tmp_path: Path, look: Callable[..., Watched]) -> None:
    other = write_run(tmp_path / HOSTILE[0].replace("/", "|"), PLAIN, seed=1)
    assert report.main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = look(tmp_path / "both.html")
    page.page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg'))")
    page.require_accessible()
    page.photograph(tmp_path, "comparison")
