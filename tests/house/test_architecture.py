"""The shape of the code: streets and who may import whom, no circles, files of a readable length, a main loop of one
page, defaults typed once, one list of sources."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import pytest

from facefast import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "facefast"
LAW = (
    {"recipe", "runtime", "ops"},
    {"data", "faces", "models"},
    {"evaluation"},
    {"labels", "deploy", "training", "cluster"},
    {"commands"},
    {"cli"},
)
"""Streets from the bottom up: each imports from those below, and from its own row where that makes no circle."""
LEVEL = {street: level for level, streets in enumerate(LAW) for street in streets}
STRANGERS = ({"data", "models"}, {"recipe", "runtime"}, {"labels", "evaluation"})
"""Streets that know nothing of each other, in either direction."""
NATIVE = ("facefast._C", "facefast._scan", "facefast.__version__")
"""They know nothing of Python's modules."""
LONGEST_CHAIN = 6
LONGEST_FILE = 500
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(("facefast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


def street_of(module: str) -> str:
    """The street of a module's dotted name."""
    parts = module.split(".")
    if len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "cli" if parts[1:] in (["cli"], ["__main__"], []) else "commands"


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that one imports, also where a function does it when it runs; types alone count too."""
    found = set()
    for node in ast.walk(ast.parse(NAMES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports by a relative name"
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [whole if whole in NAMES else node.module for whole in wholes if not whole.startswith(NATIVE)]
        found |= {name for name in names if name in NAMES and name != module}
    return frozenset(found)


def streets() -> dict[str, set[str]]:
    """The streets that each street imports from; the package's front door stands apart."""
    found: dict[str, set[str]] = {street: set() for street in LEVEL}
    for module in NAMES:
        if module != "facefast":
            found[street_of(module)] |= {street_of(other) for other in imports(module)} - {street_of(module)}
    found["cli"] |= {street_of(f"facefast.{command}") for command in cli.COMMANDS}
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along imports; fails on a circle."""
    best: dict[str, list[str]] = {}

    def walk(node: str, trail: tuple[str, ...]) -> list[str]:
        assert node not in trail, f"circle: {' -> '.join((*trail, node))}"
        if node not in best:
            below = [walk(other, (*trail, node)) for other in sorted(graph[node])]
            best[node] = [node, *max(below, key=len, default=[])]
        return best[node]

    return max((walk(node, ()) for node in sorted(graph)), key=len)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_a_module_imports_only_from_its_own_street_or_from_those_below(module: str) -> None:
    own = street_of(module)
    assert own in LEVEL, f"{own} is no street of the law"
    for other in imports(module):
        theirs = street_of(other)
        if module == "facefast" or theirs == own:
            continue
        assert LEVEL[theirs] <= LEVEL[own], f"{module} imports {other}, which lies above it"
        assert {own, theirs} not in STRANGERS, f"{module} joins {own} and {theirs} by {other}"


def test_no_module_imports_itself_in_a_circle() -> None:
    # A module may import its siblings; its package's __init__ names both and is no circle.
    graph = {module: {other for other in imports(module) if not module.startswith(f"{other}.")} for module in NAMES}
    assert len(longest_chain(graph)) > 6


def test_streets_form_no_circle_and_a_short_chain() -> None:
    chain = longest_chain(streets())
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)
    assert chain[0] == "cli" and chain[-1] == "recipe"  # the count sees the whole way down


def test_a_command_is_imported_by_nobody_but_cli() -> None:
    commands = {f"facefast.{command}" for command in cli.COMMANDS}
    assert commands == {name for name in NAMES if street_of(name) == "commands"}
    for module in NAMES:
        assert not imports(module) & commands, f"{module} imports a command"


def test_the_cluster_is_known_to_commands_alone_and_knows_what_a_run_is_and_how_it_ends() -> None:
    for module in NAMES:
        reached = {street_of(other) for other in imports(module)} - {street_of(module)}
        if street_of(module) == "cluster":
            assert reached <= {"recipe", "runtime"}, module
        else:
            assert "cluster" not in reached or street_of(module) == "commands", module


@pytest.mark.parametrize(
    "path",
    [p for folder in ("facefast", "csrc", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.*"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_stay_below_500_lines(path: Path) -> None:
    if path.suffix in (".py", ".pyi", ".cpp", ".cu", ".cuh", ".h", ".inc"):
        assert len(path.read_text().splitlines()) < LONGEST_FILE


def test_the_main_loop_fits_on_one_page() -> None:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 40


def defaults() -> list[tuple[str, str, str]]:
    """(file, name, literal) of every default typed in a signature or in a class's field, and of named constants."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            pairs: list[tuple[str, ast.expr | None]] = []
            if isinstance(node, ast.FunctionDef):
                given = node.args.posonlyargs + node.args.args
                last = given[len(given) - len(node.args.defaults) :]
                pairs += [(arg.arg, value) for arg, value in zip(last, node.args.defaults, strict=True)]
                pairs += [(a.arg, v) for a, v in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                pairs.append((node.target.id, node.value))
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                pairs.append((node.targets[0].id, node.value))
            found += [
                (path.name, name.lower(), ast.unparse(value))
                for name, value in pairs
                if isinstance(value, ast.Constant) and isinstance(value.value, int | float)
            ]
    return found


@pytest.mark.parametrize(("name", "literal"), [("max_bad_fraction", "0.01"), ("max_pixels", "64000000")])
def test_a_default_is_typed_once(name: str, literal: str) -> None:
    places = [place for place in defaults() if place[1] == name]
    assert places == [("config.py", name, literal)]
    others = [place for place in defaults() if literal == "64000000" and place[2] == literal]
    assert len(others) <= 1


def test_setup_and_cmake_build_every_source_from_the_same_list() -> None:
    listed = json.loads((ROOT / "csrc" / "sources.json").read_text())
    sources = {path for part in listed.values() for paths in part.values() for path in paths}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert sources == present
    for build in ("setup.py", "CMakeLists.txt"):
        assert "sources.json" in (ROOT / build).read_text().replace('" / "', "/")


def test_image_sizes_are_typed_only_in_recipes_templates_and_published_layouts() -> None:
    allowed = {"image.py", "named.py", "augment.py", "afad.py"}  # AFAD writes a gender as 111 or 112
    for path in MODULES:
        if path.name in allowed or "models" in path.parts or "drawn" in path.parts:
            continue
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(r"\b(112|160|224)\b", code), f"{path.name} types an image size"
