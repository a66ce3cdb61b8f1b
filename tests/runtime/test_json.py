"""JSON that every reader takes: numbers that it does not have are null, in files and on the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from facefast import evaluate
from facefast.runtime import files
from tests.support import small


def loads(text: str) -> Any:
    """Refuses what is not JSON, as other languages' readers do."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_have_are_null_at_any_depth(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, "x", None, True, 3)}]}
    files.write_json(tmp_path / "value.json", value)
    expected = {"a": None, "b": [1.5, None, {"c": [None, "x", None, True, 3]}]}
    assert loads((tmp_path / "value.json").read_text()) == expected == files.strict(value)


def test_what_too_few_pairs_cannot_show_is_null_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = small.draw(tmp_path / "drawn")
    run = small.save_run(tmp_path / "run", small.make_model(), drawn)
    assert evaluate.main([str(run), f"--data.root={drawn}", "--data.format=celeba", "--json"]) == 0
    found = loads(capsys.readouterr().out)
    assert found["known_tar@1e-3"] is None and found["top1"] is not None
