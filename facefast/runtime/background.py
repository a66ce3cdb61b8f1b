"""Work beside the main thread: one task at a time, whose error every rank ends with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from facefast.runtime.process import Runtime


class Background:
    """One task at a time in a thread of this process.

    Leaving the context waits for it, so that nothing is written after what the main thread writes last; its error is
    then one too many, for another one is on its way, or `settle` has raised it.
    """

    def __init__(self, run: Runtime) -> None:
        self._run = run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the task has ended with an error that nobody was told yet; never waits."""
        return self._error is not None

    def begin(self, task: Callable[[], object]) -> None:
        """Starts a task; the one before must be settled."""
        assert self._thread is None and self._error is None, "the task before is not settled"

        def work() -> None:
            try:
                task()
            except BaseException as error:  # raised again where it is waited for
                self._error = error

        # No daemon: a process that ends lets it finish.
        self._thread = threading.Thread(target=work, name="facefast_background")
        self._thread.start()

    def settle(self) -> None:
        """Waits for the task; every rank must enter, also those that have none.

        Raises:
            StorageError, ValueError: what it could not do, on every rank.
        """
        with self._run.together():
            self._wait()
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._wait()
