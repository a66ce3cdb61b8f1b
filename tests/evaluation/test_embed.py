"""Photographs to embeddings: row by row, at any batch size and on any number of ranks, and only what could be read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from facefast.data import FaceIndex, oracle, read_index
from facefast.data.corrections import Correction, write_corrections
from facefast.evaluation.embed import PART, Mirror, embed_photographs, embed_rows, encoded, single
from facefast.models.precision import Precision
from facefast.recipe import Photographs, Reading
from facefast.runtime import process
from facefast.runtime.exits import DataError
from tests.support import small
from tests.support.ranks import run_ranks

RUN = process.Runtime(process.World(), torch.device("cpu"))
FP32 = Precision.choose("fp32", "mobilefacenet", True, RUN.device)
EVERYTHING = Reading(threads=1, max_bad_fraction=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.photographs(tmp_path_factory.mktemp("data") / "people")


@pytest.fixture(scope="module")
def index(root: Path) -> FaceIndex:
    index = read_index(root, "folder").scanned()
    assert not index.faults.any()  # all headers are sound
    return index


@pytest.mark.parametrize("mirror", ["none", "mean"])
def test_embeddings_are_the_models_in_the_indexs_order(index: FaceIndex, mirror: Mirror) -> None:
    model = small.make_model(classes=small.PEOPLE)
    embeddings, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=4, mirror=mirror)
    assert seen.tolist() == [row != small.BROKEN for row in range(9)]
    rows = np.flatnonzero(seen.numpy())
    pictures = np.stack([oracle.decode(index.path(int(row))) for row in rows])
    expected = model.embed(torch.from_numpy(pictures).permute(0, 3, 1, 2), mirror=mirror == "mean")
    torch.testing.assert_close(torch.nn.functional.normalize(embeddings[rows]), expected, rtol=0, atol=2e-3)


def test_lengths_are_kept_and_the_mirror_image_counts_half(index: FaceIndex) -> None:
    """Class-mean heads need the usual length of an embedding: it must be that of one picture, not of two."""
    model = small.make_model()
    one, _ = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9, mirror="none")
    both, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    images = torch.stack([oracle.render(index, np.array([row]), model.image)[0] for row in (0, 8)])
    with torch.no_grad():
        plain, mirrored = model.encode(images), model.encode(images.flip(3))
    torch.testing.assert_close(one[[0, 8]], plain, rtol=0, atol=2e-2)
    torch.testing.assert_close(both[[0, 8]], (plain + mirrored) / 2, rtol=0, atol=2e-2)
    joined, _ = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9, mirror="joined")
    torch.testing.assert_close(joined[[0, 8]], torch.cat([plain, mirrored], 1), rtol=0, atol=2e-2)
    assert single(both, model.embedding_size) is both
    torch.testing.assert_close(single(joined, model.embedding_size), both)
    assert float(one[seen].norm(dim=1).std()) > 1e-3


def test_a_processor_takes_a_batch_in_parts_that_its_caches_hold() -> None:
    model, passes = small.make_model(), list[int]()
    images = torch.randn(PART * torch.get_num_threads() * 2 + 3, 3, *model.image.shape)
    with torch.no_grad():
        whole = model.encode(images)
        model.backbone.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
        torch.testing.assert_close(encoded(model, images), whole, rtol=1e-4, atol=1e-5)
    part = PART * torch.get_num_threads()
    assert passes == [part, part, part]  # a shorter one would round otherwise


@pytest.mark.parametrize("batch_size", [1, 2, 8, 9, 1000])
def test_the_batch_size_changes_nothing(index: FaceIndex, batch_size: int) -> None:
    model = small.make_model()
    expected, readable = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    found, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=batch_size)
    assert torch.equal(seen, readable)
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_is_asked_as_a_finished_one(index: FaceIndex) -> None:
    model = small.make_model()
    expected, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = embed_rows(model.train(), index, RUN, FP32, EVERYTHING, batch_size=9)
    assert torch.equal(found[seen], expected[seen])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # BatchNorm's too


def test_the_result_belongs_to_the_caller(index: FaceIndex) -> None:
    found, seen = embed_rows(small.make_model(), index, RUN, FP32, EVERYTHING, batch_size=9)
    assert not found.is_inference() and not found.requires_grad
    assert (found.device.type, found.dtype, seen.dtype) == ("cpu", torch.float32, torch.bool)
    found[~seen] = torch.nan  # as a cache of features marks them
    (found.requires_grad_() * 2).nan_to_num().sum().backward()


def test_rows_that_the_scan_found_bad_are_not_asked_for(index: FaceIndex) -> None:
    faults = index.faults.copy()
    faults[[0, 3]] = 1
    _, seen = embed_rows(
        small.make_model(), dataclasses.replace(index, faults=faults), RUN, FP32, EVERYTHING, batch_size=4
    )
    assert [row for row in range(9) if not seen[row]] == [0, 3, small.BROKEN]


def test_an_index_of_which_nothing_can_be_read_has_no_embedding(index: FaceIndex) -> None:
    found, seen = embed_rows(small.make_model(), index.select([small.BROKEN]), RUN, FP32, EVERYTHING, batch_size=4)
    assert found.shape == (1, 16) and not seen.any() and not found.any()


def test_more_unreadable_pictures_than_allowed_stop_it(index: FaceIndex) -> None:
    with pytest.raises(DataError, match="bo_0002"):
        embed_rows(small.make_model(), index, RUN, FP32, Reading(threads=1, max_bad_fraction=0.0), batch_size=4)


def embed_on_a_rank(rank: int, root: str, out: str) -> int:
    """One of several processes; each writes down what it got."""
    with process.start("cpu") as run:
        index = read_index(root, "folder").scanned()
        found, seen = embed_rows(small.make_model(), index, run, FP32, EVERYTHING, batch_size=2)
        np.savez(Path(out) / f"{rank}.npz", found=found.numpy(), seen=seen.numpy())
        one, _ = embed_rows(small.make_model(), index.select([8]), run, FP32, EVERYTHING, batch_size=2)
        torch.testing.assert_close(one[0], found[8], rtol=1e-4, atol=1e-5)  # fewer rows than ranks
    return 0


def test_every_rank_gets_every_row(root: Path, index: FaceIndex, tmp_path: Path) -> None:
    assert run_ranks(embed_on_a_rank, 2, str(root), str(tmp_path)) == [0, 0]  # nine rows: the last batch is padded
    expected, readable = embed_rows(small.make_model(), index, RUN, FP32, EVERYTHING, batch_size=4)
    for rank in (0, 1):
        with np.load(tmp_path / f"{rank}.npz") as stored:
            np.testing.assert_array_equal(stored["seen"], readable.numpy())
            np.testing.assert_allclose(
                stored["found"][stored["seen"]], expected[readable].numpy(), rtol=1e-4, atol=1e-5
            )


# Photographs that a command names.


@pytest.fixture(scope="module")
def run_folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(template="none"), root)


def test_a_commands_photographs_come_with_their_embeddings_and_without_what_cannot_be_read(
    run_folder: Path, root: Path, index: FaceIndex
) -> None:
    data = Photographs(root=str(root), format="folder", max_bad_fraction=0.2)
    found, embeddings = embed_photographs(run_folder, data, RUN, 4)
    names = [found.name(row) for row in range(len(found))]
    assert names == [index.name(row) for row in range(9) if row != small.BROKEN]
    assert found.class_names == small.PEOPLE and found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert found.widths.tolist() == [small.SIZE] * 8  # scanned
    model = small.make_model(template="none")
    expected, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=4)
    np.testing.assert_allclose(embeddings, expected[seen].numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_known_of_the_photographs_is_heeded(run_folder: Path, root: Path, tmp_path: Path) -> None:
    lines = [Correction("wrong_label", "cy/cy_0003.png", "cy", "ann", "relabel")]
    lines += [Correction("wrong_label", "ann/ann_0001.png", "ann", "", "drop")]
    write_corrections(tmp_path / "suspects.csv", lines)
    data = Photographs(root=str(root), corrections=str(tmp_path / "suspects.csv"), max_bad_fraction=0.2)
    found, embeddings = embed_photographs(run_folder, data, RUN, 4)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert len(embeddings) == 7


@pytest.mark.parametrize("batch_size", [4, 64])
def test_photographs_of_which_none_can_be_embedded_are_refused(
    run_folder: Path, root: Path, tmp_path: Path, batch_size: int
) -> None:
    (tmp_path / "bo").mkdir()
    shutil.copy(root / "bo" / "bo_0002.png", tmp_path / "bo" / "1.png")
    data = Photographs(root=str(tmp_path), max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="none of 1 pictures in .* could be embedded"):
        embed_photographs(run_folder, data, RUN, batch_size)


def test_photographs_must_be_named_and_sound(run_folder: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photographs were named; give --data.root DIR"):
        embed_photographs(run_folder, Photographs(), RUN, 4)
    shutil.copytree(root, tmp_path / "people")
    (tmp_path / "people" / "ann" / "page.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"1 of 10 files are bad, above data.max_bad_fraction 0.05:\n.*page.jpg: not a"):
        embed_photographs(run_folder, Photographs(root=str(tmp_path / "people"), max_bad_fraction=0.05), RUN, 4)
