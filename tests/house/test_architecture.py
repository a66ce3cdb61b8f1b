"""The shape of the code: layers, no circles, files of a readable length, a main loop of one page, one source list."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "facefast"
LAYERS = (
    ("recipe", "runtime", "files", "log", "metrics", "ops"),
    ("recipes", "data", "models", "optim", "clustering", "suspects", "onnx_graph", "int8"),
    ("transfer", "losses", "distill", "prune", "objective", "baselines", "checkpoint", "step", "prepare", "cli"),
    ("index", "evaluate", "predict", "export", "report", "sheets", "beginning", "ending", "audit", "label", "compress"),
    ("train",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def top_level(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names inside the package that a module imports when it is loaded, not when a function runs."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "facefast":
            if node.module == "facefast":
                found |= {f"facefast.{alias.name}" for alias in node.names}
            else:
                submodules = {
                    f"{node.module}.{alias.name}"
                    for alias in node.names
                    if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                }
                found |= submodules or {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("facefast.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    own = top_level(path)
    if own in ("__init__", "__main__"):
        return
    assert own in LAYER_OF, f"{own} stands in no layer of DESIGN"
    for name in imports(path):
        other = name.split(".")[1]
        if other.startswith("_"):  # a native module knows nothing of Python's
            continue
        assert LAYER_OF[other] <= LAYER_OF[own], f"{own} (layer {LAYER_OF[own]}) imports {name}"
        assert {own, other} != {"data", "models"}, f"{path.name} joins data and models"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        name = ".".join(("facefast", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = imports(path)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name in done:
            return
        for other in graph.get(name, ()):
            # A submodule may import its siblings; its package's __init__ re-exports both and is no circle.
            if not name.startswith(f"{other}."):
                visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "path",
    [p for folder in ("facefast", "csrc", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.*"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_stay_within_500_lines(path: Path) -> None:
    if path.suffix in (".py", ".cpp", ".cu", ".h"):
        assert len(path.read_text().splitlines()) <= 500


def test_the_main_loop_fits_on_one_page() -> None:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 40


def test_setup_and_cmake_build_every_source_from_the_same_list() -> None:
    listed = json.loads((ROOT / "csrc" / "sources.json").read_text())
    sources = {path for part in listed.values() for paths in part.values() for path in paths}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert sources == present
    for build in ("setup.py", "CMakeLists.txt"):
        assert "sources.json" in (ROOT / build).read_text().replace('" / "', "/")


def test_image_sizes_are_typed_only_in_recipes_templates_and_published_layouts() -> None:
    allowed = {"image.py", "recipes.py", "augment.py", "afad.py"}  # AFAD writes a gender as 111 or 112
    for path in MODULES:
        if path.name in allowed or top_level(path) == "models" or "synthetic" in path.name:
            continue
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        if path.name in ("drawing.py", "persona.py", "canvas.py", "occluders.py"):
            continue
        assert not re.search(r"\b(112|160|224)\b", code), f"{path.name} types an image size"
