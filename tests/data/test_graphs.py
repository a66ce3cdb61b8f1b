"""Graphs that stay open: the next loader takes over what the last one left, and gets its own pictures from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as nvdali
import pytest
import torch

from facefast.data import dali, graphs
from facefast.data.graphs import kept_open
from facefast.data.index import FaceIndex
from facefast.data.loader import Batch, make_loader
from facefast.data.together import Source
from facefast.recipe import ImageSpec
from tests.support.pictures import encode, garbled_png, make_index, smooth_picture

IMAGE = ImageSpec(24)
NUMBER = 20


@pytest.fixture
def index(tmp_path: Path) -> FaceIndex:
    names = [f"{i:03}.jpg" for i in range(NUMBER)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(smooth_picture(40, 48, i)))
    return make_index(tmp_path, names, (48, 40))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dali.Pipeline]:
    """Every graph that was built, in this order."""
    found: list[dali.Pipeline] = []

    def counted(*arguments: Any, **options: Any) -> dali.Pipeline:
        found.append(dali.build_pipeline(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(graphs, "build_pipeline", counted)
    return found


def shut(pipeline: dali.Pipeline) -> bool:
    return pipeline._graph is None


def all_of(index: FaceIndex, batch_size: int = 8, **options: Any) -> list[Batch]:
    with make_loader(index, IMAGE, batch_size=batch_size, threads=1, **options) as loader:
        return list(loader)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_loaders_one_after_the_other_share_a_graph_at_any_batch_size(
    index: FaceIndex, built: list[dali.Pipeline]
) -> None:
    sizes = (8, 3, 20, 1)
    expected = [all_of(index, size) for size in sizes]
    assert len(built) == len(sizes) and all(map(shut, built))
    built.clear()
    with kept_open():
        for size, theirs in zip(sizes, expected, strict=True):
            assert_same(all_of(index, size), theirs)
        assert len(built) == 1 and not shut(built[0])
    assert shut(built[0])


def test_loaders_beside_each_other_have_a_graph_each_and_both_are_kept(
    index: FaceIndex, built: list[dali.Pipeline]
) -> None:
    expected = all_of(index, 4)
    built.clear()
    with kept_open():
        with make_loader(index, IMAGE, batch_size=4, threads=1) as training:
            batches = training.stream(0, 0, until=(1, 0))
            ours = [next(batches)[2] for _ in range(2)]
            for _ in range(3):
                assert_same(all_of(index, 4), expected)  # measured in the middle
            ours += [batch for *_, batch in batches]
        assert_same(ours, expected)
        assert_same(all_of(index, 4), expected)
        assert len(built) == 2 and not any(map(shut, built))
    assert all(map(shut, built))


def test_a_loader_left_anywhere_leaves_a_graph_that_holds_nothing_of_it(
    index: FaceIndex, built: list[dali.Pipeline]
) -> None:
    expected = all_of(index, 4)
    built.clear()
    with kept_open():
        for left_after in range(6):
            with make_loader(index.select(np.arange(NUMBER)[::-1]), IMAGE, batch_size=4, threads=1) as loader:
                batches = iter(loader)
                for _ in range(min(left_after, 5)):
                    next(batches)
            assert_same(all_of(index, 4), expected)
        assert len(built) == 1


def test_another_kind_of_batch_has_a_graph_of_its_own(index: FaceIndex, built: list[dali.Pipeline]) -> None:
    with kept_open():
        for options in ({}, {"dtype": torch.bfloat16}, {"channels_last": False}, {}, {"dtype": torch.bfloat16}):
            expected = options.get("dtype", torch.float32)
            assert all_of(index, **options)[0].images.dtype == expected
        assert len(built) == 3


def test_a_graph_that_a_picture_broke_is_shut_and_not_lent_again(
    index: FaceIndex, built: list[dali.Pipeline], capfd: pytest.CaptureFixture[str]
) -> None:
    Path(index.path(5)).write_bytes(garbled_png())
    expected = all_of(index)
    built.clear()
    with kept_open():
        for _ in range(3):
            assert_same(all_of(index), expected)
        with make_loader(index, IMAGE, batch_size=2, threads=1) as loader:
            next(iter(loader))  # the broken one is under way
        assert_same(all_of(index, 8), expected)
        assert any(map(shut, built))
    assert all(map(shut, built))
    capfd.readouterr()


def test_a_loader_that_is_left_by_an_error_leaves_no_graph(index: FaceIndex, built: list[dali.Pipeline]) -> None:
    with kept_open():
        with pytest.raises(KeyboardInterrupt), make_loader(index, IMAGE, batch_size=4, threads=1) as loader:
            next(iter(loader))
            raise KeyboardInterrupt
        assert len(built) == 1 and shut(built[0])
        all_of(index)
        assert len(built) == 2


def test_kept_open_within_kept_open_ends_with_the_outer_one(index: FaceIndex, built: list[dali.Pipeline]) -> None:
    with kept_open():
        with kept_open():
            all_of(index)
        all_of(index)
        assert len(built) == 1 and not shut(built[0])
    all_of(index)
    assert len(built) == 2 and all(map(shut, built))


def test_an_error_within_shuts_what_is_kept(index: FaceIndex, built: list[dali.Pipeline]) -> None:
    with pytest.raises(KeyError), kept_open():
        all_of(index)
        raise KeyError
    assert len(built) == 1 and shut(built[0])


# Graphs for a GPU, as they are written down: DALI makes no such graph run without one, but it checks every argument.


def written(decoding: Any, hw_decoder_load: float = 0.37, source: Source | None = None) -> nvdali.Pipeline:
    dali.load_plugin()
    return dali.define(
        (24, 32),
        source or graphs._nothing,
        batch_size=4,
        device_id=None,
        decoding=decoding,
        hw_decoder_load=hw_decoder_load,
        dtype=torch.bfloat16,
        channels_last=True,
        threads=2,
        prefetch=2,
    )


@pytest.mark.parametrize(
    ("decoding", "decoder", "device", "outside"),
    [
        ("gpu", b"decoders__Image", b"mixed", b"decoders__ImageSlice"),
        ("regions", b"decoders__ImageSlice", b"mixed", b""),
        ("cpu", b"decoders__ImageSlice", b"cpu", b"mixed"),
    ],
)
def test_a_gpus_pictures_are_decoded_where_it_is_asked_for_and_augmented_on_the_gpu(
    decoding: str, decoder: bytes, device: bytes, outside: bytes
) -> None:
    text = written(decoding).serialize()
    assert decoder in text and device in text and not (outside and outside in text)
    assert (b"jpeg_fancy_upsampling" in text) == (b"hw_decoder_load" in text) == (device == b"mixed")
    assert b"gpu" in text


def test_on_the_cpu_no_graph_names_a_gpu() -> None:
    text = written(None).serialize()
    assert b"mixed" not in text and b"gpu" not in text and b"hw_decoder_load" not in text
