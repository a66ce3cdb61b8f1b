"""Copies of a GPU's tensors are of the moment that they were asked for, though updates go on at once, and also where
the GPU has no room for a second set.

The same test holds a stand-in for the GPU's streams, and a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from facefast.models.spread import Spread
from facefast.training.staged import Staged
from tests.training.test_graphs import MOVING, graphs_on, run


class Stream:
    """A queue of work that is done late, as late as somebody waits for it."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.work: list[Callable[[], object]] = []
        self.waited: list[Stream] = []

    def add(self, work: Callable[[], object]) -> None:
        if self.late:
            self.work.append(work)
        else:
            work()

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Event:
    """What waits for all work of a stream."""

    def record(self, stream: Stream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        while self._stream.work:
            self._stream.work.pop(0)()


class Gpu:
    """Streams and memory as `Staged` uses them. Updates are the current stream's, in order: what is queued there comes
    before them. What another stream has to do comes after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.side = Stream(late=False), Stream(late=True)
        self.active, self.room_left = self.current, True
        self.clones: list[weakref.ref[Tensor]] = []
        self.used_on: list[tuple[int, Stream]] = []
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "Event", Event)

        def pinned(*shape: Any, pin_memory: bool = False, **how: Any) -> Tensor:
            made = empty(*shape, **how)
            return pinned_on(self, made) if pin_memory else made

        monkeypatch.setattr(torch, "empty", pinned)

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream
        yield
        self.active = before


class Lies(Tensor):
    """A tensor in the stand-in's memory."""

    gpu: Gpu
    is_cuda = True

    def detach(self) -> Lies:
        return lies_on(self.gpu, super().detach())

    def clone(self, **how: Any) -> Lies:
        if not self.gpu.room_left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made = lies_on(self.gpu, super().clone(**how))
        self.gpu.clones.append(weakref.ref(made))
        return made

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.gpu.used_on.append((self.data_ptr(), stream))


class Pinned(Tensor):
    """A tensor that a copy reaches when its stream comes to it."""

    gpu: Gpu

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Pinned:
        assert non_blocking
        self.gpu.active.add(lambda: Tensor.copy_(self.as_subclass(Tensor), other.as_subclass(Tensor)))
        return self


def lies_on(gpu: Gpu, tensor: Tensor) -> Lies:
    found = tensor.as_subclass(Lies)
    found.gpu = gpu
    return found


def pinned_on(gpu: Gpu, tensor: Tensor) -> Pinned:
    found = tensor.as_subclass(Pinned)
    found.gpu = gpu
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.mark.parametrize("room", [True, False])
def test_copies_are_of_the_moment_though_updates_go_on_at_once(gpu: Gpu, room: bool) -> None:
    gpu.room_left = room
    weights = [torch.randn(3, 4), torch.arange(5)]
    lying, here = [lies_on(gpu, tensor) for tensor in weights], torch.tensor(7.0)
    expected = [tensor.clone() for tensor in (*weights, here)]
    staged = Staged()
    for _ in range(2):  # the second time into the same room
        for tensor, value in zip((*weights, here), expected, strict=True):
            tensor.copy_(value)
        arrived = staged.take({"model": {"one": lying[0], "two": lying[1]}, "optimizer": {"step": here}})
        for tensor in (*weights, here):  # the next update
            tensor.add_(1)
        found = arrived()
        named = [found["model"]["one"], found["model"]["two"], found["optimizer"]["step"]]
        for one, value in zip(named, expected, strict=True):
            assert torch.equal(cast(Tensor, one).as_subclass(Tensor), value)
    if room:
        assert gpu.side.waited == [gpu.current] * 2  # what came before is in the copies
        assert len(gpu.clones) == 4 and all(clone() is None for clone in gpu.clones)  # the memory is wanted
        assert {stream for _, stream in gpu.used_on} == {gpu.side}
    else:
        assert gpu.clones == [] and gpu.side.waited == [] and gpu.side.work == []


def test_a_gpu_that_fills_up_between_two_copies_takes_them_all_in_line(gpu: Gpu) -> None:
    weights = [torch.randn(2), torch.randn(3)]
    lying = [lies_on(gpu, tensor) for tensor in weights]

    class Last(Lies):
        def clone(self, **how: Any) -> Lies:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def detach(self) -> Lies:
            return self

    last = weights[1].as_subclass(Last)
    last.gpu = gpu
    expected = [tensor.clone() for tensor in weights]
    arrived = Staged().take({"model": {"one": lying[0], "two": last}})
    for tensor in weights:
        tensor.zero_()
    found = arrived()["model"]
    for one, value in zip(found.values(), expected, strict=True):
        assert torch.equal(cast(Tensor, one).as_subclass(Tensor), value)
    assert len(gpu.clones) == 1 and gpu.clones[0]() is None and gpu.side.work == []


def test_copies_are_of_the_moment_and_in_the_order_of_files() -> None:
    one = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    spread = Spread(torch.randn(3, 2), 3)
    room = Staged()
    staged = room.take({"model": {"one": one, "head": spread}, "optimizer": {"step": torch.tensor(7.0)}})
    expected = one.clone()
    one.zero_()
    found = staged()
    assert isinstance(found["model"]["one"], torch.Tensor) and found["model"]["one"].is_contiguous()
    torch.testing.assert_close(found["model"]["one"], expected, rtol=0, atol=0)
    head = found["model"]["head"]
    assert isinstance(head, Spread) and head.rows == 3 and head.block is not spread.block
    assert found["optimizer"]["step"] == 7 and list(found) == ["model", "optimizer"]

    again = room.take({"ema": {"other": expected + 1}, "model": {"head": spread, "step": torch.tensor(8.0)}})()
    other = again["ema"]["other"]
    assert isinstance(other, torch.Tensor) and torch.equal(other, expected + 1)
    assert other.data_ptr() == found["model"]["one"].data_ptr()  # in the same room
    larger = room.take({"model": {"one": torch.ones(9)}})()["model"]["one"]
    assert isinstance(larger, torch.Tensor) and torch.equal(larger, torch.ones(9))


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_the_moment_and_the_host_waits_for_nothing() -> None:
    """What is queued after them writes over the tensors while they travel."""
    generator = torch.Generator("cuda").manual_seed(1)
    large = torch.randn(64, 1 << 20, device="cuda", generator=generator)
    count, expected, room = torch.tensor(7.0), large.cpu(), Staged()
    room.take({"model": {"large": large, "count": count}})()  # makes the room, which the host waits for
    torch.cuda.set_sync_debug_mode("error")
    try:
        staged = room.take({"model": {"large": large, "count": count}})
        large.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    count.zero_()
    found = staged()["model"]
    assert isinstance(found["large"], torch.Tensor) and not found["large"].is_cuda
    assert torch.equal(found["large"], expected) and found["count"] == 7
    assert not large.any()


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False])
def test_copies_from_a_gpu_are_of_the_moment_though_recorded_updates_go_on_at_once(
    monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    state, watched = graphs_on("cuda").recorded(MOVING)
    run(state, range(5))
    assert watched.replayed
    for first in (5, 11):  # the second time into the same room
        tensors = state.tensors()
        expected = {
            file: {name: cast(Tensor, tensor).detach().cpu().clone() for name, tensor in named.items()}
            for file, named in tensors.items()
        }
        # Work that the GPU has still to do when the copies are asked for, and that they are to hold.
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 64
        weight = cast(Tensor, tensors["model"]["head.weight"])
        with torch.no_grad():
            weight += busy[0, 0].nan_to_num(0, 0, 0) * 0 + 1
        expected["model"]["head.weight"] += 1
        with monkeypatch.context() as patch:
            if not room:
                patch.setattr(Tensor, "clone", _full)
            arrived = state.staged.take(tensors)
        run(state, range(first, first + 6))
        found = arrived()
        for file, named in expected.items():
            for name, value in named.items():
                copy = cast(Tensor, found[file][name])
                assert copy.is_pinned() or not cast(Tensor, tensors[file][name]).is_cuda, name
                torch.testing.assert_close(copy, value, rtol=0, atol=0, msg=f"{file} {name}")
        assert not torch.equal(weight.cpu(), cast(Tensor, found["model"]["head.weight"]))


def _full(tensor: Tensor, **how: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")
