"""The words of `facefast submit SCHEDULER ... -- ...`: the scheduler's, and those of `facefast train`."""

from __future__ import annotations

from pathlib import Path

from facefast.recipe import Recipe, flags


def split(arguments: list[str], scheduler: str) -> tuple[list[str], list[str]]:
    """Words before and behind --.

    Raises:
        ValueError: there is no --.
    """
    if "--" in arguments:
        cut = arguments.index("--")
        return arguments[:cut], arguments[cut + 1 :]
    if set(flags.HELP) & set(arguments):
        return arguments, []
    raise ValueError(f"the words of facefast train stand behind a -- of their own: submit {scheduler} ... -- --out RUN")


def read_train(train: list[str]) -> tuple[Recipe, Path, str]:
    """Recipe, run folder and --resume of train's words, as `facefast train` reads them.

    Raises:
        ValueError: train would refuse them, they ask for help, or no command line can hold them.
    """
    if {*flags.HELP, flags.HELP_ALL} & set(train):
        raise ValueError("facefast train --help tells of the words behind --")
    for word in train:
        if "\0" in word:
            raise ValueError(f"{word!r} holds a zero byte, which no command line can")
    return flags.train_arguments(train)
