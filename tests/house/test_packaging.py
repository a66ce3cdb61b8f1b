"""What pip makes of the project: which compiler builds it, when it is built again, what sdist and wheel hold, and
whether the wheel works where there is no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools

import facefast

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
NEEDED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py, which asks for no build; `given` is what it hands to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    for name in ("FACEFAST_CUDA", "FACEFAST_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    names: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "facefast_setup"}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), names)
    return SimpleNamespace(**names, given=given, names=names)


def fake_nvcc(home: Path, release: str = "13.0", trial: str = "exit 0", parts: tuple[str, ...] = ("lib", "h")) -> Path:
    """A script that answers as nvcc does, and the files that lie beside a whole one."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  *) {trial} ;;
esac
"""
    )
    nvcc.chmod(0o755)
    for folder, name in [("lib64", "libcudart_static.a")] * ("lib" in parts) + [("include", "cuda_runtime.h")] * (
        "h" in parts
    ):
        (home / folder).mkdir()
        (home / folder / name).touch()
    return nvcc


# ---------------------------------------------------------------------------------------------
# The compiler


def test_a_script_on_path_leads_to_the_toolkit_of_the_nvcc_that_it_calls(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.names, "wheel_toolkits", list)
    real = fake_nvcc(tmp_path / "cuda")
    script = tmp_path / "usr" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    toolkit = build.inspect(script)
    assert toolkit.nvcc == script
    assert toolkit.headers == tmp_path / "cuda" / "include"
    assert toolkit.cudart == tmp_path / "cuda" / "lib64" / "libcudart_static.a"


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ({"release": "12.8"}, "is of release 12.8; it must be 13"),
        ({"release": "unknown"}, "does not tell its release: Cuda compilation tools, release unknown"),
        ({"parts": ("h",)}, "has no libcudart_static.a; looked in "),
        ({"parts": ("lib",)}, "has no cuda_runtime.h; looked in "),
        ({"trial": "echo 'unsupported GNU version'; exit 1"}, "fails on a trial: unsupported GNU version"),
    ],
)
def test_an_nvcc_that_cannot_build_is_found_wrong_before_the_build(
    build: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake: dict[str, Any],
    reason: str,
) -> None:
    nvcc = fake_nvcc(tmp_path / "cuda", **fake)
    monkeypatch.setitem(build.names, "wheel_toolkits", list)
    monkeypatch.setitem(build.names, "candidates", lambda: [nvcc, tmp_path / "gone" / "bin" / "nvcc"])
    assert build.find_toolkit() is None
    said = capsys.readouterr().out
    assert f"not used: {nvcc} {reason}" in said
    assert "gone/bin/nvcc is not there" in said
    assert "CUDA kernels left out" in said
    monkeypatch.setenv("FACEFAST_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        build.find_toolkit()
    assert f"{nvcc} {reason}" in str(error.value)
    assert f"pip install '{PROJECT['optional-dependencies']['cuda'][0]}'" in str(error.value)


def test_the_first_nvcc_that_works_is_taken_and_those_before_it_are_named(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = fake_nvcc(tmp_path / "old", release="11.8"), fake_nvcc(tmp_path / "new")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("PATH", f"{new.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(build.names, "wheel_toolkits", list)
    assert build.find_toolkit().nvcc == new
    assert f"not used: {old} is of release 11.8" in capsys.readouterr().out


def test_zero_looks_for_no_compiler_and_other_words_are_refused(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.names, "candidates", lambda: pytest.fail("looked for nvcc"))
    monkeypatch.setenv("FACEFAST_CUDA", "0")
    assert build.find_toolkit() is None
    monkeypatch.setenv("FACEFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="FACEFAST_CUDA is 'yes'; it must be 0, 1 or auto"):
        build.wish()
    monkeypatch.setenv("FACEFAST_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="FACEFAST_CUDA_ARCHS is 'sm_90'; it must list architectures"):
        build.archs()


def test_headers_come_from_where_the_build_imports_before_where_pip_installs(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's isolated build: torch and DALI lie in an overlay, and the target environment has other versions or none."""
    for place in ("overlay", "target"):
        include = tmp_path / place / "nvidia" / "cu13" / "include"
        (include / "crt").mkdir(parents=True)
        (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
        (include / "crt" / "host_config.h").touch()
    target = str(tmp_path / "target")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": target, "platlib": target})
    monkeypatch.setattr(sys, "path", [str(tmp_path / "overlay")])
    assert build.cuda_headers() == str(tmp_path / "overlay" / "nvidia" / "cu13" / "include")
    monkeypatch.setattr(sys, "path", [])
    assert build.cuda_headers() == str(tmp_path / "target" / "nvidia" / "cu13" / "include")


# ---------------------------------------------------------------------------------------------
# When it is built again


def test_an_extension_depends_on_everything_beside_its_sources(build: SimpleNamespace) -> None:
    extensions = {ext.name.rpartition(".")[2]: ext for ext in build.given["ext_modules"]}
    assert set(extensions) == set(SOURCES)
    for name, ext in extensions.items():
        folders = {Path(source).parent for source in SOURCES[name]["cpu"] + SOURCES[name]["cuda"]}
        beside = {path for path in NEEDED if Path(path).parent in folders}
        assert set(ext.depends) == beside | {"setup.py", "csrc/sources.json"}
    assert {path for ext in extensions.values() for path in ext.depends} - {"setup.py"} == NEEDED


def test_a_changed_header_links_its_library_again_and_other_flags_all_of_them(tmp_path: Path) -> None:
    """The real setup.py on sources of one line each."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    small = {name: {"cpu": [f"csrc/{name}/it.cpp"], "cuda": []} for name in SOURCES}
    header = tmp_path / "csrc" / "_C" / "it.cuh"
    for part in small.values():
        source = tmp_path / part["cpu"][0]
        source.parent.mkdir(parents=True)
        source.write_text("int one() { return 1; }\n")
    header.touch()
    (tmp_path / "csrc" / "sources.json").write_text(json.dumps(small))
    (tmp_path / "facefast").mkdir()
    (tmp_path / "facefast" / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "README.md").touch()

    def built(**environment: str) -> set[str]:
        command = [sys.executable, "setup.py", "build_ext"]
        environment = os.environ | {"FACEFAST_CUDA": "0"} | environment
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return set(re.findall(r"building 'facefast\.(\w+)' extension", done.stdout + done.stderr))

    everything = set(SOURCES)
    assert built() == everything
    assert built() == set()
    later = max(path.stat().st_mtime for path in (tmp_path / "build").rglob("*")) + 1
    os.utime(header, (later, later))
    assert built() == {"_C"}
    assert built(CXXFLAGS="-DOTHER") == everything


# ---------------------------------------------------------------------------------------------
# Versions and extras


def test_versions_are_said_once_or_agree() -> None:
    assert PROJECT["version"] == facefast.__version__
    constraints = (ROOT / ".ci" / "constraints.txt").read_text().split()
    pins = [line for line in PYPROJECT["build-system"]["requires"] if re.match(r"(torch|nvidia-dali)", line)]
    assert len(pins) == 2
    assert set(pins) <= set(constraints), "an isolated build would use versions that nobody tested"
    dali = [line for line in PROJECT["dependencies"] if line.startswith("nvidia-dali")]
    assert dali == [line for line in pins if line.startswith("nvidia-dali")]


def test_the_oldest_torch_is_the_one_whose_stable_abi_is_compiled_against() -> None:
    [oldest] = re.findall(r"torch>=(\d+)\.(\d+)", " ".join(PROJECT["dependencies"]))
    number = f"0x{int(oldest[0]):02x}{int(oldest[1]):02x}" + "0" * 12
    for name in ("setup.py", "CMakeLists.txt"):
        assert set(re.findall(r"TORCH_TARGET_VERSION\W+(0x\w+)", (ROOT / name).read_text())) == {number}


def test_every_extra_that_a_message_or_a_page_names_exists() -> None:
    named = set()
    for path in [*ROOT.glob("*.*"), *(p for f in ("facefast", "csrc", "docs") for p in (ROOT / f).rglob("*.*"))]:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".h", ".cpp"):
            for extras in re.findall(r"facefast\[([\w, -]+)\]", path.read_text()):
                named |= {extra.strip() for extra in extras.split(",")}
    assert {"cuda", "detect", "onnx"} <= named <= set(PROJECT["optional-dependencies"])


def test_dev_holds_what_the_other_extras_hold_except_the_compiler() -> None:
    extras = PROJECT["optional-dependencies"]
    for name in set(extras) - {"dev", "cuda"}:
        assert set(extras[name]) <= set(extras["dev"]), name


# ---------------------------------------------------------------------------------------------
# sdist, wheel, and a fresh environment


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as pip's front ends make it, except that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "egg_info", "-e", folder, "sdist", "-d", folder, cwd=ROOT)
    [path] = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the sdist alone, with the packages of this environment in place of an isolated one's copies."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent, FACEFAST_CUDA="0")
    [path] = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, where torch and the like come from this one's folder, the checkout from nowhere:
    a path in a .pth file is searched, but the .pth files in it, an editable install among them, are not read."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=wheel.parent)
    [site] = (folder / "lib").glob("python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    where = run(python, "-c", "import facefast; print(facefast.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site)
    return python


@pytest.mark.slow
def test_the_sdist_is_the_checkout_without_what_was_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= NEEDED
    if (ROOT / ".git").exists() and shutil.which("git"):
        tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        assert {name for name in tracked if name and (ROOT / name).exists()} <= held
    assert not [name for name in held if re.search(r"\.(so|pyc|o)$|__pycache__|^(build|runs|data)/", name)]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_libraries_of_this_build(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT) for path in (ROOT / "facefast").rglob("*.*")}
    package = {path.as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".so"}
    assert "facefast/py.typed" in package
    libraries = {f"_scan{sysconfig.get_config_var('EXT_SUFFIX')}", "_dali.so", "_C.abi3.so"}
    assert held == package | {f"facefast/{name}" for name in libraries}
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name  # _scan is compiled for one Python


@pytest.mark.slow
def test_no_library_of_the_wheel_looks_for_others_in_the_place_where_it_was_built(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    for library in libraries:
        assert not re.search(r"R(UN)?PATH", run("readelf", "-d", library, cwd=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("question", ["version", "loss", "dali", "model"])
def test_an_installed_wheel_works_without_the_checkout(python: Path, tmp_path: Path, question: str) -> None:
    assert f"{question}: " in run(python, ROOT / ".ci" / "smoke.py", tmp_path, question, cwd=tmp_path)
