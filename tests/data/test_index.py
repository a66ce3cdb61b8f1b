"""`FaceIndex`, `PairSet`, the cached scan and the pre-flight command: exact counts, exact faults, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast import index as preflight
from facefast.data import FAULTS, FaceIndex, PairSet, read_index
from facefast.data.index import number_classes
from tests.support.faulty import faulty_pictures, jpeg, sound_pictures
from tests.support.pictures import encode, exif, smooth_picture


def index_of(labels: list[int], **more: Any) -> FaceIndex:
    """An index of pictures that need not exist."""
    names = [f"person {k}" for k in range(max(labels) + 1)]
    return FaceIndex.build("/faces", [b"%d.jpg" % i for i in range(len(labels))], labels, names, **more)


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Files below `root`."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def people(seed: int = 0) -> dict[str, bytes]:
    """Two photographs of three people."""
    return {
        f"{who}/{k}.jpg": encode(smooth_picture(90, 120, 10 * seed + 2 * p + k))
        for p, who in enumerate("abc")
        for k in range(2)
    }


@pytest.fixture
def skewed() -> FaceIndex:
    """Identities of 1, 2, 3, 10 and 40 pictures, shuffled, and five pictures of nobody."""
    labels = np.repeat([-1, 0, 1, 2, 3, 4], [5, 1, 2, 3, 10, 40])
    return index_of(np.random.default_rng(0).permutation(labels).tolist())


def test_columns_are_frozen_and_selections_keep_labels(skewed: FaceIndex) -> None:
    with pytest.raises(ValueError, match="read-only"):
        skewed.labels[0] = 3
    rows = np.array([7, 3, 3])
    chosen = skewed.select(rows)
    assert chosen.paths.tolist() == [b"7.jpg", b"3.jpg", b"3.jpg"]
    assert chosen.labels.tolist() == skewed.labels[rows].tolist()
    assert chosen.class_names == skewed.class_names
    assert len(skewed.select(skewed.labels == 2)) == 3


def test_compact_numbers_the_identities_that_are_left(skewed: FaceIndex) -> None:
    part = skewed.select(np.isin(skewed.labels, [-1, 1, 4]))
    compact = part.compact()
    assert compact.class_names == ("person 1", "person 4")
    before = [part.class_names[k] if k >= 0 else None for k in part.labels]
    after = [compact.class_names[k] if k >= 0 else None for k in compact.labels]
    assert before == after
    assert compact.facts().num_classes == 2


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_the_closed_split_leaves_pictures_of_every_identity_on_both_sides(skewed: FaceIndex, fraction: float) -> None:
    train, test = skewed.split_per_identity(fraction, seed=1)
    assert sorted([*train.paths.tolist(), *test.paths.tolist()]) == sorted(skewed.paths.tolist())
    assert -1 not in test.labels
    assert np.count_nonzero(train.labels == -1) == 5
    kept = [np.count_nonzero(test.labels == label) for label in range(5)]
    if fraction == 0:
        assert kept == [0] * 5
    else:
        whole = np.array([1, 2, 3, 10, 40])
        expected = np.minimum(np.maximum(np.rint(whole * fraction), 1), whole - 1)
        assert kept == expected.tolist()
        assert kept[0] == 0, "the only picture of an identity stays in train"


def test_splits_depend_on_the_seed_and_nothing_else(skewed: FaceIndex) -> None:
    once, again, other = (skewed.split_per_identity(0.3, seed)[1].paths.tolist() for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_the_open_split_shares_no_identity(skewed: FaceIndex) -> None:
    kept, held = skewed.split_identities(0.4, seed=3)
    assert set(kept.labels.tolist()) & set(held.labels.tolist()) == set()
    assert -1 in kept.labels
    assert held.compact().num_classes == 2
    assert len(kept) + len(held) == len(skewed)
    assert len(skewed.split_identities(0.0, seed=3)[1]) == 0
    assert skewed.split_identities(0.99, seed=3)[0].compact().num_classes == 1


def test_impossible_splits_are_refused(skewed: FaceIndex) -> None:
    for split in (skewed.split_per_identity, skewed.split_identities):
        with pytest.raises(ValueError, match=r"1\.0; it must lie in \[0, 1\)"):
            split(1.0, 0)
    with pytest.raises(ValueError, match="identities is 1; at least 2"):
        index_of([0, 0]).split_identities(0.5, 0)
    with pytest.raises(ValueError, match="no picture in"):
        FaceIndex.build("/faces", [], [], [])


def test_the_fingerprint_follows_content_and_not_the_place(tmp_path: Path) -> None:
    here, there = write(tmp_path / "here", people()), write(tmp_path / "there", people())
    first, second = (read_index(place).scanned() for place in (here, there))
    assert first.fingerprint() == second.fingerprint()
    (there / "a/0.jpg").write_bytes(encode(smooth_picture(90, 120, 99)))
    assert read_index(there).scanned().fingerprint() != first.fingerprint()
    mislabelled = index_of([0, 1]).fingerprint()
    assert index_of([1, 0]).fingerprint() != mislabelled
    points = np.zeros((2, 5, 2), np.float32)
    assert index_of([0, 1], landmarks=points).fingerprint() != mislabelled


def test_an_index_survives_its_file(tmp_path: Path) -> None:
    index = index_of(
        [0, 1, -1],
        landmarks=np.arange(30, dtype=np.float32).reshape(3, 5, 2),
        attributes=np.array([[1, np.nan]] * 3, np.float32),
        attribute_names=("male", "age"),
    )
    index.save(tmp_path / "index.npz")
    loaded = FaceIndex.load(tmp_path / "index.npz")
    assert loaded.fingerprint() == index.fingerprint()
    assert (loaded.root, loaded.class_names, loaded.attribute_names) == ("/faces", index.class_names, ("male", "age"))
    assert loaded.boxes is None
    assert loaded.attributes is not None and index.attributes is not None
    assert np.array_equal(loaded.attributes, index.attributes, equal_nan=True)
    assert os.listdir(tmp_path) == ["index.npz"]


def test_a_file_that_is_no_index_is_refused_and_never_executed(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "evil.npz", root=np.array([_Evil(tmp_path / "executed")], object))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("other.npz", "evil.npz", "text.npz"):
        with pytest.raises(ValueError, match="is no saved index"):
            read_index(tmp_path / name)
    assert not (tmp_path / "executed").exists()


class _Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (self.path,)


def test_200_000_rows_cost_megabytes() -> None:
    rows = 200_000
    index = FaceIndex.build(
        "/faces", [b"img_align_celeba/%06d.jpg" % i for i in range(rows)], np.arange(rows) % 10_177,
        [str(k) for k in range(10_177)], landmarks=np.zeros((rows, 5, 2), np.float32),
    )  # fmt: skip
    columns = [value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert sum(columns) < 24_000_000
    file = io.BytesIO()
    np.savez(file, index.paths)
    assert file.tell() < 10_000_000


def test_class_numbers_follow_names_or_values() -> None:
    names = ["10", "9", "", "x", "10"]
    assert [a if isinstance(a, tuple) else a.tolist() for a in number_classes(names)] == [
        [0, 1, -1, 2, 0],
        ("10", "9", "x"),
    ]
    assert number_classes(names, by_value=True)[1] == ("9", "10", "x")


def test_random_pairs_are_distinct_half_same_and_even_over_folds() -> None:
    index = index_of(np.repeat(np.arange(30), 12).tolist() + [-1] * 40)
    pairs = PairSet.random(index, 600, num_folds=10, seed=4)
    assert np.array_equal(index.labels[pairs.left] == index.labels[pairs.right], pairs.same)
    assert np.count_nonzero(pairs.same) == 300
    assert (index.labels[pairs.left] >= 0).all() and (index.labels[pairs.right] >= 0).all()
    keys = {tuple(sorted(pair)) for pair in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)}
    assert len(keys) == 600
    assert all(left != right for left, right in keys)
    for fold in range(10):
        assert np.count_nonzero(pairs.same[pairs.folds == fold]) == 30
        assert np.count_nonzero(~pairs.same[pairs.folds == fold]) == 30
    again, other = (PairSet.random(index, 600, seed=seed) for seed in (4, 5))
    assert np.array_equal(again.left, pairs.left) and np.array_equal(again.right, pairs.right)
    assert not np.array_equal(other.left, pairs.left)


def test_random_pairs_reach_every_pair_there_is() -> None:
    index = index_of([0, 0, 0, 1, 1, 2])
    pairs = PairSet.random(index, 1000)
    same = {
        tuple(sorted(p)) for p in zip(pairs.left[pairs.same].tolist(), pairs.right[pairs.same].tolist(), strict=True)
    }
    assert same == {(0, 1), (0, 2), (1, 2), (3, 4)}
    assert len(pairs) == 8


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [-1, -1]])
def test_pairs_cannot_be_drawn_from_one_identity_or_single_pictures(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        PairSet.random(index_of(labels) if max(labels) >= 0 else index_of([*labels, 0]), 100)


def test_a_cached_scan_is_used_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = write(tmp_path / "faces", people()), tmp_path / "cache.npz"
    scans: list[int] = []
    scanned = FaceIndex.scanned

    def counted(self: FaceIndex, *args: Any, **options: Any) -> FaceIndex:
        scans.append(len(self))
        return scanned(self, *args, **options)

    monkeypatch.setattr(FaceIndex, "scanned", counted)
    first = read_index(root, cache=cache)
    assert first.hashes.all()
    assert read_index(root, cache=cache).fingerprint() == first.fingerprint()
    assert scans == [6]
    (root / "a/0.jpg").write_bytes(jpeg()[:200])
    assert np.count_nonzero(read_index(root, cache=cache).faults) == 1
    write(root, {"d/new.jpg": jpeg()})
    assert len(read_index(root, cache=cache)) == 7
    os.rename(root / "b", root / "renamed")
    assert "renamed" in read_index(root, cache=cache).class_names
    cache.write_bytes(b"damaged")
    assert len(read_index(root, cache=cache)) == 7
    assert scans == [6, 6, 7, 7, 7]


def test_every_layout_is_recognised_or_the_error_says_what_was_seen(tmp_path: Path) -> None:
    write(tmp_path, {"text/readme.txt": b"nothing here"})
    with pytest.raises(ValueError, match=r"layout of .* is not recognised \(it holds text\)"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder nor"):
        read_index(tmp_path / "text/readme.txt")
    with pytest.raises(ValueError, match="'lmdb' is not known; use auto, celeba"):
        read_index(tmp_path, "lmdb")


def tar_of(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))


def test_one_container_beside_folders_of_photographs_decides_nothing(tmp_path: Path) -> None:
    write(tmp_path, people())
    (tmp_path / "train.rec").write_bytes(b"x")
    with pytest.raises(ValueError, match="may be recordio or folder: .*--data.format"):
        read_index(tmp_path)
    (tmp_path / "train.rec").unlink()
    tar_of(tmp_path / "a/backup.tar")
    with pytest.raises(ValueError, match="may be webdataset or folder"):
        read_index(tmp_path)
    assert len(read_index(tmp_path, "folder")) == 6


def test_a_stranger_without_pictures_leaves_shards_alone(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar")
    write(tmp_path, {"logs/run.txt": b"", "__MACOSX/._0.tar": b"x", "README.png": b"x"})
    assert len(read_index(tmp_path)) == 1


def test_loose_pictures_are_told_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, {"1.jpg": jpeg()})
    with pytest.raises(
        ValueError, match="put each person's pictures into a folder of their own, .*--data.format, folder"
    ):
        read_index(tmp_path)


def test_celebas_folder_without_its_lists_is_nobody(tmp_path: Path) -> None:
    write(tmp_path, {"img_align_celeba/1.jpg": jpeg()})
    with pytest.raises(ValueError, match="one of the lists identity_CelebA"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("labels", np.array([0, 9], np.int32)),
        ("labels", np.array([0], np.int32)),
        ("labels", np.array([0.5, 1])),
        ("faults", np.array([0, 255], np.uint8)),
        ("splits", np.array([0, 7], np.uint8)),
        ("hashes", np.zeros(2, np.uint64)),
        ("landmarks", np.zeros((2, 4, 2), np.float32)),
        ("class_names", np.array(["a", "a"])),
        ("paths", np.array(["a.jpg", "b.jpg"])),
    ],
)
def test_a_saved_index_with_other_columns_is_refused(tmp_path: Path, column: str, value: np.ndarray) -> None:
    index_of([0, 1]).save(tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz") as file:
        stored = dict(file) | {column: value}
    np.savez(tmp_path / "other.npz", **stored)
    with pytest.raises(ValueError, match="is no saved index"):
        read_index(tmp_path / "other.npz")


def test_a_folder_or_a_damaged_archive_is_no_saved_index(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    index_of([0, 1]).save(tmp_path / "index.npz")
    content = (tmp_path / "index.npz").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        at, new = int(random.integers(len(content))), int(random.integers(256))
        (tmp_path / "index.npz").write_bytes(content[:at] + bytes([new]) + content[at + 1 :])
        with contextlib.suppress(ValueError):
            read_index(tmp_path / "index.npz")
    with pytest.raises(ValueError, match="is no saved index"):
        read_index(tmp_path / "folder.npz")


def test_nothing_but_bad_pictures_exits_65_whatever_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"a/1.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)})
    code, table, err = run(capsys, tmp_path, "--max-bad-fraction", 1)
    assert code == 65
    assert "unsupported: HEIC (convert it to JPEG or PNG): a/1.heic" in table
    assert "so that none is left (first: a/1.heic, unsupported: HEIC)" in err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the pre-flight."""
    code = preflight.main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def test_the_preflight_names_exactly_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth: dict[str, set[str]] = {}
    files = {f"good/{k}.jpg": data for k, (data, *_) in enumerate(sound_pictures().values())}
    for k, (data, reason) in enumerate(faulty_pictures().values()):
        files[f"bad/{k}.JPG"] = data
        truth.setdefault(reason, set()).add(f"bad/{k}.JPG")
    write(tmp_path, files)
    (tmp_path / "bad/folder.jpg").mkdir()
    truth["not a regular file"] = {"bad/folder.jpg"}
    (tmp_path / "bad/dangling.png").symlink_to("nowhere.png")
    truth["missing"] = {"bad/dangling.png"}
    code, out, err = run(capsys, tmp_path, "--json")
    found = json.loads(out)
    assert {reason: set(names) for reason, names in found["faults"].items()} == truth
    assert found["bad"] == sum(map(len, truth.values()))
    assert found["pictures"] == found["bad"] + len(sound_pictures())
    assert code == 65
    assert "are bad, above max-bad-fraction 0.01" in err
    assert run(capsys, tmp_path, "--json", "--max-bad-fraction", 1)[0] == 0


def test_the_preflight_finds_copies_and_one_picture_under_two_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = people()
    files |= {"a/copy.jpg": files["a/0.jpg"], "b/stolen.jpg": files["a/0.jpg"], "c/again.jpg": files["c/1.jpg"]}
    turned = {"c/turned.jpg": encode(smooth_picture(50, 60, 99), exif=exif(6))}
    write(tmp_path, files | turned)
    code, out, _ = run(capsys, tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["copies"] == [
        [["a/0.jpg", "a"], ["a/copy.jpg", "a"], ["b/stolen.jpg", "b"]],
        [["c/1.jpg", "c"], ["c/again.jpg", "c"]],
    ]
    assert found["conflicts"] == found["copies"][:1]
    assert found["pictures_per_identity"]["3-4"] == 3
    assert found["most_and_fewest"] == [["c", 4], ["a", 3]]
    assert found["turned_by_exif"] == 1
    assert found["median_size"] == [120, 90]
    _, table, _ = run(capsys, tmp_path)
    assert re.search(r"^ +3  exact copies: a/0.jpg \(a\) = a/copy.jpg \(a\) = b/stolen.jpg \(b\); c/1", table, re.M)
    assert re.search(r"^ +1  under two names: a/0.jpg", table, re.M)
    assert "imbalance 1.33333:1 (c has 4, a has 3)" in table


def test_the_preflight_writes_an_index_with_bad_rows_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "faces", people() | {"a/bad.jpg": jpeg()[:300]})
    code, table, _ = run(capsys, tmp_path / "faces", "--out", tmp_path / "index", "--max-bad-fraction", 0.5)
    assert code == 0
    assert "1    truncated: a/bad.jpg" in table
    index = read_index(tmp_path / "index.npz")
    assert [FAULTS[fault] for fault in index.faults] == ["ok", "ok", "truncated", "ok", "ok", "ok", "ok"]
    assert index.root == str(tmp_path / "faces")
    assert len(index.sound()) == 6


@pytest.mark.parametrize(
    "arguments", [["/nowhere/at/all"], [".", "--format", "lmdb"], ["--unknown"], [".", "--max-bad-fraction", "2"]]
)
def test_the_preflight_exits_64_for_a_wrong_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *arguments)[0] == 64


def test_the_preflight_of_real_photographs_finds_them_sound_and_some_twice(
    celeba: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, celeba, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["pictures"], found["identities"], found["bad"]) == (4950, 239, 0)
    assert found["median_size"] == [178, 218]
    assert len(found["conflicts"]) == 5, "the same photograph under two of CelebA's identities"
    assert "4950 pictures in" in err
