"""How a run is launched on a cluster, and what a cluster gets wrong."""

from __future__ import annotations


def split(arguments: list[str], scheduler: str) -> tuple[list[str], list[str]]:
    """Words of `facefast submit SCHEDULER` before and behind --: the scheduler's, and those of `facefast train`.

    Raises:
        ValueError: there is no --.
    """
    if "--" in arguments:
        cut = arguments.index("--")
        return arguments[:cut], arguments[cut + 1 :]
    if {"-h", "--help"} & set(arguments):
        return arguments, []
    raise ValueError(f"the words of facefast train stand behind a -- of their own: submit {scheduler} ... -- --out RUN")
