"""Copies of a training's tensors, of one moment, for what writes them while training goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from facefast.models.spread import Named, Spread, here


class Staged:
    """Copies of tensors in the host's memory, in room that is kept from one time to the next: to ask the system for it
    takes longer than the copy.

    From a GPU they travel on a stream of their own, beside the next updates; the host does not wait.
    """

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None
        self._kept: list[Tensor] = []
        self._kinds: list[tuple[torch.Size, torch.dtype, bool]] = []
        self._room: list[Tensor] = []

    def take(self, tensors: Named) -> Callable[[], Named]:
        """Copies tensors as they are now, in the device's order of work.

        Returns:
            What waits for the copies and gives them, by file and name; they are good until the next are taken.
        """
        flat = [here(tensor).detach() for named in tensors.values() for tensor in named.values()]
        kinds = [(tensor.shape, tensor.dtype, tensor.is_cuda) for tensor in flat]
        if kinds != self._kinds:
            self._room = []  # before there is more of it
            self._room = [torch.empty(shape, dtype=dtype, pin_memory=cuda) for shape, dtype, cuda in kinds]
            self._kinds = kinds
        pairs = list(zip(flat, self._room, strict=True))
        if on_gpu := [(tensor, to) for tensor, to in pairs if tensor.is_cuda]:
            self._from_gpu([tensor for tensor, _ in on_gpu], [to for _, to in on_gpu])
        for tensor, to in pairs:
            if not tensor.is_cuda:
                to.copy_(tensor)
        copies = iter(self._room)
        named_copies = {
            file: {
                name: Spread(next(copies), tensor.rows) if isinstance(tensor, Spread) else next(copies)
                for name, tensor in named.items()
            }
            for file, named in tensors.items()
        }

        def arrived() -> Named:
            if self._done is not None:
                self._done.synchronize()
                self._kept = []  # the device's memory is wanted
            return named_copies

        return arrived

    def _from_gpu(self, tensors: list[Tensor], room: list[Tensor]) -> None:
        stream = torch.cuda.current_stream(tensors[0].device)
        try:
            # The next update changes weights in place: what travels beside it is a copy, made in a thousandth of the
            # time that the way to the host takes.
            tensors = [tensor.clone() for tensor in tensors]
            side = torch.cuda.Stream(tensors[0].device)
            side.wait_stream(stream)
            self._kept, stream = tensors, side
        except torch.OutOfMemoryError:  # in line, before the next update
            pass
        with torch.cuda.stream(stream):
            for to, tensor in zip(room, tensors, strict=True):
                to.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
        self._done = torch.cuda.Event()
        self._done.record(stream)
