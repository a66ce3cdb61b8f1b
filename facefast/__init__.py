"""facefast: photographs of people in, a fine-tuned and verified face-recognition model out.

`facefast.load` opens a trained model; everything else starts at `facefast.train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from facefast.deploy.photographs import load
else:
    # Hidden from the type checker: a module with `__getattr__` passes every misspelt import from the package.
    def __getattr__(name: str) -> Any:
        """`facefast.load`, imported when it is first asked for: `import facefast` alone stays quick."""
        if name == "load":
            from facefast.deploy.photographs import load

            return load
        raise AttributeError(f"module 'facefast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names the module holds, `load` too before it is imported."""
    return sorted({*globals(), *__all__})
