"""The evaluate command: which questions a command line asks, and how the answers are printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from facefast import evaluate
from tests.support import small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.photographs(tmp_path_factory.mktemp("data") / "people")


def test_a_list_of_pairs_is_asked_as_it_is(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small.save_run(tmp_path / "run", small.make_model(), root)  # of other people
    pairs = tmp_path / "pairs.txt"
    rows = ["2\t2", "ann\t1\t2", "ann\t1\t3", "ann\t1\tcy\t1", "ann\t2\tcy\t2"]
    rows += ["cy\t1\t2", "cy\t1\t3", "ann\t1\tcy\t3", "ann\t3\tcy\t1"]
    pairs.write_text("\n".join(rows) + "\n")
    flags = [f"--data.root={root}", f"--pairs={pairs}", "--data.max-bad-fraction=1", "--eval.batch-size=4"]
    assert evaluate.main([str(run), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["pairs"] == 8
    assert "top1" not in found
    assert evaluate.main([str(run), *flags]) == 0
    assert "verification_accuracy  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "evaluate needs photographs: --data.root DIR, or --bin SET"),
        (("--pairs=pairs.txt", "--bin=set.bin"), "give --pairs or --bin, not both"),
        (("--data.root=/nowhere/at/all",), "/nowhere/at/all"),
    ],
)
def test_a_question_without_an_answer_ends_with_64(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small.save_run(tmp_path / "run", small.make_model(), tmp_path)
    assert evaluate.main([str(run), *flags]) == 64
    assert message in capsys.readouterr().err


def asked(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert evaluate.main([*map(str, words), "--data.max-bad-fraction=1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # strict: no NaN
    return found


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), root)


def test_a_list_of_paths_needs_and_reads_no_other_picture(
    root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b,label\nann/ann_0001.png,ann/ann_0002.png,1\nann/ann_0001.png,cy/cy_0001.png,0\n")
    found = asked(capsys, run, "--data.root", root, "--pairs", pairs, "--hardest=1")
    assert found["pairs"] == 2 and found["overlap"]["measured"] == 3
    assert found["hardest"]["two_people"][0]["b"] == "cy/cy_0001.png"
    assert found["verification_accuracy"] is None  # one fold: there is none, and JSON has no NaN
    assert found["pair_thresholds"][0]["threshold"] is None
    pairs.write_text("ann/ann_0001.png ann/gone.png 1\n")
    assert evaluate.main([str(run), f"--data.root={root}", f"--pairs={pairs}"]) == 65
    assert "names 1 of 2 pictures that are not in" in capsys.readouterr().err


def test_templates_and_their_pairs_are_read(
    root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = tmp_path / "media.txt"
    media.write_text(
        "ann/ann_0001.png 1 7 1\nann/ann_0002.png 1 7 2\nann/ann_0003.png 2 7 3\n"
        "cy/cy_0001.png 3 8 4\nbo/bo_0002.png 4 9 5\n"  # the last one is damaged
    )
    found = asked(capsys, run, "--data.root", root, "--templates", media, "--weights=length")
    assert (found["templates"], found["unreadable_templates"], found["pairs"]) == (4, 1, 3)
    (tmp_path / "pairs.txt").write_text("1 3\n1 2\n")
    found = asked(capsys, run, "--data.root", root, "--templates", media, "--pairs", tmp_path / "pairs.txt")
    assert found["pairs"] == 2


def test_people_are_looked_for_in_a_gallery(
    root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = tmp_path / "gallery"
    for name in ("ann", "cy"):
        (gallery / name).mkdir(parents=True)
        shutil.copy(root / name / f"{name}_0001.png", gallery / name / "enrolled.png")
    found = asked(capsys, run, "--data.root", root, "--identify", gallery, "--join=max", "--data.detect=none")
    assert (found["gallery_people"], found["known_probes"], found["strangers_probes"]) == (2, 4, 2)
    assert found["left_out_copies"] == 2
    assert found["naming_thresholds"][0]["why"].startswith("2 pictures of strangers cannot show a rate of 0.1")
    flags = (f"--identify={gallery}", "--data.max-bad-fraction=1", "--data.detect=none")
    assert evaluate.main([str(run), f"--data.root={root}", *flags]) == 0
    assert "FPIR 0.01: 2 pictures of strangers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--identify=G", "--pairs=P"), "give --identify or --pairs, not both"),
        (("--identify=G", "--templates=P"), "give --identify or --templates, not both"),
        (("--join=max",), "--join has no effect here"),
        (("--weights=length", "--identify=G"), "--weights has no effect with --identify"),
        (("--groups=Male", "--identify=G"), "--groups has no effect with --identify"),
        (("--hardest=2", "--identify=G"), "--hardest has no effect with --identify"),
        (("--draws=2", "--bin=B"), "--draws has no effect with --bin"),
        (("--draws=0",), "draws is 0; it must lie in"),
        (("--identify=G",), "identify needs photographs to look for: --data.root DIR"),
        (("--templates=P",), "'' is no folder; give --data.root"),
    ],
)
def test_options_without_effect_end_with_64(
    flags: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), *flags]) == 64
    assert message in capsys.readouterr().err


def test_random_pairs_are_drawn_several_times_and_their_groups_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = small.draw(tmp_path / "drawn")
    run = small.save_run(tmp_path / "run", small.make_model(classes=("x", "y")), drawn)
    found = asked(capsys, run, "--data.root", drawn, "--draws=2")
    assert found["draws"]["seeds"] == [0, 1]
    assert found["overlap"]["trained"] == 0 and found["overlap"]["names"] == 0
    assert evaluate.main([str(run), f"--data.root={drawn}", "--groups=Male"]) == 64
    assert "groups need one threshold for all of them" in capsys.readouterr().err
