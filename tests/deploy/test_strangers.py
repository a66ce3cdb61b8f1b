"""Thresholds of galleries too large for every picture to be a probe, and of models that saw fewer people."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from facefast.deploy import gallery_file, strangers
from facefast.deploy.gallery import Gallery, Offer, enroll
from facefast.evaluation.openset import Join, leave_one_out
from facefast.evaluation.thresholds import NamingThreshold, Thresholds

WIDTH = 24


def crowd(people: int, pictures: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Embeddings [N, D] and names, of people in turn."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, WIDTH, generator=generator)
    numbers = torch.arange(people * pictures) % people
    noisy = centres[numbers] + 0.6 * torch.randn(len(numbers), WIDTH, generator=generator)
    return noisy, [f"person {k:04d}" for k in numbers.tolist()]


def enrolled(path: Path, embeddings: Tensor, names: list[str], people: int = 10_000) -> Gallery:
    """A gallery whose model has 0.1 for 1 % of strangers, found on so many people."""
    of_model = Thresholds(naming=(NamingThreshold(0.01, 0.1, 3000, 3000, people=people),))
    offer = Offer(names, embeddings, np.zeros((len(names), 2), np.uint64))
    return enroll(path, offer, "m", thresholds=of_model)[0]


@pytest.mark.parametrize("join", get_args(Join))
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_some_probes_score_as_they_do_among_all(
    join: Join, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_file, "BLOCK", block)
    monkeypatch.setattr(strangers, "BLOCK", 16)
    embeddings, names = crowd(30, 4)
    names[:3] = ["alone", "two", "two"]
    stored = enrolled(tmp_path / "g", embeddings, names)
    everything = leave_one_out(torch.from_numpy(np.array(stored.embeddings)), stored.people, join)
    all_rows = strangers.scores_of_rows(stored, np.arange(len(stored)), join)
    for name in ("ranks", "known", "strangers", "nearest"):
        np.testing.assert_array_equal(getattr(all_rows, name), getattr(everything, name))
    np.testing.assert_allclose(all_rows.genuine, everything.genuine, atol=1e-6)
    np.testing.assert_allclose(all_rows.impostors, everything.impostors, atol=1e-6)
    rows = np.array([0, 5, 6, 40, 119])
    some = strangers.scores_of_rows(stored, rows, join)
    np.testing.assert_array_equal(some.nearest, everything.nearest[rows])
    np.testing.assert_allclose(some.impostors, everything.impostors[rows], atol=1e-6)


def test_the_draw_is_of_whole_people_and_always_the_same() -> None:
    people = np.repeat(np.arange(300, dtype=np.int32), np.tile([1, 4, 50], 100))
    rows = strangers.draw(people, 600)
    np.testing.assert_array_equal(rows, strangers.draw(people, 600))
    assert (np.diff(rows) > 0).all() and 600 <= len(rows) < 600 + strangers.MOST_OF_ONE
    who, counts = np.unique(people[rows], return_counts=True)
    np.testing.assert_array_equal(counts, np.minimum(np.bincount(people)[who], strangers.MOST_OF_ONE))
    assert len(strangers.draw(people, 10**6)) == 100 * (1 + 4 + strangers.MOST_OF_ONE)  # no more than there are


@pytest.mark.parametrize(
    ("pictures", "fpir", "probes"), [(20_001, 0.01, 19_999), (10**6, 0.01, 3000), (10**6, 0, 20_000)]
)
def test_a_larger_gallery_has_no_more_comparisons_than_a_rate_needs(pictures: int, fpir: float, probes: int) -> None:
    assert strangers.probes_for(pictures, fpir) == probes


@pytest.mark.parametrize("join", get_args(Join))
def test_a_large_gallery_finds_its_threshold_on_a_draw(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = enrolled(tmp_path / "g", *crowd(500, 4))
    all_of_them = stored.naming(0.05, join)
    monkeypatch.setattr(strangers, "OWN_ROWS", 800)
    drawn = stored.naming(0.05, join)
    assert drawn.impostors == 600 and drawn.interval is not None
    assert drawn.interval.low <= all_of_them.require() <= drawn.interval.high
    assert stored.naming(0.01, join).require() > 0.1  # the model's, by which nearly every stranger gets a name
    unknown, _ = crowd(500, 2, seed=9)
    named = float((stored.search(unknown, join=join).scores[:, 0] >= drawn.require()).mean())
    assert drawn.rate_interval is not None and named <= drawn.rate_interval.high


def test_double_names_set_no_threshold_of_a_large_gallery_and_nobody_claims_to_have_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, names = crowd(200, 5)
    first = torch.cat([embeddings[begin : begin + 40] for begin in (0, 200, 400)])  # three pictures of 40 people
    again = first + 0.4 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    aliases = [f"alias {name}" for name in names[:40]] * 3
    clean = enrolled(tmp_path / "clean", embeddings, names)
    stored = enrolled(tmp_path / "both", torch.cat([embeddings, again]), [*names, *aliases])
    assert clean.doubles() == [] and len(stored.doubles() or ()) > 20
    monkeypatch.setattr(strangers, "OWN_ROWS", 700)
    assert stored.doubles() is None
    assert stored.naming(0.05).require() == pytest.approx(clean.naming(0.05).require(), abs=0.05)


def test_a_model_that_saw_fewer_people_lends_no_threshold(tmp_path: Path) -> None:
    few = crowd(6, 4)
    assert enrolled(tmp_path / "a", *few, people=6).naming(0.01).value == 0.1
    with pytest.raises(ValueError, match="of the model: it was found on 5 people, and among the 6 that are enrolled"):
        enrolled(tmp_path / "b", *few, people=5).naming(0.01)
