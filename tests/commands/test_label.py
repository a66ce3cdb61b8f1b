"""Names for photographs without one: by known people, by clusters, as a command and through training's reader."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast import label
from facefast.data import read_index
from facefast.data.corrections import read_labels
from facefast.evaluation.embed import embed_photographs
from facefast.evaluation.thresholds import PairThreshold, Thresholds
from facefast.label import LabelArguments, propose_names
from facefast.labels import clustering
from facefast.recipe import Photographs
from facefast.runtime import process
from tests.support import small
from tests.support.points import people

GIVEN = LabelArguments(Path("model"))
NAMES = tuple(f"person {k}" for k in range(20))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    return small.save_run(tmp_path_factory.mktemp("run"), small.make_model(template="none"), drawn)


def loose(drawn: Path, folder: Path, known: int) -> Path:
    """A folder per person with `known` of their pictures; the others lie beside the folders."""
    index = read_index(drawn)
    for row in range(len(index)):
        name = index.class_names[index.labels[row]]
        place = int(np.count_nonzero(index.labels[:row] == index.labels[row]))
        target = folder / name if place < known else folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(index.path(row), target)
    return folder


def test_the_others_get_the_names_of_known_people() -> None:
    unit, labels, _ = people([10] * 20)
    seeds = np.where(np.arange(200) % 10 < 3, labels, -1)
    found = propose_names(GIVEN, unit, seeds, NAMES)
    right = [name == NAMES[label] for name, label in zip(found.identities, labels.tolist(), strict=True)]
    assert np.mean(right) > 0.9
    assert set(found.identities) <= {*NAMES, ""}
    assert found.clusters is None
    np.testing.assert_array_equal(found.confidences > 0, [bool(name) for name in found.identities])


def test_new_people_get_new_names_where_that_is_wanted() -> None:
    unit, labels, _ = people([10] * 20 + [12, 8], spread=0.05)
    seeds = np.where((labels < 20) & (np.arange(220) % 10 < 3), labels, -1)
    names = ("cluster-0001", *NAMES[1:])
    found = propose_names(dataclasses.replace(GIVEN, new_identities=True), unit, seeds, names)
    assert set(found.identities[200:212]) == {"cluster-0002"}  # the first is taken
    assert set(found.identities[212:]) == {"cluster-0003"}


def test_without_a_known_person_pictures_are_clustered() -> None:
    unit, labels, _ = people([12, 8, 6, 1], spread=0.04, dimensions=512)
    for given, seeds in ((GIVEN, np.full(27, -1)), (dataclasses.replace(GIVEN, ignore_labels=True), labels)):
        found = propose_names(given, unit, seeds, NAMES)
        assert [set(found.identities[a:b]) for a, b in ((0, 12), (12, 20), (20, 26), (26, 27))] == [
            {"cluster-0001"},
            {"cluster-0002"},
            {"cluster-0003"},
            {""},
        ]


@pytest.mark.parametrize(
    ("options", "known", "message"),
    [
        ({"confidence": 0.5}, False, "--confidence has no effect where no identity"),
        ({"new_identities": True, "ignore_labels": True}, True, "--new-identities has no effect where --ignore"),
        ({"similarity": 0.5}, True, "--similarity has no effect"),
        ({"min_size": 5}, True, "--min-size has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], known: bool, message: str) -> None:
    unit, labels, _ = people([3, 3])
    with pytest.raises(ValueError, match=message):
        propose_names(dataclasses.replace(GIVEN, **options), unit, labels if known else labels * 0 - 1, NAMES)


def test_the_command_names_loose_pictures_and_training_reads_them(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = loose(drawn, tmp_path / "photos", known=2), tmp_path / "labels.csv"
    given = [str(run_folder), "--data.root", str(root), "--data.format", "folder", "--out", str(out)]
    assert label.main([*given, "--confidence", "0"]) == 0
    said = capsys.readouterr().out
    assert f"--data.format folder --data.labels {out}" in said
    index = read_index(root, "folder")
    assert np.count_nonzero(index.labels < 0) == 8
    named = read_labels(index, out)
    assert (named.labels >= 0).all()
    assert named.class_names == index.class_names


def test_ignored_labels_tell_how_good_the_clusters_are(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.csv"
    given = [str(run_folder), "--data.root", str(drawn), "--out", str(out), "--ignore-labels", "--json"]
    assert label.main([*given, "--similarity", "-1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 16
    assert (found["clusters"], found["pair_recall"], found["pair_precision"]) == (1, 1, pytest.approx(4 * 6 / 120))
    assert found["known"] == 0


def test_pictures_without_any_identity_are_clustered(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = loose(drawn, tmp_path / "photos", known=0), tmp_path / "labels.csv"
    given = [str(run_folder), "--data.root", str(root), "--out", str(out)]
    assert label.main([*given, "--similarity", "-1"]) == 0  # the layout is told from the pictures right below the root
    assert "clusters" in capsys.readouterr().out
    assert set(read_labels(read_index(root, "folder"), out).class_names) == {"cluster-0001"}


def test_photographs_must_be_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label.main([str(run_folder)]) == 64
    assert "--data.root" in capsys.readouterr().err


def test_strangers_do_not_hide_that_pictures_are_loose(tmp_path: Path) -> None:
    for name in ("1.jpg", "logs/run.txt", "@eaDir/1.jpg/x.jpg", "__MACOSX/._1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert label.with_format(Photographs(str(tmp_path))).format == "folder"
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/1.jpg").touch()
    assert label.with_format(Photographs(str(tmp_path))).format == "auto"


def test_the_models_threshold_for_pairs_is_what_clusters_are_joined_at() -> None:
    model = small.make_model(template="none")
    assert label.pair_threshold(model) is None
    pair = PairThreshold(1e-2, 0.37, impostors=1000, genuine=100)
    model.thresholds = Thresholds((PairThreshold(1e-3, 0.5, impostors=1000, genuine=100), pair)).to_json()
    assert label.pair_threshold(model) == 0.37
    unit = people([20])[0]
    given = label.LabelArguments(Path("model"))
    found = label.propose_names(given, unit, np.full(len(unit), -1), (), 0.37)
    assert (found.similarity, set(found.identities)) == (0.37, {"cluster-0001"})


def test_twenty_photographs_of_one_person_are_one_cluster_and_two_people_are_two(
    celeba: Path, shared_weights: Path, tmp_path: Path
) -> None:
    everybody = read_index(celeba)
    counts = np.bincount(everybody.labels)
    chosen = np.flatnonzero(counts >= 20)[-12:]
    rows = np.concatenate([np.flatnonzero(everybody.labels == person)[:20] for person in chosen])
    everybody.select(rows).compact().save(tmp_path / "twelve.npz")
    with process.start() as run:
        model = shared_weights / "mobilefacenet_casia_112x96.ckpt"
        index, embeddings = embed_photographs(model, Photographs(root=str(tmp_path / "twelve.npz")), run, 64)
    unit, nobody = clustering.unit_rows(embeddings), np.full(20, -1)
    given = label.LabelArguments(model)
    alone = []
    for person in range(12):
        mine = unit[index.labels == person]
        found = label.propose_names(given, mine, nobody, ()).identities
        alone.append(found.count("cluster-0001"))
        assert len(set(found) - {""}) <= 2
    assert sum(count >= 18 for count in alone) >= 10  # some of these pictures show somebody else
    for one, other in zip(range(0, 12, 2), range(1, 12, 2), strict=True):
        both = (index.labels == one) | (index.labels == other)
        found = label.propose_names(given, unit[both], np.full(40, -1), ()).identities
        names = [set(found[:20]) - {""}, set(found[20:]) - {""}]
        assert not names[0] & names[1]
