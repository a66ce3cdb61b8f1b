"""Work on photographs that rank 0 shares out among all ranks: what one alone reads for hours, many read at once."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime

P = TypeVar("P")
R = TypeVar("R")


class Crew:
    """All ranks of a run, or this process alone.

    Rank 0 does what there is to do, and asks the others with `each` where work can be divided; they `serve` meanwhile.

    Args:
        run: the ranks; None is this process.
    """

    def __init__(self, run: Runtime | None = None) -> None:
        self._run = run
        self.size = run.world.size if run is not None and run.control is not None else 1

    def each(self, work: Callable[[P], R], pieces: Sequence[P], here: Callable[[P], R] | None = None) -> list[R]:
        """What `work` makes of each piece, in their order: it does not depend on how many ranks share them.

        Warnings come in that order too, and so does the first error, whoever met it.

        Args:
            work: a function of a module, which the other ranks import.
            here: the same as this process does it, where it shows how far it is.
        """
        if self.size == 1:
            return [(here or work)(piece) for piece in pieces]
        assert self._run is not None
        self._run.broadcast(work)
        done = _share(self._run, here or work, [list(pieces[rank :: self.size]) for rank in range(self.size)])
        assert done is not None
        results: list[R] = []
        for number in range(len(pieces)):
            said, result = done[number % self.size][number // self.size]
            for text in said:
                warnings.warn(text, stacklevel=2)
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def serve(self) -> None:
        """The part of every other rank: does its share of what rank 0 asks for, until that calls `dismiss`."""
        # To look for faces may take longer than a collective operation waits: rank 0 broadcasts None while it is busy.
        assert self._run is not None
        while (work := self._run.broadcast(None)) is not True:
            if work is not None:
                _share(self._run, work, None)

    def dismiss(self) -> None:
        """Ends `serve` on the other ranks."""
        if self._run is not None:
            self._run.broadcast(True)


def _share(run: Runtime, work: Callable[[Any], Any], pieces: list[list[Any]] | None) -> list[list[Any]] | None:
    """Scatters rank 0's pieces, works on this rank's, and gathers (warnings, result or error) of each on rank 0."""
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, pieces, src=0, group=run.control)
    found = [_done(work, piece) for piece in mine[0]]
    gathered: list[Any] | None = [None] * run.world.size if run.is_main else None
    dist.gather_object(found, gathered, dst=0, group=run.control)
    return gathered


def _done(work: Callable[[Any], Any], piece: Any) -> tuple[list[str], Any]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = work(piece)
        except Exception as error:
            result = error
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # one that another process cannot have
                result = DataError(f"{type(error).__name__}: {error}")
    return [str(warning.message) for warning in said], result
