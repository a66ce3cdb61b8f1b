"""README: its first screen works when pasted, its commands and links exist, and the tree is the real one."""

from __future__ import annotations

import code
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from facefast import cli
from facefast.recipe import flags

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIRST_SCREEN = README.partition("\n## ")[0]
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.S | re.M)
COMMANDS = next(block for block in BLOCKS if block.startswith("# train"))
TREE = next(block for block in BLOCKS if block.startswith("csrc/scan/"))
PLACES = tuple(
    ROOT / place
    for place in (".", "facefast", "facefast/data", "facefast/models", "facefast/labels", "examples", "docs")
)


class Prompt(code.InteractiveConsole):
    """Python's prompt, line by line, which stops at the first error."""

    def showtraceback(self) -> None:
        raise

    def showsyntaxerror(self, filename: str | None = None, **more: Any) -> None:
        raise

    def paste(self, text: str) -> dict[str, Any]:
        """The names that the lines leave behind."""
        for line in text.splitlines():
            self.push(line)
        assert not self.buffer, "the prompt waits for more"
        return dict(self.locals)


def block(first: str) -> str:
    """The text of a block on the first screen, found by its first words."""
    found = [text for text in BLOCKS if text.startswith(first) and text in FIRST_SCREEN]
    assert len(found) == 1
    return str(found[0])


def test_two_photographs_are_embedded_and_compared_by_what_readme_pastes(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = Prompt().paste(block("import facefast"))
    for vector in (names["a"], names["b"], names["other"]):
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    pictures = names["strangers"].select([0, 1, 20])
    assert pictures.labels[0] == pictures.labels[1] != pictures.labels[2]
    same, other = (float(names["a"] @ names[name]) for name in ("b", "other"))
    assert capsys.readouterr().out == f"the same person {same:.2f}, somebody else {other:.2f}\n"


def test_a_loop_of_ones_own_learns_by_what_readme_pastes(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = Prompt().paste(block("import torch"))
    shown = re.search(r"normalised: (\[.*\])", FIRST_SCREEN)
    assert shown and list(names["images"].shape) == eval(shown[1])
    steps = {int(state["step"]) for state in names["optimizer"].state.values()}
    assert steps == {names["loader"].sampler.steps_per_epoch}
    assert torch.isfinite(names["loss"])
    assert capsys.readouterr().out == f"loss {names['loss'].item():.2f}\n"


def test_commands_of_the_first_screen_work_on_what_make_train_leaves(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [shlex.split(line, comments=True) for line in block("make train").splitlines()]
    called = [words for words in lines if words[0] == "facefast"]
    assert called
    for _, command, *rest in called:
        assert importlib.import_module(f"facefast.{command}").main(rest) == 0
    assert "verification_accuracy" in capsys.readouterr().out


def test_the_first_screen_is_one_screen() -> None:
    assert len(FIRST_SCREEN.splitlines()) <= 55


@pytest.mark.parametrize("line", [line for line in COMMANDS.splitlines() if line.startswith("facefast ")])
def test_every_command_that_readme_shows_takes_its_flags(line: str) -> None:
    _, command, *rest = shlex.split(line, comments=True)
    if command == "train":
        recipe, _, _ = flags.train_arguments(rest)
        assert recipe.data.root == "DIR"
    else:
        kind = getattr(importlib.import_module(f"facefast.{command}"), f"{command.capitalize()}Arguments")
        assert tyro.cli(kind, args=rest) != tyro.MISSING


def test_readme_shows_every_command_in_three_groups() -> None:
    assert re.findall(r"^# (.*)", COMMANDS, re.M) == ["train", "use", "look after data"]
    assert set(re.findall(r"^facefast (\w+)", COMMANDS, re.M)) == set(cli.COMMANDS)


def test_make_targets_that_readme_shows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = set(re.findall(r"(?:`|^)make (\w+)", README, re.M))
    assert shown >= {"train", "test"}
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_that_readme_links_to_exist() -> None:
    targets = re.findall(r"\]\(([^)]*)\)|src=\"([^\"]*)\"", README)
    assert len(targets) > 5
    for target in map("".join, targets):
        assert (ROOT / target).exists(), target


def test_every_file_and_folder_in_the_tree_exists() -> None:
    named = re.findall(r"(?<![\w/.])([\w/]+(?:\.py|/))(?=[\s;:]|$)", TREE, re.M)
    assert len(named) > 20
    for name in named:
        assert any((place / name).exists() for place in PLACES), name


def test_every_street_command_and_example_is_in_the_tree() -> None:
    for folder in (ROOT / "facefast", ROOT / "examples"):
        for path in folder.glob("*.py"):
            assert path.name.startswith("__") or path.name in TREE, path.name
    for path in (ROOT / "facefast").rglob("__init__.py"):
        assert path.parent == ROOT / "facefast" or f"  {path.parent.name}/" in TREE, path.parent


def test_the_picture_of_a_batch_is_what_the_loader_gives() -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "pictures" / "make.py")
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    with Image.open(ROOT / "docs" / "pictures" / "batch.png") as file:
        stored = np.asarray(file.convert("RGB"), np.int16)
    made = np.asarray(make.batch_picture(), np.int16)
    difference = np.abs(made - stored)  # up to 2 by 6 bits a channel; a little more by another machine's JPEG library
    assert difference.mean() < 2 and difference.max() <= 16


def test_pictures_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "pictures").glob("*.png")]
    assert len(sizes) == 2 and max(sizes) < 200_000
