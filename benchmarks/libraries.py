"""Libraries that are measured beside ours where they are importable, and said not to have run where they are not."""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = {
    "liger": "liger_kernel.transformers.functional",
    "quack": "quack",
    "quack linear": "quack.linear_cross_entropy",
    "apex": "apex.contrib.xentropy",
    "FFCV": "ffcv",
}


def library(name: str) -> ModuleType | None:
    """A library's module, by a name of `MODULES`; None where it cannot be imported, for whatever reason."""
    try:
        return importlib.import_module(MODULES[name])
    except Exception:  # a library without the driver or the compiler that it wants fails in ways of its own
        return None


def missing(*names: str) -> list[str]:
    """Those of the libraries that are not importable."""
    return [name for name in names if library(name) is None]
