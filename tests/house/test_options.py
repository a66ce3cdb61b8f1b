"""Every option and its default is on a list, so that a new or a changed one is a visible difference."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

import pytest

from facefast import cli
from facefast.recipe.options import options
from tests.support.options import OPTION, arguments_of, lines

LIST = Path(__file__).with_name("options.txt")


def test_the_list_of_options_is_the_one_that_was_agreed_on() -> None:
    frozen, present = LIST.read_text().splitlines(), list(lines())
    gone, new = sorted(set(frozen) - set(present)), sorted(set(present) - set(frozen))
    assert frozen == present, (
        f"gone: {gone}; new: {new}; if that is meant, run python -m tests.support.options > tests/house/options.txt"
    )


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_the_list_has_what_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"facefast.{command}").main(["--help"])
    shown = set(re.findall(OPTION, capsys.readouterr().out, re.M))
    listed = {option.flag for option in options(arguments_of(command)) if not option.positional}
    assert shown == listed


def test_every_option_says_what_it_does() -> None:
    silent = {
        f"{command} {option.flag}"
        for command in cli.COMMANDS
        for option in options(arguments_of(command))
        if not option.text
    }
    assert not silent
