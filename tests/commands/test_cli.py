"""The command line: recipes from flags, subcommands, and how every kind of error leaves the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from facefast import cli, index
from facefast.recipe import flags
from facefast.recipe.named import RECIPES, Given
from facefast.runtime import exits
from facefast.runtime.exits import DataError, NumericsError, StorageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such flag"), 64),
        (DataError("too many broken files"), 65),
        (NumericsError("not finite"), 70),
        (StorageError("disk full"), 74),
    ],
)
def test_an_error_of_the_users_ends_with_its_code_and_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = []
    with exits.exit_codes(lambda *failure: noted.append(failure)) as outcome:
        raise error
    assert outcome.code == code
    assert noted == [(code, str(error))]
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_of_ours_ends_with_1_and_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    noted = []
    with exits.exit_codes(lambda *failure: noted.append(failure)) as outcome:
        raise KeyError("weights")
    assert outcome.code == 1
    assert noted == [(1, "'weights'")]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("left_with", "code"), [(2, 64), (0, 0), (None, 0), (3, 3)])
def test_the_parsers_own_exits_become_ours(left_with: int | None, code: int) -> None:
    with exits.exit_codes() as outcome:
        raise SystemExit(left_with)
    assert outcome.code == code


def test_a_command_that_says_nothing_is_done_and_an_interruption_is_not_swallowed() -> None:
    with exits.exit_codes() as outcome:
        pass
    assert outcome.code == 0
    with pytest.raises(KeyboardInterrupt), exits.exit_codes():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "code"), [([], 64), (["dance"], 64), (["--help"], 0), (["index", "/nowhere/at/all"], 64)]
)
def test_the_console_script_knows_its_commands(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["facefast", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    assert ("usage: facefast {train,index" in capsys.readouterr().out) == (words != ["index", "/nowhere/at/all"])


def test_the_console_script_hands_its_flags_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def main(words: list[str]) -> int:
        given.append(words)
        return 65

    monkeypatch.setattr(index, "main", main)
    monkeypatch.setattr(sys, "argv", ["facefast", "index", "ROOT", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 65
    assert given == [["ROOT", "--json"]]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["facefast", command, "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert f"facefast.{command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "drawn"),
        (["--data.format", "synthetic"], "drawn"),
        (["--data.root=people"], "scratch"),
        (["--data.root=people", "--model.source", "weights.pt"], "finetune"),
        (["scratch", "--data.root=people", "--seed", "3"], "scratch"),
    ],
)
def test_data_and_source_choose_the_recipe_where_none_is_named(words: list[str], name: str) -> None:
    recipe, out, resume = flags.train_arguments(words)
    assert [phase.name for phase in recipe.phases] == [phase.name for phase in RECIPES[name](Given(source="x")).phases]
    assert (out, resume) == (Path("runs") / name, "auto")


def test_flags_reach_phases_by_name_or_number_and_nothing_else_changes() -> None:
    plain, _, _ = flags.train_arguments(["drawn"])
    by_name, out, resume = flags.train_arguments(
        ["drawn", "--phases.finetune.lr=0.5", "--phases.1.loss.gamma", "2", "--out=here", "--resume", "never"]
    )
    assert (by_name.phases[2].lr, by_name.phases[1].loss.gamma) == (0.5, 2.0)
    assert by_name.phases[0] == plain.phases[0]
    assert (out, resume) == (Path("here"), "never")


def test_compare_scratch_puts_the_baseline_first() -> None:
    recipe, _, _ = flags.train_arguments(
        ["--data.root=people", "--model.source=weights.pt", "--compare-scratch", "--phases.last.lr=0.25"]
    )
    starts = [(phase.name, phase.start) for phase in recipe.phases]
    assert starts == [("scratch", "scratch"), ("last", "source"), ("all", "previous")]
    assert recipe.phases[1].lr == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "there is no recipe 'nonsense'; the recipes are drawn, finetune, scratch"),
        (["scratch", "--data.format=celeba"], "data.format celeba needs --data.root"),
        (["finetune", "--data.root=people"], "model.source, which is none"),
        (["scratch", "--data.root=people", "--model.source=weights.pt"], "model.source weights.pt has no effect"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flags.train_arguments(words)
