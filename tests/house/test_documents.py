"""Documents are true: links, paths, names, options and commands exist; a run's files and fields, exit codes and the
public names are those that the code has."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import shutil
import tomllib
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import facefast
from facefast import cli, train
from facefast.data import read_index
from facefast.data.drawn import synthetic
from facefast.recipe import Phase, Recipe
from facefast.recipe.named import RECIPES
from facefast.runtime import exits, files, log, process
from tests.house import test_architecture as architecture
from tests.support import small

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
RUNS = (ROOT / "docs" / "runs.md").read_text()
SOURCES = [
    path
    for folder in ("facefast", "csrc", "tests", "benchmarks", "docs", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".pyi", ".cpp", ".cu", ".cuh", ".h", ".inc", ".sh", "") and path.is_file()
]
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
PLACEHOLDER = re.compile(r"[A-Z]{3,}")


def prose(path: Path) -> str:
    """A document without its blocks of code, in one line a paragraph."""
    return re.sub(r"(?<=\S)\n *(?=[^\s|#*-])", " ", FENCED.sub("", path.read_text()))


def quoted(path: Path) -> list[str]:
    """What stands between backticks in a line of text."""
    return re.findall(r"`([^`]+)`", prose(path))


def shown(path: Path) -> list[str]:
    """What is typed at a terminal, whether in a block, indented or between backticks; Python blocks are left out."""
    text = re.sub(r"^```python\n.*?^```", "", path.read_text(), flags=re.M | re.S)
    blocks = [line for block in FENCED.findall(text) for line in block.split("\n")]
    return [*blocks, *re.findall(r"^    (\S.*)$", text, re.M), *quoted(path)]


def ids(paths: list[Path]) -> dict[str, Any]:
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


@pytest.mark.parametrize("path", **ids(DOCUMENTS))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        other = (path.parent / place).resolve() if place else path
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", other.read_text()), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("path", **ids(DOCUMENTS))
def test_every_path_into_the_checkout_exists(path: Path) -> None:
    for word in quoted(path):
        own = re.match(r"(\.ci|csrc|tests|benchmarks|docs|facefast)/", word)
        named = re.fullmatch(r"[\w-]+\.(py|md|toml)|\.\w[\w-]*\.yaml", word)
        if not (own or named) or " " in word or PLACEHOLDER.search(word.removesuffix(".md")):
            continue
        assert any((place / word).exists() for place in (ROOT, ROOT / "facefast", path.parent)) or built(word), word


def built(word: str) -> bool:
    """Whether `make setup` makes it: a fresh checkout does not have it yet."""
    return word.endswith(".so") and f'"{Path(word).stem}"' in (ROOT / "csrc" / "sources.json").read_text()


@pytest.mark.parametrize("path", **ids([p for p in DOCUMENTS if p.name != "api.md"]))
def test_every_option_that_a_document_names_exists(path: Path) -> None:
    begin = r"(?:data|image|model|phases|tasks|binary|eval|loss|distill|augment)\.[\w.-]*[\w]"
    words = {word for line in shown(path) for word in re.findall(rf"(?<![\w./-])(?:--)?({begin})", line)}
    for word in words:
        if not word.endswith((".json", ".safetensors", ".FIELD")):
            assert is_option(word), word


def is_option(word: str) -> bool:
    """Whether a dotted word is a field of a recipe; those of a phase may leave out which phase."""
    parts = word.replace("-", "_").split(".")
    return reaches(Recipe, parts) or reaches(Phase, parts)


def reaches(kind: Any, parts: list[str]) -> bool:
    if not parts:
        return True
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):  # phases: by number or name
        return reaches(get_args(kind)[0], parts[1:])
    return (
        dataclasses.is_dataclass(kind)
        and parts[0] in (hints := get_type_hints(kind))
        and reaches(hints[parts[0]], parts[1:])
    )


@pytest.mark.parametrize("path", **ids(DOCUMENTS))
def test_every_command_and_recipe_that_a_document_shows_exists(path: Path) -> None:
    for line in shown(path):
        for command, word in re.findall(r"(?<!from )\bfacefast ([a-z]+)(?: ([\w-]+))?", line):
            assert command in cli.COMMANDS, line
            if command == "train" and word and not word.startswith("--") and not PLACEHOLDER.fullmatch(word):
                assert word in RECIPES, line
        for target in re.findall(r"(?:^|`)make ([\w-]+)", line):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line


def test_the_code_cites_no_document_that_the_clone_lacks() -> None:
    gone = "DES" + "IGN"
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(rf"\b{gone}\b", text), path
        for name in re.findall(r"\bdocs/\w+\.md\b|\b(?:benchmarks/)?[A-Z]+\.md\b", text):
            assert any((ROOT / folder / name).exists() for folder in ("", "docs", "benchmarks")), f"{path} cites {name}"


def test_names_of_the_package_in_its_docstrings_exist() -> None:
    for path in (ROOT / "facefast").rglob("*.py"):
        for name in set(re.findall(r"`(facefast(?:\.\w+)+)`", path.read_text())):
            assert exists(name), f"{path} names {name}"


def exists(name: str) -> bool:
    """Whether a dotted name can be imported."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(lambda thing, part: getattr(thing, part, None), parts[size:], found) is not None
    return False


# ARCHITECTURE.md


@functools.cache
def names_of(path: Path) -> set[str]:
    """Names that a module defines or imports at its top, and Class.member."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for name in targets(node):
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{member}" for inner in node.body for member in targets(inner)}
    return found


def targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    assigned = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [target.id for target in assigned if isinstance(target, ast.Name)]


def test_architecture_is_read_in_ten_minutes() -> None:
    assert len(ARCHITECTURE.read_text().splitlines()) <= 160


def test_architecture_names_only_what_there_is() -> None:
    modules = [*(ROOT / "facefast").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    everything = {name for path in modules for name in names_of(path)}
    known = (
        everything | {field.name for field in dataclasses.fields(Recipe)} | set(architecture.LEVEL) | set(cli.COMMANDS)
    )
    known |= {member.rpartition(".")[2] for member in everything} | {"make", "facefast", "python"}
    for word in quoted(ARCHITECTURE):
        first = word.split()[0]
        if word.startswith("[") or word in RUNS:
            continue
        if "/" in word:
            place = ROOT / word
            assert (place.parent if PLACEHOLDER.search(place.name) else place).exists() or built(word), word
        elif PLACEHOLDER.search(word) and not PLACEHOLDER.fullmatch(word.replace("_", "")):
            continue  # read_NAME(root)
        elif first.startswith("facefast."):
            assert exists(first), word
        elif re.fullmatch(r"[a-z]+(\.\w+)+", word):
            assert is_option(word), word
        else:
            assert first in known, word


def test_architecture_says_in_which_file_a_name_is() -> None:
    pairs = re.findall(r"((?:`[\w.]+`(?:,| and| or|)\s+)+)(?:in|of) `([\w/.]+\.\w+)`", prose(ARCHITECTURE))
    assert len(pairs) > 30
    for names, place in pairs:
        path = ROOT / place
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in (names_of(path) if path.suffix == ".py" else path.read_text()), f"{name} in {place}"


def test_architecture_has_the_law_the_streets_and_the_commands_of_the_code() -> None:
    text = ARCHITECTURE.read_text()
    law = re.search(r"^recipe .* cli$", text, re.M)
    assert law
    assert tuple(set(level.split()) for level in law[0].split(" <- ")) == architecture.LAW
    streets = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "facefast").glob("**/__init__.py")} - {"facefast"}
    assert set(re.findall(r"^\| `([\w/]+)/` \|", text, re.M)) == streets
    strangers = re.search(r"[^.]*know nothing of each other[^.]*\.", prose(ARCHITECTURE))
    assert strangers
    assert {frozenset(pair) for pair in re.findall(r"`(\w+)` and `(\w+)`", strangers[0])} == set(
        map(frozenset, architecture.STRANGERS)
    )
    commands = re.search(r"\*\*Commands\*\*: (.*?), as `facefast COMMAND`", prose(ARCHITECTURE))
    assert commands and set(re.findall(r"`(\w+)`", commands[1])) == set(cli.COMMANDS)


# docs/runs.md


def documented(heading: str, kind: str = "file|field") -> set[str]:
    """First column of a table in docs/runs.md.

    Args:
        heading: of the part that it stands in.
        kind: of its first column's title.
    """
    part = RUNS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.search(rf"^\| (?:{kind}) \|.*?(?:\n\n|\Z)", part, re.M | re.S)
    assert rows, heading
    return set(re.findall(r"^\| `([^`]+)` \|", rows[0], re.M))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run with as much as one can have: a source, attributes, names for the unnamed, averaged weights."""
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=16, seed=3)
    root = synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)
    source = small.save_run(tmp_path_factory.mktemp("source"), small.make_model(), root)
    out = tmp_path_factory.mktemp("runs") / "run"
    words = [
        "multitask",
        "--tasks.weighting=uncertainty",
        "--phases.multitask.labels=pseudo",
        "--phases.multitask.steps=2",
        "--phases.multitask.batch-size=8",
        "--data.format=celeba",
        "--data.label-fraction=0.8",
        "--data.test-fraction=0.25",
        "--data.validation-fraction=0.6",
        "--data.verify-fraction=0.25",
        "--eval.pairs=12",
        "--eval.folds=2",
        "--ema=0.5",
        "--log-every=1",
        "--precision=fp32",
    ]
    attributes = ["--tasks.attributes", "Smiling", "Mouth_Slightly_Open", "Brown_Hair"]
    assert train.main([*words, f"--data.root={root}", f"--model.source={source}", f"--out={out}", *attributes]) == 0
    return out


def test_every_file_of_a_run_folder_is_documented_and_every_documented_file_is_there(run: Path) -> None:
    found = {f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()}
    assert {re.sub("labels-.*csv", "labels-PHASE.csv", name) for name in found} == documented("The run folder")
    assert {path.name for path in (run / "checkpoints" / "last").iterdir()} == documented("A checkpoint")


ELSEWHERE = {
    "NAME/mae": ('"mae"', "facefast/evaluation/measure.py"),
    "NAME/within5": ('"within5"', "facefast/evaluation/measure.py"),
    "error": ("error=error", "facefast/training/finish.py"),
}
"""Fields that the run of these tests does not write, and what writes them."""


def test_every_field_of_metrics_is_documented_and_every_documented_field_is_written(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    common = documented("metrics.jsonl", "every line")
    assert all(common <= line.keys() for line in lines)
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    for title in ("train", "validation or test"):
        found = {field for line in lines if line["split"] in title for field in line} - common
        generic = {re.sub(r"^(?!loss)\w+/", "NAME/", re.sub(r"^loss/.*", "loss/TERM", field)) for field in found}
        known = {field for field in generic if field.startswith("known_")}
        assert generic - known == documented("metrics.jsonl", title) - ELSEWHERE.keys()
        assert {field.removeprefix("known_") for field in known} <= documented("metrics.jsonl", title)
    assert known and lines[-1]["split"] == "test" and not known & set(lines[-1])  # of people never seen


def test_every_field_of_status_is_documented_and_every_documented_field_is_written(run: Path) -> None:
    status = files.read_json(run / "status.json")
    found = set(status) | {f"best.{field}" for field in status["best"]}
    assert found == documented("status.json") - ELSEWHERE.keys()
    code = "".join((ROOT / "facefast" / name).read_text() for name in ("train.py", "training/finish.py"))
    states = set(re.findall(r'write_status\(folder, "(\w+)"', code))
    row = re.search(r"^\| `state` \|.*$", RUNS, re.M)
    assert row and all(state in row[0] for state in states) and len(states) == 4


def test_every_field_of_the_evaluation_is_documented_and_every_documented_field_is_written(run: Path) -> None:
    found = files.read_json(run / "evaluation.json")
    parts = {name for name, value in found.items() if isinstance(value, dict)}
    assert parts == {"photographs", "closed_set", "verification"}
    fields = {name for name in found if name not in parts} | {
        f"{part}.{name}" for part in parts for name in found[part]
    }
    assert fields == documented("evaluation.json")


@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_documented_field_that_one_run_lacks_is_written_by_another(field: str) -> None:
    literal, place = ELSEWHERE[field]
    assert literal in (ROOT / place).read_text()


def test_the_terms_of_a_loss_are_documented() -> None:
    code = (ROOT / "facefast/training/objective.py").read_text()
    body = code.partition("def _term_weights")[2].partition("def ")[0]
    terms = set(re.findall(r'^ +"(\w+)":', body, re.M))
    sentence = " ".join(RUNS.split()).partition("TERM is ")[2].partition(". ")[0]
    assert len(terms) >= 7 and set(re.findall(r"`(\w+)`", sentence)) == terms


def test_exit_codes_signals_and_limits_are_those_of_the_code() -> None:
    codes = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", RUNS, re.M)} == codes
    for number in process.STOP_SIGNALS:
        assert number.name in RUNS
    assert f"{log.LOST_UPDATES} updates in a row" in RUNS
    tree = ast.parse((ROOT / "facefast/models/checkpoint.py").read_text())
    free = next(
        ast.literal_eval(n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign) and targets(n) == ["free"]
    )
    sentence = " ".join(RUNS.split()).partition("the machine; the options ")[2].partition(". ")[0]
    assert set(re.findall(r"`([\w.]+)`", sentence)) == set(free)


# docs/api.md


def generator() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_python_names_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == generator().page(), "write it again: python docs/generate_api.py"


def test_the_examples_of_the_python_names_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = small.draw(tmp_path / "drawn")
    small.save_run(tmp_path / "runs" / "mine", small.make_model(), drawn)
    index = read_index(drawn)
    for row, label in enumerate(index.labels.tolist()):
        folder = tmp_path / "people" / index.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(index.path(row), folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in generator().examples():
        exec(example, names)
    assert names["cosines"].shape == (2, 2) and names["shapes"][0] == (4, 3, 64, 64) and len(names["names"]) == 4
    assert names["logits"].grad is not None and names["same"].item() > 0


# docs/transfer.md and the others


def test_the_choice_of_a_recipe_comes_first_and_knows_every_recipe() -> None:
    parts = re.split(r"^## ", (ROOT / "docs" / "transfer.md").read_text(), flags=re.M)
    assert parts[1].startswith("Which recipe") and parts[-1].startswith("The whole table")
    rows = [[cell.strip() for cell in row.split(" | ")] for row in re.findall(r"^\| (.*) \|$", parts[1], re.M)[1:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(RECIPES)
    for number in {number for row in rows for number in re.findall(r"-?\d+\.\d", row[3])}:
        assert re.search(rf"(?<![\d.]){re.escape(number.lstrip('-'))}(?!\d)", "".join(parts[2:])), number


def test_the_whole_table_is_what_the_measured_rows_give() -> None:
    benchmark = importlib.import_module("transfer")
    text = (ROOT / "docs" / "transfer.md").read_text()
    assert benchmark.DOCUMENT == ROOT / "docs" / "transfer.md"
    assert text.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0].strip() == benchmark.table()


def test_the_changelog_begins_with_the_version_that_this_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first and first[1] == project["version"] == facefast.__version__


def test_a_commit_is_checked_by_the_tools_of_make_lint_without_a_download() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    rule = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    lint = {re.sub(r" \$\$.*| \.$", "", line) for line in re.findall(r"\$\(BIN\)/(.*)", rule)}
    assert {re.sub(r' "\$@".*', "", line) for line in re.findall(r"exec ([^']*)'", hooks)} == lint
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    assert set(re.findall(r"language: (.*)", hooks)) == {"system"}


def test_environment_variables_that_documents_name_are_read_somewhere() -> None:
    code = "".join(
        path.read_text() for path in [*SOURCES, ROOT / "setup.py", ROOT / "Makefile"] if path.suffix != ".md"
    )
    for path in DOCUMENTS:
        for name in set(re.findall(r"\bFACEFAST_\w+", path.read_text())):
            assert name in code, f"{path.name} names {name}"
