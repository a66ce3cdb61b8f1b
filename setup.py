"""Builds the native parts: facefast._scan, facefast/_dali.so and facefast._C.

FACEFAST_CUDA=auto (default) adds the CUDA kernels when nvcc is found, 1 demands them, 0 leaves them out. nvcc is looked
for in $CUDA_HOME, in the package index's toolkit (`pip install facefast[cuda]`), on PATH and in /usr/local/cuda.
FACEFAST_CUDA_ARCHS lists the real architectures ("80 86 89 90"); the newest one also goes in as PTX.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
SITE = Path(sysconfig.get_paths()["purelib"])
CU13 = SITE / "nvidia" / "cu13"  # headers and libraries that torch's and DALI's wheels bring along
ARCHS = os.environ.get("FACEFAST_CUDA_ARCHS", "80 86 89 90").split()
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def find_nvcc() -> Path | None:
    """The CUDA 13 compiler, or None; FACEFAST_CUDA=1 without one stops the build."""
    wish = os.environ.get("FACEFAST_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"FACEFAST_CUDA is {wish!r}; it must be 0, 1 or auto")
    if wish == "0":
        return None
    places = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    places += [CU13]
    if shutil.which("nvcc"):
        places.append(Path(shutil.which("nvcc")).resolve().parents[1])
    places.append(Path("/usr/local/cuda"))
    seen = []
    for place in places:
        nvcc = place / "bin" / "nvcc"
        if not nvcc.exists():
            continue
        release = re.search(
            r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        if release and release[1] == "13":
            return nvcc
        seen.append(f"{nvcc} (release {release[1] if release else 'unknown'})")
    if wish == "1":
        raise SystemExit(
            f"FACEFAST_CUDA=1, but there is no nvcc of CUDA 13; found: {', '.join(seen) or 'none'}. "
            "Install one with: pip install 'cuda-toolkit[nvcc,crt,cccl,nvvm]==13.0.2'"
        )
    return None


NVCC = find_nvcc()


def cudart() -> list[str]:
    """The static CUDA runtime: a machine without a driver can still load what links it."""
    for folder in (CU13 / "lib", NVCC.parents[1] / "lib64", NVCC.parents[1] / "lib"):
        if (folder / "libcudart_static.a").exists():
            return [str(folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
    raise SystemExit(f"{NVCC} has no libcudart_static.a beside it; set FACEFAST_CUDA=0 to build without CUDA")


class Build(BuildExtension):
    """torch's build_ext, plus: CUDA sources go through our own nvcc call, and _dali.so is a plain library."""

    def get_ext_filename(self, name: str) -> str:
        """`facefast/_dali.so` is loaded by DALI, not imported by Python, so its name carries no ABI tag."""
        if name.rpartition(".")[2] == "_dali":
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No PyInit symbol is forced: _dali.so has none."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        """Compiles the CUDA part, when there is a compiler for it, and hands its objects to the ordinary build."""
        cuda = SOURCES[ext.name.rpartition(".")[2]]["cuda"]
        if NVCC and cuda:
            ext.define_macros.append(("FACEFAST_WITH_CUDA", "1"))
            ext.extra_objects += [self.compile_cuda(ext, source) for source in cuda]
            ext.extra_link_args += cudart()
        super().build_extension(ext)

    def compile_cuda(self, ext: Extension, source: str) -> str:
        """One `.cu` to an object file; what ptxas says of registers and spills goes to build/ptxas for the tests."""
        target = Path(self.build_temp) / f"{source}.o"
        inputs = [ROOT / source, *(ROOT / source).parent.glob("*.h"), *(ROOT / source).parent.glob("*.cuh")]
        if target.exists() and not self.force and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        includes = [f"-I{folder}" for folder in [NVCC.parents[1] / "include", *ext.include_dirs, CU13 / "include"]]
        flags = ["-O3", "-std=c++20", "--compiler-options=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
        flags += ["-Xptxas=-v,-warn-spills", "--threads=0"]
        command = [NVCC, "-c", ROOT / source, "-o", target, *flags, *codes, *macros, *includes]
        print("nvcc", source, *codes, flush=True)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}nvcc failed on {source}")
        report = ROOT / "build" / "ptxas" / f"{Path(source).stem}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(done.stderr + done.stdout)
        return str(target)


def scan() -> Extension:
    import pybind11

    return Extension(
        "facefast._scan",
        SOURCES["_scan"]["cpu"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*CXX_FLAGS, "-std=c++17"],
        extra_link_args=["-pthread"],
    )


def dali() -> Extension:
    import nvidia.dali
    from nvidia.dali import sysconfig as dali_config

    folder = Path(nvidia.dali.__file__).parent
    return Extension(
        "facefast._dali",
        SOURCES["_dali"]["cpu"],
        include_dirs=[dali_config.get_include_dir(), str(CU13 / "include")],
        define_macros=[("FACEFAST_DALI_VERSION", f'"{nvidia.dali.__version__}"')],
        library_dirs=[str(folder)],
        libraries=["dali"],
        extra_compile_args=[*CXX_FLAGS, "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1"],
    )


def loss() -> Extension:
    return CppExtension(
        "facefast._C",
        SOURCES["_C"]["cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, "-std=c++20", "-fopenmp-simd"],
    )


print(f"facefast: CUDA kernels {'with ' + str(NVCC) if NVCC else 'left out (no nvcc, or FACEFAST_CUDA=0)'}")
setup(
    ext_modules=[scan(), dali(), loss()],
    cmdclass={"build_ext": Build.with_options(use_ninja=False)},
    options={"build_ext": {"parallel": max(1, min(3, len(os.sched_getaffinity(0))))}},
)
