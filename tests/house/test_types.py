"""The types tell the truth: stubs agree with the compiled modules, and a misspelt import is an error."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mypy import api

from facefast import _C, _scan  # _C needs the libraries of torch, which conftest has loaded
from tests.support.faulty import jpeg

ROOT = Path(__file__).parents[2]
MODULES = {"_C": _C, "_scan": _scan}


def stub(name: str) -> ast.Module:
    return ast.parse((ROOT / "facefast" / f"{name}.pyi").read_text())


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def values(tree: ast.Module) -> dict[str, ast.expr]:
    """The annotation of every name that is no function and no class."""
    found = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): node.annotation for node in found}


def public(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """(name, default) of each; pybind11 passes all of them by position or by name."""
    given = function.args
    assert not given.posonlyargs and not given.kwonlyargs and not given.vararg and not given.kwarg
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(value) for value in given.defaults]
    return [(arg.arg, default) for arg, default in zip(given.args, defaults, strict=True)]


def as_pybind11_has_it(function: Callable[..., Any]) -> ast.FunctionDef:
    """The signature with which a pybind11 function's docstring begins."""
    line = (function.__doc__ or "").splitlines()[0]
    (parsed,) = ast.parse(f"def {line}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return parsed


@pytest.mark.parametrize("name", MODULES)
def test_a_stub_names_what_its_module_holds_and_nothing_else(name: str) -> None:
    held, tree = public(MODULES[name]), stub(name)
    assert functions(tree).keys() == {key for key, value in held.items() if callable(value)}
    assert values(tree).keys() == {key for key, value in held.items() if not callable(value)}


@pytest.mark.parametrize("name", functions(stub("_scan")))
def test_a_functions_stub_has_its_parameters_and_defaults(name: str) -> None:
    ours, theirs = functions(stub("_scan"))[name], as_pybind11_has_it(getattr(_scan, name))
    assert parameters(ours) == parameters(theirs)
    for own, other in zip(ours.args.args, theirs.args.args, strict=True):
        assert own.annotation is not None and other.annotation is not None
        if ast.unparse(other.annotation) == "bytes":
            assert ast.unparse(own.annotation) == "bytes"


def of_type(value: object, annotation: ast.expr) -> None:
    """Fails where a value is not what the stub calls it."""
    if isinstance(annotation, ast.Subscript):
        outer, inner = ast.unparse(annotation.value), annotation.slice
        if outer == "npt.NDArray":
            assert isinstance(value, np.ndarray) and value.dtype == getattr(np, ast.unparse(inner).removeprefix("np."))
        elif outer == "Literal":
            assert value in ast.literal_eval(inner)
        elif outer == "list":
            assert isinstance(value, list)
            for part in value:
                of_type(part, inner)
        else:
            assert outer == "tuple" and isinstance(value, tuple) and isinstance(inner, ast.Tuple)
            kinds = inner.elts
            if ast.unparse(kinds[-1]) == "...":
                kinds = kinds[:1] * len(value)
            for part, kind in zip(value, kinds, strict=True):
                of_type(part, kind)
    else:
        assert type(value).__name__ == ast.unparse(annotation)


@pytest.mark.parametrize("name", MODULES)
def test_values_are_of_the_types_the_stub_gives(name: str) -> None:
    for key, annotation in values(stub(name)).items():
        of_type(getattr(MODULES[name], key), annotation)


def test_functions_return_what_the_stub_says(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    tree, path = stub("_scan"), os.fsencode(tmp_path / "a.jpg")
    results = {
        "read": _scan.read([path], [-1], [-1], 1, 10**6),
        "inspect": _scan.inspect(jpeg(), 10**6),
        "content_hash": _scan.content_hash(jpeg()),
    }
    assert results.keys() | {"scan"} == functions(tree).keys()
    for name, result in results.items():
        annotation = functions(tree)[name].returns
        assert annotation is not None
        of_type(result, annotation)
    (columns,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    fields = {ast.unparse(n.target): n.annotation for n in columns.body if isinstance(n, ast.AnnAssign)}
    found = _scan.scan(os.fsencode(tmp_path), [b"a.jpg"], [-1], [-1], 1, 10**6)
    returned = functions(tree)["scan"].returns
    assert isinstance(returned, ast.Name) and returned.id == columns.name
    assert found.keys() == fields.keys()
    for name, column in found.items():
        of_type(column, fields[name])


CONFIG = f"""
[mypy]
strict = true
mypy_path = {ROOT}
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,torchvision.*,numpy.*,PIL.*,timm.*,safetensors.*,tqdm.*]
follow_imports = skip
"""
"""A user's program is judged, the package is read and other packages are not, which takes two seconds, not twenty."""
PROGRAM = """
from facefast import __version__, load, misspelt
from facefast.models.checkpoint import load_modell
from facefast import _C, _scan

_scan.reed
_scan.inspect("text", 1)
_C.version.upper()
load(1.5)
sound: tuple[int, int] = _scan.content_hash(b"data", seed=3)
text: str = __version__
"""


def test_the_type_checker_refuses_what_the_package_does_not_have_and_knows_what_it_has(tmp_path: Path) -> None:
    config, program = tmp_path / "mypy.ini", tmp_path / "program.py"
    config.write_text(CONFIG)
    program.write_text(PROGRAM)
    report, trouble, status = api.run(
        [f"--config-file={config}", f"--cache-dir={tmp_path / 'cache'}", "--no-error-summary", str(program)]
    )
    assert (trouble, status) == ("", 1)
    found = [re.match(r".*program.py:(\d+): error: .*\[([a-z-]+)\]$", line) for line in report.splitlines()]
    assert [(int(match[1]), match[2]) for match in found if match] == [
        (2, "attr-defined"),
        (3, "attr-defined"),
        (6, "attr-defined"),
        (7, "arg-type"),
        (8, "attr-defined"),
        (9, "arg-type"),
    ], report


def test_load_is_there_before_it_is_imported_and_a_misspelt_name_is_not() -> None:
    code = """
import sys
import facefast

assert "load" in dir(facefast) and set(facefast.__all__) <= set(dir(facefast))
assert not {"torch", "numpy"} & sys.modules.keys(), "import facefast alone stays quick"
try:
    from facefast import misspelt
except ImportError as error:
    assert "misspelt" in str(error)
else:
    raise AssertionError("a misspelt name was imported")
from facefast import load
from facefast.deploy import photographs

assert load is photographs.load
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
