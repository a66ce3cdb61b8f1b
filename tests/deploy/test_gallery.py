"""The gallery: exact search, refusals, deletion that leaves no number behind, files of others and damaged ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from facefast.deploy import gallery, gallery_file
from facefast.deploy.gallery import Gallery, Offer
from facefast.evaluation.openset import Join
from facefast.evaluation.thresholds import NamingThreshold, PairThreshold, Thresholds
from facefast.runtime.exits import DataError, StorageError
from tests.support import small

WIDTH = 32


def crowd(people: int, pictures: int, noise: float = 0.8, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Embeddings [N, D] and names, of people in turn."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, WIDTH, generator=generator)
    numbers = torch.arange(people * pictures) % people
    noisy = centres[numbers] + noise * torch.randn(len(numbers), WIDTH, generator=generator)
    return noisy, [f"person {k:03d}" for k in numbers.tolist()]


def hashes_of(rows: int, first: int = 1) -> NDArray[np.uint64]:
    return np.arange(2 * first, 2 * (first + rows), dtype=np.uint64).reshape(rows, 2)


def offer(embeddings: Tensor, names: list[str], first: int = 1, faults: tuple[str, ...] = ()) -> Offer:
    return Offer(names, embeddings, hashes_of(len(names), first), faults)


@pytest.fixture
def enrolled(tmp_path: Path) -> Path:
    path = tmp_path / "our people"
    embeddings, names = crowd(20, 5)
    gallery.enroll(path, offer(embeddings, names), "model a")
    return path


def naive(stored: Gallery, queries: Tensor, k: int, join: Join) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """By all scores of all people, one by one."""
    asked = F.normalize(queries, dim=1).double().numpy()
    scores = np.zeros((len(asked), len(stored.names)))
    for who in range(len(stored.names)):
        own = stored.embeddings[stored.people == who].astype(np.float64)
        mean = own.sum(0) / np.linalg.norm(own.sum(0))
        scores[:, who] = (asked @ own.T).max(1) if join == "max" else asked @ mean
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("join", get_args(Join))
@pytest.mark.parametrize("numbers", get_args(gallery.Numbers))
@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_a_search_finds_what_comparing_with_everybody_finds(
    join: Join, numbers: gallery.Numbers, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_file, "BLOCK", block)
    monkeypatch.setattr(gallery, "MARGIN", 1)
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(300, WIDTH, generator=generator)
    # From one picture to half of all: people are cut by no block, however small.
    names = [f"p{int(k)}" for k in torch.randint(0, 40, (300,), generator=generator)]
    names[100:250] = ["many"] * 150
    stored, refused = gallery.enroll(tmp_path / "g", offer(embeddings, names), "m", numbers=numbers)
    assert not refused and len(stored) == 300
    queries = torch.randn(30, WIDTH, generator=generator) + 2 * embeddings[:30]
    for k in (1, 3, 100):
        found = stored.search(queries, k, join)
        people, scores = naive(stored, queries, k, join)
        assert found.scores == pytest.approx(scores, abs=1e-9)
        assert np.array_equal(found.people, people)
        assert (stored.people[found.rows] == found.people).all()
    if join == "max":
        unit_queries = F.normalize(queries, dim=1).double().numpy()
        at_rows = (stored.embeddings[found.rows].astype(np.float64) * unit_queries[:, None]).sum(2)
        assert at_rows == pytest.approx(found.scores, abs=1e-9)


def test_equal_scores_are_answered_in_the_order_of_names(tmp_path: Path) -> None:
    same = torch.eye(WIDTH)[:2]
    stored, _ = gallery.enroll(tmp_path / "g", offer(same, ["zoe", "ann"]), "m")
    found = stored.search(torch.ones(1, WIDTH), 2)
    assert [stored.names[who] for who in found.people[0]] == ["ann", "zoe"]
    assert found.scores[0, 0] == found.scores[0, 1]


def test_a_search_in_which_every_block_is_better_than_the_last_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_file, "BLOCK", 8)
    angles = torch.linspace(1.5, 0.1, 200)
    rising = torch.stack([angles.cos(), angles.sin()], 1)
    names = [f"{k:03d}" for k in range(200)]
    document = {"names": names, "model": "m", "thresholds": {}}
    gallery_file.write(
        tmp_path / "g", np.arange(200, dtype=np.int32), np.zeros((200, 16), np.uint8), document, 2, False,
        lambda begin, end: rising[begin:end].numpy(),
    )  # fmt: skip
    found = Gallery(tmp_path / "g").search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
    assert found.people.tolist() == [[199, 198, 197], [0, 1, 2]]


def test_faiss_is_exact_too_or_says_that_it_is_not_here(enrolled: Path) -> None:
    stored = Gallery(enrolled)
    queries, _ = crowd(20, 2, seed=9)
    with pytest.raises(ValueError, match="not for mean"):
        stored.search(queries, 2, "mean", "faiss")
    try:
        import faiss  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs faiss-cpu"):
            stored.search(queries, 2, "max", "faiss")
        return
    ours, theirs = stored.search(queries, 4), stored.search(queries, 4, "max", "faiss")
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (torch.ones(1, WIDTH + 1), 1, "embeddings of 32 numbers"),
        (torch.ones(WIDTH), 1, "embeddings of 32 numbers"),
        (torch.ones(1, WIDTH), 0, "k 0"),
        (torch.zeros(2, WIDTH), 1, "2 of 2 embeddings are zero or not finite"),
        (torch.full((1, WIDTH), torch.nan), 1, "1 of 1 embeddings are zero or not finite"),
    ],
)
def test_a_search_for_nothing_is_refused(enrolled: Path, queries: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gallery(enrolled).search(queries, k)
    assert Gallery(enrolled).search(torch.zeros(0, WIDTH)).people.shape == (0, 0)


def test_a_gallery_is_a_plain_safetensors_file_of_its_owner_alone(enrolled: Path) -> None:
    with safe_open(enrolled, "np") as file:
        assert set(file.keys()) == {"embeddings", "lengths", "people", "hashes", "document"}
        embeddings, people = file.get_tensor("embeddings"), file.get_tensor("people")
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(100), abs=1e-6)
    assert people.tolist() == sorted(people.tolist())
    assert enrolled.stat().st_mode & 0o777 == 0o600
    enrolled.chmod(0o640)
    gallery.forget(enrolled, ["person 001"])
    assert enrolled.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(enrolled.parent)) == sorted([f".{enrolled.name}.lock", enrolled.name])


def test_people_are_added_to_those_who_are_there(enrolled: Path) -> None:
    more, _ = crowd(2, 4, seed=77)
    new = offer(more, ["anna", "person 003"] * 4, first=1000)
    before = Gallery(enrolled)
    stored, refused = gallery.enroll(enrolled, new, "model a")
    assert not refused
    assert len(before) == 100 and len(stored) == 108  # who has it open sees the old one
    assert stored.names[0] == "anna"
    assert dict(zip(stored.names, stored.counts.tolist(), strict=True))["person 003"] == 9
    for name in ("anna", "person 003", "person 019"):
        own = stored.embeddings[stored.people == stored.names.index(name)]
        expected = [F.normalize(more[k::2], dim=1) for k, who in enumerate(("anna", "person 003")) if who == name]
        if name in before.names:
            expected.insert(0, torch.from_numpy(np.array(before.embeddings[before.people == before.names.index(name)])))
        assert own == pytest.approx(torch.cat(expected).numpy(), abs=1e-6)
        assert stored.lengths[stored.names.index(name)] == pytest.approx(np.linalg.norm(own.sum(0)), rel=1e-5)
        probe = crowd(1, 1, seed=9)[0][0]
        assert stored.template(name) @ probe == pytest.approx(np.mean([probe @ torch.from_numpy(each) for each in own]))


def test_copies_and_bad_pictures_are_refused_with_reasons(enrolled: Path) -> None:
    embeddings, names = crowd(20, 5)
    fresh, _ = crowd(4, 1, seed=5)
    offered = torch.cat([embeddings[:1], embeddings[1:2] * 3 + 0.01, fresh, fresh[:1], fresh[1:2] + 0.01, fresh[3:]])
    codes = np.concatenate([hashes_of(1), hashes_of(8, 500)])
    codes[6] = codes[2]  # the same file as the first fresh one
    codes[8] = 0  # not known: taken for no copy by it
    offered[8] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    faults = ("", "", "", "", "", "the face is 20 pixels high", "", "", "")
    new = Offer(["x", "y", "a", "b", "c", "d", "a", "e", "f"], offered, codes, faults)
    stored, refused = gallery.enroll(enrolled, new, "model a")
    assert [(r.row, r.kind) for r in refused] == [
        (0, "duplicate"), (1, "duplicate"), (5, "quality"), (6, "duplicate"), (7, "duplicate")
    ]  # fmt: skip
    assert refused[0].why == f"already enrolled as a picture of {names[0]}"
    assert refused[1].why.startswith(f"nearly the same as an enrolled picture of {names[1]} (cosine ")
    assert refused[2].why == "the face is 20 pixels high"
    assert refused[3].why == "the same file as a picture of a before it"
    assert refused[4].why.startswith("nearly the same as a picture of b before it")
    assert len(stored) == 104
    again, refused = gallery.enroll(enrolled, new, "model a")
    assert len(again) == 104 and len(refused) == 9


def test_of_a_bad_picture_the_embedding_is_not_looked_at(tmp_path: Path) -> None:
    embeddings = torch.stack([torch.zeros(WIDTH), torch.ones(WIDTH)])
    stored, refused = gallery.enroll(tmp_path / "g", offer(embeddings, ["a", "b"], 1, ("no face was found", "")), "m")
    assert stored.names == ("b",) and refused[0].why == "no face was found"
    with pytest.raises(DataError, match=r"none of 2 pictures can be enrolled \(first: blur\)"):
        gallery.enroll(tmp_path / "h", offer(embeddings, ["a", "b"], 1, ("blur", "dark")), "m")
    assert not (tmp_path / "h").exists()
    with pytest.raises(ValueError, match="1 of 2 embeddings are zero"):
        gallery.enroll(tmp_path / "h", offer(embeddings, ["a", "b"]), "m")


@pytest.mark.parametrize("numbers", get_args(gallery.Numbers))
def test_no_number_and_no_name_of_the_forgotten_is_left_in_the_file(numbers: gallery.Numbers, tmp_path: Path) -> None:
    path = tmp_path / "g"
    embeddings, names = crowd(50, 20)
    stored, refused = gallery.enroll(path, offer(embeddings, names), "m", numbers=numbers)
    assert len(stored) == 1000 and not refused
    gone = [f"person {k:03d}" for k in range(0, 50, 5)]
    theirs = [k for k, name in enumerate(names) if name in gone]
    width = stored.embeddings.itemsize

    def left() -> int:
        content = path.read_bytes()
        rows = F.normalize(embeddings, dim=1).numpy().astype(stored.embeddings.dtype)
        # Any four numbers in a row of any of their embeddings, their content hashes, their names.
        pieces = [rows[k].tobytes()[at : at + 4 * width] for k in theirs for at in range(0, WIDTH * width, 4 * width)]
        pieces += [hashes_of(1000)[k].tobytes() for k in theirs] + [name.encode() for name in gone]
        return sum(piece in content for piece in pieces)

    assert left() == len(theirs) * (WIDTH // 4 + 1) + len(gone)  # the search for them works
    assert gallery.forget(path, gone) == 200
    assert left() == 0
    rest = Gallery(path)
    assert len(rest) == 800 and len(rest.names) == 40 and not set(rest.names) & set(gone)
    found = rest.search(embeddings, 1)
    kept = [k for k, name in enumerate(names) if name not in gone]
    assert [rest.names[who] for who in found.people[kept, 0]] == [names[k] for k in kept]


def test_everybody_can_be_forgotten_and_somebody_enrolled_again(enrolled: Path) -> None:
    everybody = list(Gallery(enrolled).names)
    assert gallery.forget(enrolled, everybody) == 100
    empty = Gallery(enrolled)
    assert len(empty) == 0 and empty.names == ()
    assert empty.search(torch.ones(3, WIDTH)).people.shape == (3, 0)
    stored, _ = gallery.enroll(enrolled, offer(torch.ones(1, WIDTH), ["ann"]), "model a")
    assert stored.search(torch.ones(1, WIDTH)).scores == pytest.approx(np.ones((1, 1)))


def test_who_is_not_there_cannot_be_forgotten_and_nobody_is(enrolled: Path) -> None:
    with pytest.raises(
        ValueError, match=r"1 of 2 names are not in .*\(first: person 0099\); the nearest name is person 009"
    ):
        gallery.forget(enrolled, ["person 001", "person 0099"])
    assert len(Gallery(enrolled)) == 100
    os.link(enrolled, enrolled.parent / "second name")
    with pytest.raises(ValueError, match="has 2 names"):
        gallery.forget(enrolled, ["person 001"])


def test_a_link_to_a_gallery_stays_one_and_its_target_forgets(enrolled: Path) -> None:
    link = enrolled.parent / "link"
    link.symlink_to(enrolled.name)
    gallery.forget(link, ["person 001"])
    assert link.is_symlink()
    assert b"person 001" not in enrolled.read_bytes()


def test_what_a_killed_change_left_half_written_is_removed(enrolled: Path) -> None:
    left = enrolled.with_name(f".{enrolled.name}.12345.tmp")
    left.write_bytes(b"numbers of people")
    gallery.forget(enrolled, ["person 001"])
    assert not left.exists()


def test_a_gallery_of_another_model_is_refused(enrolled: Path) -> None:
    with pytest.raises(ValueError, match=r"enrolled with another model \(model a, this one is model b\)"):
        Gallery(enrolled, "model b")
    with pytest.raises(ValueError, match="another model"):
        gallery.enroll(enrolled, offer(torch.ones(1, WIDTH), ["x"]), "model b")
    with pytest.raises(ValueError, match="numbers of float32, not float16"):
        gallery.enroll(enrolled, offer(torch.ones(1, WIDTH), ["x"]), "model a", numbers="float16")


def test_a_fingerprint_tells_models_apart_by_what_makes_their_embeddings() -> None:
    model = small.make_model()
    code = gallery.fingerprint(model)
    assert code == gallery.fingerprint(small.make_model())
    model.set_classes(2, ("ann", "bo"))  # another head, the same embeddings
    assert code == gallery.fingerprint(model)
    assert code != gallery.fingerprint(small.make_model(template="none"))
    with torch.no_grad():
        next(model.backbone.parameters()).view(-1)[0] += 1e-3
    assert code != gallery.fingerprint(model)


@pytest.mark.parametrize("cut", [0, 4, 100, 5000])
def test_a_cut_or_foreign_file_is_named(enrolled: Path, cut: int) -> None:
    enrolled.write_bytes(enrolled.read_bytes()[:cut])
    with pytest.raises(DataError, match="our people"):
        Gallery(enrolled)
    enrolled.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(DataError, match="is no gallery"):
        Gallery(enrolled)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b'"facefast_gallery": "1"', b'"facefast_gallery": "2"', ValueError, "a gallery of format 2"),
        (b'"facefast_gallery": "1"', b'"facefast_galleri": "1"', DataError, "is no gallery"),
        (b'"shape": [100, 32]', b'"shape": [100, 99]', DataError, "a damaged gallery"),
        (b'"names": ["person 000", "person 001"', b'"names": ["person 000", "person 000"', DataError, "do not fit"),
    ],
)
def test_a_changed_file_is_refused(
    enrolled: Path, old: bytes, new: bytes, error: type[Exception], message: str
) -> None:
    content = enrolled.read_bytes()
    assert content.count(old) == 1
    enrolled.write_bytes(content.replace(old, new))
    with pytest.raises(error, match=message):
        Gallery(enrolled)


def test_bytes_turned_anywhere_end_in_a_named_error_or_a_search(enrolled: Path) -> None:
    content = enrolled.read_bytes()
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 700, 150)
    tails = rng.integers(len(content) - 900, len(content), 150)
    for at in [*heads.tolist(), *tails.tolist()]:
        enrolled.write_bytes(content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        try:
            Gallery(enrolled).search(torch.ones(1, WIDTH))
        except ValueError as error:
            assert "our people" in str(error) or "embeddings of" in str(error)


def test_two_processes_that_enroll_at_once_both_succeed(tmp_path: Path) -> None:
    path = tmp_path / "g"
    script = (
        "import sys, numpy as np, torch; from facefast.deploy import gallery\n"
        "for k in range(5):\n"
        "    name = f'{sys.argv[2]}{k}'\n"
        "    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(hash(sys.argv[2]) % 1000 + k))\n"
        "    new = gallery.Offer([name, name], rows, np.zeros((2, 2), np.uint64))\n"
        "    gallery.enroll(sys.argv[1], new, 'm')\n"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "0"}
    both = [subprocess.Popen([sys.executable, "-c", script, str(path), who], env=env) for who in ("a", "b")]
    assert [process.wait(200) for process in both] == [0, 0]
    assert Gallery(path).names == tuple(sorted(f"{who}{k}" for who in "ab" for k in range(5)))


def test_a_full_disk_leaves_the_gallery_as_it_was(enrolled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = enrolled.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; the gallery is as it was"):
        gallery.forget(enrolled, ["person 001"])
    assert enrolled.read_bytes() == content
    assert [name for name in os.listdir(enrolled.parent) if name.endswith(".tmp")] == []


OF_THE_MODEL = Thresholds(
    pairs=(PairThreshold(0.01, 0.3, 3000, 3000),),
    naming=(NamingThreshold(0.01, 0.4, 3000, 3000, people=5),),
    measured_on="x",
)


def test_thresholds_are_kept_and_the_gallerys_own_come_first(tmp_path: Path) -> None:
    few, names = crowd(5, 4)
    stored, _ = gallery.enroll(tmp_path / "few", offer(few, names), "m", thresholds=OF_THE_MODEL)
    assert Gallery(tmp_path / "few").thresholds == OF_THE_MODEL
    gallery.forget(tmp_path / "few", ["person 001"])
    assert Gallery(tmp_path / "few").thresholds == OF_THE_MODEL
    assert stored.naming(0.01).value == 0.4  # 20 pictures cannot show 1 %
    with pytest.raises(ValueError, match="20 pictures of strangers cannot show a rate of 0.001.* of the model: "):
        stored.naming(0.001)
    many, names = crowd(40, 10)
    stored, _ = gallery.enroll(tmp_path / "many", offer(many, names), "m", thresholds=OF_THE_MODEL)
    own = stored.naming(0.01)
    assert own.impostors == 400 and own.value not in (None, 0.4)
    strangers, _ = crowd(500, 4, seed=99)
    named = (stored.search(strangers).scores[:, 0] >= own.require()).mean()
    assert own.rate_interval is not None and named <= own.rate_interval.high


def test_one_person_under_two_names_is_told_and_sets_no_threshold(tmp_path: Path) -> None:
    embeddings, names = crowd(40, 10)
    again = embeddings[torch.tensor([name == "person 005" for name in names])]
    again = again + 0.5 * torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(4))
    clean, _ = gallery.enroll(tmp_path / "clean", offer(embeddings, names), "m")
    both = offer(torch.cat([embeddings, again]), [*names, *["alias"] * 10])
    stored, refused = gallery.enroll(tmp_path / "both", both, "m")
    assert not refused
    assert (clean.doubles(), stored.doubles()) == ([], [("alias", "person 005")])
    assert stored.naming(0.01).require() == pytest.approx(clean.naming(0.01).require(), abs=0.05)


@pytest.mark.parametrize(
    ("names", "hashes", "message"),
    [
        (["a"], np.zeros((2, 2), np.uint64), "give as many of each"),
        (["a", ""], np.zeros((2, 2), np.uint64), "'' is no name"),
        (["a", "b\n"], np.zeros((2, 2), np.uint64), "is no name"),
    ],
)
def test_an_offer_that_does_not_fit_is_refused(names: list[str], hashes: NDArray[np.uint64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Offer(names, torch.ones(2, WIDTH), hashes)
