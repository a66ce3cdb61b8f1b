"""Builds the native parts: facefast._scan, facefast/_dali.so and facefast._C.

FACEFAST_CUDA=auto (default) adds the CUDA kernels when a whole CUDA 13 compiler is found, 1 demands them, 0 leaves them
out. nvcc is looked for in $CUDA_HOME, in the package index's toolkit (`pip install 'facefast[cuda]'`), on PATH and in
/usr/local/cuda; one that lacks a part, or cannot compile, is named together with the reason.
FACEFAST_CUDA_ARCHS lists the real architectures ("80 86 89 90"); the newest one also goes in as PTX.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
TOOLKIT = "cuda-toolkit[nvcc,cudart,crt,cccl,nvvm]==13.0.*"
TRIAL = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void kernel(float* x) { x[threadIdx.x] += 1.0f; }
void launch(float* x) { kernel<<<1, 32>>>(x); }
"""


def wish() -> str:
    """FACEFAST_CUDA: whether CUDA is demanded (1), left out (0) or taken where it is (auto)."""
    value = os.environ.get("FACEFAST_CUDA", "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"FACEFAST_CUDA is {value!r}; it must be 0, 1 or auto")
    return value


def archs() -> list[str]:
    """FACEFAST_CUDA_ARCHS, the real architectures that kernels are compiled for."""
    value = os.environ.get("FACEFAST_CUDA_ARCHS", "80 86 89 90")
    if not value.split() or not all(re.fullmatch(r"\d+[af]?", arch) for arch in value.split()):
        raise SystemExit(f'FACEFAST_CUDA_ARCHS is {value!r}; it must list architectures, as in "80 86 89 90"')
    return value.split()


def wheel_toolkits() -> list[Path]:
    """The nvidia/cu13 folders that wheels of CUDA share, best first.

    pip builds in an environment of its own, laid over nothing, so what counts is where Python imports from. The
    environment that pip installs into comes last: a compiler that somebody put there serves as well.
    """
    sites = [*sys.path, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    folders = dict.fromkeys(Path(site).resolve() / "nvidia" / "cu13" for site in sites)
    return [folder for folder in folders if folder.is_dir()]


def cuda_headers() -> str:
    """CUDA's headers for host code: DALI's own include them, with or without a CUDA compiler."""
    homes = [*wheel_toolkits(), *map(Path, filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]))]
    for folder in [home / "include" for home in homes]:
        api = folder / "cuda_runtime_api.h"
        whole = (folder / "crt" / "host_config.h").exists() and api.exists()
        if whole and re.search(r"#define +CUDART_VERSION +13", api.read_text(errors="replace")):
            return str(folder)
    raise SystemExit(
        "DALI's headers include CUDA's, and cuda_runtime_api.h and crt/host_config.h of CUDA 13 are not in include/ of "
        f"{', '.join(map(str, homes))}. Install them with: pip install 'cuda-toolkit[cudart,crt,cccl]>=13.0,<14'"
    )


class Toolkit(NamedTuple):
    """A CUDA 13 compiler with everything that it needs."""

    nvcc: Path
    headers: Path
    cudart: Path  # libcudart_static.a: a machine without a driver can still load what links it

    def command(self, source: Path, target: Path, macros: list[str], folders: list[str]) -> list[str]:
        """The call that compiles `source` to an object file."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs()]
        codes.append(f"-gencode=arch=compute_{archs()[-1]},code=compute_{archs()[-1]}")
        flags = ["-O3", "-std=c++20", "--compiler-options=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
        flags += ["-Xptxas=-v,-warn-spills", "--threads=0"]
        includes = [f"-I{folder}" for folder in (self.headers, *folders)]
        return [str(self.nvcc), "-c", str(source), "-o", str(target), *flags, *codes, *macros, *includes]


class UnusableError(Exception):
    """Why an nvcc cannot build facefast."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UnusableError(f"cannot be run: {error.strerror}") from error


def inspect(nvcc: Path) -> Toolkit:
    """The toolkit that `nvcc` belongs to, after a trial compilation.

    Raises:
        UnusableError: it is of another release, or lacks a part, or does not compile.
    """
    if not nvcc.exists():
        raise UnusableError("is not there")
    version = run([str(nvcc), "--version"])
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if release is None:
        raise UnusableError(f"does not tell its release: {first_lines(version.stdout + version.stderr)}")
    if release[1] != "13":
        raise UnusableError(f"is of release {release[1]}.{release[2]}; it must be 13")
    # On PATH there may be a script or ccache that calls an nvcc elsewhere; only nvcc itself knows its folder.
    dry = run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    if top is None:
        raise UnusableError(f"does not tell its folder (TOP): {first_lines(dry.stdout + dry.stderr)}")
    homes = [Path(top[1].strip()).resolve(), *wheel_toolkits()]
    toolkit = Toolkit(
        nvcc,
        headers=part(homes, ("include", "targets/*/include"), "cuda_runtime.h"),
        cudart=part(homes, ("lib64", "lib", "targets/*/lib"), "libcudart_static.a") / "libcudart_static.a",
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cu"
        source.write_text(TRIAL)
        done = run(toolkit.command(source, source.with_suffix(".o"), [], []))
    if done.returncode:
        raise UnusableError(f"fails on a trial: {first_lines(done.stdout + done.stderr)}")
    return toolkit


def part(homes: list[Path], patterns: tuple[str, ...], name: str) -> Path:
    """The first folder that has `name`, nvcc's own before those of the wheels."""
    for home in homes:
        for pattern in patterns:
            for folder in sorted(home.glob(pattern)):
                if (folder / name).exists():
                    return folder
    raise UnusableError(f"has no {name}; looked in {', '.join(map(str, homes))}")


def first_lines(text: str) -> str:
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][:3]) or "no output"


def candidates() -> list[Path]:
    """Every nvcc there may be, in the order of preference; one in $CUDA_HOME also when it is missing."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    found = [folder / "bin" / "nvcc" for folder in wheel_toolkits()]
    found += [Path(on_path)] if on_path else []
    found = [nvcc for nvcc in [*found, Path("/usr/local/cuda/bin/nvcc")] if nvcc.exists()]
    return list(dict.fromkeys([Path(home) / "bin" / "nvcc", *found] if home else found))


def find_toolkit() -> Toolkit | None:
    """The CUDA 13 compiler that will be used, said aloud, or None; FACEFAST_CUDA=1 without one stops the build."""
    if wish() == "0":
        print("facefast: CUDA kernels left out, FACEFAST_CUDA is 0", flush=True)
        return None
    reasons = []
    for nvcc in candidates():
        try:
            toolkit = inspect(nvcc)
        except UnusableError as error:
            reasons.append(f"{nvcc} {error}")
            print(f"facefast: not used: {reasons[-1]}", flush=True)
        else:
            print(f"facefast: CUDA kernels with {nvcc}", flush=True)
            return toolkit
    if wish() == "1":
        raise SystemExit(
            "FACEFAST_CUDA=1, but there is no usable nvcc of CUDA 13; found: "
            f"{'; '.join(reasons) or 'none in CUDA_HOME, in wheels, on PATH or in /usr/local/cuda'}. "
            f"Install one with: pip install '{TOOLKIT}', or let CUDA_HOME name one, or set FACEFAST_CUDA=0"
        )
    print("facefast: CUDA kernels left out, no usable nvcc of CUDA 13 (FACEFAST_CUDA=1 demands one)", flush=True)
    return None


class BuildPy(build_py):
    """Copies the modules, after removing what an earlier build left: a module that was renamed since would go into the
    wheel a second time."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "facefast", ignore_errors=True)
        super().run()


class Build(BuildExtension):
    """torch's build_ext, plus: CUDA sources go through our own nvcc call, _dali.so is a plain library, and what was
    built with other settings is built again."""

    def get_ext_filename(self, name: str) -> str:
        """`facefast/_dali.so` is loaded by DALI, not imported by Python, so its name carries no ABI tag."""
        if name.rpartition(".")[2] == "_dali":
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No PyInit symbol is forced: _dali.so has none."""
        return ext.export_symbols

    def build_extensions(self) -> None:
        """Finds the CUDA compiler before anything is compiled, then builds what is out of date.

        The times of files say nothing of another compiler, another DALI or other architectures: a note in build_temp
        does.
        """
        self.toolkit = find_toolkit()
        flags = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")]
        places = [[ext.name, ext.define_macros, ext.include_dirs, ext.library_dirs] for ext in self.extensions]
        settings = json.dumps([[str(part) for part in self.toolkit or ()], archs(), torch.__version__, flags, places])
        note = Path(self.build_temp) / "settings.json"
        self.force = bool(self.force) or not note.exists() or note.read_text() != settings
        note.unlink(missing_ok=True)  # a build that stops halfway leaves objects of two settings
        super().build_extensions()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(settings)

    def copy_extensions_to_source(self) -> None:
        """Puts the libraries into the checkout (--inplace, --editable), also over newer ones: those may be of another
        Python or without CUDA."""
        self.force = True
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        """Compiles the CUDA part, when there is a compiler for it, and hands its objects to the ordinary build."""
        cuda = SOURCES[ext.name.rpartition(".")[2]]["cuda"]
        if self.toolkit and cuda:
            ext.define_macros.append(("FACEFAST_WITH_CUDA", "1"))
            ext.extra_objects += [self.compile_cuda(self.toolkit, ext, source) for source in cuda]
            ext.extra_link_args += [str(self.toolkit.cudart), "-ldl", "-lrt", "-lpthread"]
        super().build_extension(ext)

    def compile_cuda(self, toolkit: Toolkit, ext: Extension, source: str) -> str:
        """One `.cu` to an object file; what ptxas says of registers and spills goes to build/ptxas for the tests."""
        target = Path(self.build_temp) / f"{source}.o"
        changed = max((ROOT / path).stat().st_mtime for path in ext.depends)
        if target.exists() and not self.force and target.stat().st_mtime > changed:
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        print("nvcc", source, *archs(), flush=True)
        done = run(toolkit.command(ROOT / source, target, macros, [*ext.include_dirs, cuda_headers()]))
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}nvcc failed on {source}")
        report = ROOT / "build" / "ptxas" / f"{Path(source).stem}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(done.stderr + done.stdout)
        return str(target)


def depends(name: str) -> list[str]:
    """What an extension is built from: all that lies beside its sources, which no compiler is asked about, and the two
    files that say how. distutils compares only these and the sources with the library."""
    folders = {(ROOT / source).parent for source in SOURCES[name]["cpu"] + SOURCES[name]["cuda"]}
    kinds = (".h", ".inc", ".cpp", ".cu", ".cuh")
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in kinds}
    return ["setup.py", "csrc/sources.json", *sorted(path.relative_to(ROOT).as_posix() for path in files)]


def scan() -> Extension:
    import pybind11

    return Extension(
        "facefast._scan",
        SOURCES["_scan"]["cpu"],
        depends=depends("_scan"),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*CXX_FLAGS, "-std=c++17"],
        extra_link_args=["-pthread"],
    )


def dali() -> Extension:
    import nvidia.dali
    from nvidia.dali import sysconfig as dali_config

    version = nvidia.dali.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = next(line for line in project["dependencies"] if line.startswith("nvidia-dali"))
    if asked.partition("==")[2] != version:
        print(
            f"facefast: builds against DALI {version}, but pyproject.toml asks for {asked}: add --no-deps to pip "
            "install, or pip replaces DALI and the plugin, which fits no other version, is refused when it is loaded",
            flush=True,
        )
    return Extension(
        "facefast._dali",
        SOURCES["_dali"]["cpu"],
        depends=depends("_dali"),
        include_dirs=[dali_config.get_include_dir(), cuda_headers()],
        define_macros=[("FACEFAST_DALI_VERSION", f'"{version}"')],
        # Linked without a path: DALI has loaded its libdali.so before it loads a plugin.
        library_dirs=[str(Path(nvidia.dali.__file__).parent)],
        libraries=["dali"],
        extra_compile_args=[*CXX_FLAGS, "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1"],
    )


def loss() -> Extension:
    return CppExtension(
        "facefast._C",
        SOURCES["_C"]["cpu"],
        depends=depends("_C"),
        # torch's stable ABI as of 2.11: what is built with any newer torch runs with 2.11 and later.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, "-std=c++20", "-fopenmp-simd"],
    )


wish(), archs()  # a wrong value stops every command, not only the one that compiles
setup(
    ext_modules=[scan(), dali(), loss()],
    cmdclass={"build_ext": Build.with_options(use_ninja=False), "build_py": BuildPy},
    options={"build_ext": {"parallel": max(1, min(3, len(os.sched_getaffinity(0))))}},
)
