"""README: the tree is the real one, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from facefast import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TREE = next(block for block in re.findall(r"```\n(.*?)```", README, re.S) if block.startswith("csrc/scan/"))


def test_every_file_and_folder_in_the_tree_exists() -> None:
    named = re.findall(r"(?<![\w/.])([\w/]+(?:\.py|/))(?=[\s;:]|$)", TREE, re.M)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "facefast" / name).exists(), name


def test_every_module_of_the_package_is_in_the_tree() -> None:
    for path in (ROOT / "facefast").glob("*.py"):
        assert path.name.startswith("__") or path.name in TREE, path.name
    for folder in ("data", "models", "ops"):
        assert f"{folder}/" in TREE


def test_make_targets_and_subcommands_that_readme_shows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    shown = set(re.findall(r"`?facefast (\w+) (?=DIR|MODEL|--)", README))
    assert shown == set(cli.COMMANDS)
