"""The evaluate command: which questions a command line asks, and how the answers are printed."""

from __future__ import annotations

import json
from pathlib import Path

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
