"""Examples: each runs as its first lines say, on drawn faces and on photographs of one's own."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from facefast.data.loader import BadDataError
from tests.house.conftest import TINY

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = Path("data/drawn-faces/img_align_celeba")


def run(name: str, *arguments: str) -> None:
    """`python examples/NAME ARGUMENTS` in this process, which has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What an example starts by subprocess.run, called in this process; training is made tiny."""
    called: list[list[str]] = []

    def call(line: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        python, option, module, *words = line
        assert (python, option, check) == (sys.executable, "-m", True)
        if module == "facefast":
            module, *words = f"facefast.{words[0]}", *words[1:]
        called.append([module, *words])
        if module == "facefast.train":
            words += TINY[1:] if "--image.size=64" in words else TINY
            if "--data.root" not in words:  # the default recipe, but on the few faces that are there
                words = ["drawn", *words, "--data.root=data/drawn-faces", "--phases.1.batch-size=8"]
        assert importlib.import_module(module).main(words) == 0
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", call)
    return called


def similarities(text: str) -> list[list[float]]:
    """The matrix that embed_and_compare.py prints."""
    lines = [line.split() for line in text.splitlines() if re.search(r"\.jpg( +-?\d\.\d\d)+$", line)]
    assert all(Path(line[0]).exists() for line in lines)
    return [[float(value) for value in line[1:]] for line in lines]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: str(path.name))
def test_an_example_is_short_and_begins_with_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 40
    assert f"\npython examples/{path.name}  " in text.partition('"""\n')[0]
    assert f"def test_{path.stem}" in Path(__file__).read_text()


def test_embed_and_compare_takes_the_run_of_make_train_and_drawn_faces(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("embed_and_compare.py")
    found = similarities(capsys.readouterr().out)
    assert [row[place] for place, row in enumerate(found)] == [1, 1, 1]
    assert found[0][1] == found[1][0] and found[0][2] == found[2][0]


def test_embed_and_compare_trains_a_model_where_there_is_none(
    clone: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (clone / "runs" / "default").unlink()
    run("embed_and_compare.py")
    assert len(similarities(capsys.readouterr().out)) == 3
    assert [words[0] for words in commands] == ["facefast.train"]
    assert json.loads((clone / "runs" / "quick" / "status.json").read_text())["state"] == "done"


def test_embed_and_compare_refuses_a_file_that_is_no_photograph(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, broken = str(PICTURES / "000001.jpg"), clone / "broken.jpg"
    run("embed_and_compare.py", "runs/default", picture, picture)
    assert similarities(capsys.readouterr().out) == [[1, 1], [1, 1]]
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(BadDataError, match="1 not a picture"):
        run("embed_and_compare.py", "runs/default", picture, str(broken))


def test_embed_and_compare_finds_the_faces_in_whole_photographs(
    celeba: Path, shared_weights: Path, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, detector = shared_weights / "mobilefacenet_casia_112x96.ckpt", shared_weights / "face_detection_yunet.onnx"
    photographs = [str(celeba / "img_celeba" / f"{name}.jpg") for name in ("066763", "074615", "194488")]
    run("embed_and_compare.py", str(model), *photographs, "--detect", str(detector))
    (_, same, other), _, _ = similarities(capsys.readouterr().out)
    assert same > 0.4 > 0.2 > other
    drawn = clone / "blank.png"
    drawn.write_bytes((EXAMPLES.parent / "docs" / "pictures" / "report.png").read_bytes())
    with pytest.raises(SystemExit, match="no face was found"):
        run("embed_and_compare.py", str(model), photographs[0], str(drawn), "--detect", str(detector))


def test_own_training_loop_draws_its_faces_and_learns_them(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_training_loop.py", "--epochs=2")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert re.fullmatch(r"top-1 \d+\.\d% on 48 pictures kept from training", lines[-1])


def test_own_training_loop_takes_photographs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_training_loop.py", "data/drawn-faces", "--epochs=1")
    assert "on 32 pictures kept from training" in capsys.readouterr().out
    assert not (clone / "data" / "few-faces").exists()


def test_own_photographs_draws_a_folder_per_person_and_names_them(
    clone: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("own_photographs.py", "--phases.0.steps=2", "--phases.0.batch-size=8")
    assert [words[0].partition(".")[2] for words in commands] == ["index", "train", "evaluate", "predict"]
    out = capsys.readouterr().out
    assert re.search(r"^ +10  identities$", out, re.M)
    assert re.search(r"person-0/00\.jpg  person-\d \d+\.\d%\n", out)


def test_own_photographs_start_from_source_weights(
    clone: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    short = [f"--phases.{number}.{field}" for number in range(2) for field in ("steps=1", "batch-size=8")]
    run("own_photographs.py", "data/drawn-faces", "runs/default", *short)
    recipe = json.loads((clone / "runs" / "own" / "recipe.json").read_text())
    assert recipe["model"]["source"] == "runs/default"
    assert [phase["start"] for phase in recipe["phases"]] == ["source", "previous"]
    answers = r"00000[123]\.jpg  (?:\d+ \d+\.\d%|unknown \(score -?\d\.\d+, nearest \d+\))"
    assert len(re.findall(answers, capsys.readouterr().out)) == 3


def test_resume_stops_a_run_and_goes_on_with_the_same_command(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lengths = ["--phases.0.steps=60", "--phases.1.steps=1", "--phases.2.steps=1"]
    batches = [f"--phases.{number}.batch-size=4" for number in range(3)]
    run("resume.py", "drawn", "--data.root=data/drawn-faces", *TINY[:3], "--pictures=0", *lengths, *batches)
    out = capfd.readouterr().out
    stopped = re.search(r"exit code 75 after (\d+) updates", out)
    assert stopped and 5 <= int(stopped[1]) < 62
    assert "exit code 0 after 62 updates\neach update once, in order: True\n" in out
