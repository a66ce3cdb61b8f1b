"""README: the tree is the real one, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from facefast import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PLACES = (ROOT, ROOT / "facefast", ROOT / "facefast" / "data", ROOT / "facefast" / "models")
TREE = next(block for block in re.findall(r"```\n(.*?)```", README, re.S) if block.startswith("csrc/scan/"))


def test_every_file_and_folder_in_the_tree_exists() -> None:
    named = re.findall(r"(?<![\w/.])([\w/]+(?:\.py|/))(?=[\s;:]|$)", TREE, re.M)
    assert len(named) > 20
    for name in named:
        assert any((place / name).exists() for place in PLACES), name


def test_every_street_and_command_of_the_package_is_in_the_tree() -> None:
    for path in (ROOT / "facefast").glob("*.py"):
        assert path.name.startswith("__") or path.name in TREE, path.name
    for path in (ROOT / "facefast").rglob("__init__.py"):
        assert path.parent == ROOT / "facefast" or f"  {path.parent.name}/" in TREE, path.parent


def test_make_targets_and_subcommands_that_readme_shows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    shown = set(re.findall(r"`?facefast (\w+) (?=DIR|MODEL|--)", README))
    assert shown == set(cli.COMMANDS)
