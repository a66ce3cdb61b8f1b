"""`facefast bench` from its command line to its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from facefast import bench
from facefast.data.drawn import synthetic
from facefast.runtime.turns import ContenderError
from facefast.training import throughput
from facefast.training.throughput import COMPUTE, LOADER, WHOLE
from tests.support import small


def words(root: Path, folder: Path, *more: str) -> list[str]:
    """A command line for one short round."""
    return [
        f"--data.root={root}",
        f"--image.size={small.SIZE}",
        "--batch-size=4",
        "--updates-per-epoch=2",
        "--rounds=1",
        "--device=cpu",
        f"--rows={folder / 'rows.jsonl'}",
        *more,
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that were measured, in no time: 97, 100 and 2000 pictures a second, give or take one."""
    asked: list[Any] = []

    def measure(setting: Any, root: Any, folder: Path, device: str, rounds: int, **_: Any) -> dict[str, list[float]]:
        asked.append((setting, str(root), device, rounds))
        faster = 2 ** (len(asked) - 1)
        rates = {WHOLE: 97.0, COMPUTE: 100.0, LOADER: 2000.0}
        return {mode: [faster * rate - 1, faster * rate, faster * rate + 1] for mode, rate in rates.items()}

    monkeypatch.setattr(throughput, "measure", measure)
    return asked


def test_a_real_training_is_measured_in_three_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("facefast.runtime.turns.TURN", 0.0)
    root = small.draw(tmp_path / "drawn")
    assert bench.main(words(root, tmp_path, "--", "--precision=fp32")) == 0
    rows = throughput.read_rows(tmp_path / "rows.jsonl")
    assert [row["mode"] for row in rows] == [WHOLE, COMPUTE, LOADER]
    assert all(row["images_per_second"] > 0 and row["options"] == "--precision=fp32" for row in rows)
    assert rows[0]["machine"]["cores"] and rows[0]["versions"]["torch"] and rows[0]["ratio_to_compute"] > 0
    said = capsys.readouterr().out
    assert "starting whole job" in said and "images/s" in said and said.count("  first") == 3


def test_the_second_time_is_compared_with_the_first(
    tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = small.draw(tmp_path / "drawn")
    assert bench.main(words(root, tmp_path)) == 0
    capsys.readouterr()
    assert bench.main(words(root, tmp_path)) == 0
    assert capsys.readouterr().out.count("faster +100.0%") == 3
    assert bench.main(words(root, tmp_path, "--", "--compile")) == 0  # another training
    assert capsys.readouterr().out.count("  first") == 3
    assert len(throughput.read_rows(tmp_path / "rows.jsonl")) == 9
    assert measured[2][0].options == ("--compile",) and measured[0][1:] == (str(root), "cpu", 1)


def test_json_is_the_rows_and_nothing_else(
    tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(words(small.draw(tmp_path / "drawn"), tmp_path, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == throughput.read_rows(tmp_path / "rows.jsonl") and len(rows) == 3


def test_without_photographs_faces_are_drawn(tmp_path: Path, measured: list[Any], monkeypatch: Any) -> None:
    drawn: list[Path] = []

    def write(folder: Path, spec: synthetic.DrawnSpec) -> Path:
        drawn.append(folder)
        return folder

    monkeypatch.setattr(synthetic, "write", write)
    assert bench.main(words(tmp_path, tmp_path)[1:]) == 0
    assert [str(folder) for folder in drawn] == [measured[0][1]]


def test_a_drawing_is_written_or_said_not_to_be(
    tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, plot = small.draw(tmp_path / "drawn"), tmp_path / "plots" / "bench.svg"
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert bench.main(words(root, tmp_path, f"--plot={plot}")) == 0
    assert "is not drawn: vl-convert-python is not installed" in capsys.readouterr().out and not plot.exists()

    class Converter:
        @staticmethod
        def vegalite_to_svg(chart: dict[str, Any]) -> str:
            return f"<svg>{len(chart['data']['values'])}</svg>"

    monkeypatch.setitem(sys.modules, "vl_convert", Converter)
    assert bench.main(words(root, tmp_path, f"--plot={plot}")) == 0
    assert plot.read_text() == "<svg>3</svg>"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds=0"], "rounds is 0"),
        (["--batch-size=1"], "batch is 1"),
        (["--plot=bench.png"], "give a name that ends in .svg"),
        (["--rows=."], "choose another --rows"),
        (["--model.backbone=resnet5"], "resnet5"),
        (["--bakcbone=x"], "there is no option --bakcbone"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn_or_started(
    tmp_path: Path, more: list[str], said: str, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*words(tmp_path, tmp_path), *more]) in (64, 74)
    assert said in capsys.readouterr().err and not measured


def test_a_training_that_cannot_begin_ends_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise ContenderError("whole job ended with exit code 64; its last words:\nerror: there is no option --lrr")

    monkeypatch.setattr(throughput, "measure", measure)
    assert bench.main(words(small.draw(tmp_path / "drawn"), tmp_path)) == 64
    assert "there is no option --lrr" in capsys.readouterr().err
