"""Unknown, or somebody: thresholds and temperature on embeddings made by hand, wishes for thresholds, and names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from facefast.evaluation import baselines, naming
from facefast.evaluation.baselines import LabelledEmbeddings
from facefast.evaluation.metrics import Interval
from facefast.evaluation.thresholds import NamingThreshold, Thresholds

PEOPLE = 60
WEIGHT = torch.eye(PEOPLE, 84)
"""The direction of person k is axis k."""


def pictures(each: int, likeness: float = 0.1, planted: dict[int, float] | None = None) -> LabelledEmbeddings:
    """As many pictures of everybody, each with cosine 0.8 to its own person and `likeness` to the next one; `planted`
    is the likeness of single rows."""
    labels = torch.arange(PEOPLE * each) % PEOPLE
    alike = torch.full((len(labels),), likeness)
    for row, value in (planted or {}).items():
        alike[row] = value
    rows = torch.arange(len(labels))
    embeddings = torch.zeros(len(labels), 84)
    embeddings[rows, labels] = 0.8
    embeddings[rows, (labels + 1) % PEOPLE] = alike
    embeddings[rows, PEOPLE + rows % 24] = (1 - 0.64 - alike**2).sqrt()  # of length 1
    return LabelledEmbeddings(3.0 * embeddings, labels, PEOPLE)  # any length will do


def thresholds(decisions: naming.Decisions) -> dict[float, float | None]:
    return {threshold.rate: threshold.value for threshold in decisions.thresholds.naming}


@pytest.mark.parametrize(("planted", "expected"), [(6, 0.1), (7, 0.5)])
def test_the_threshold_lies_above_all_strangers_but_the_part_that_may_pass(planted: int, expected: float) -> None:
    found = naming.decide(
        WEIGHT, pictures(10, planted={row: 0.5 for row in range(planted)}), trained=False
    )  # 1 % of 600 are 6
    assert thresholds(found)[0.01] == pytest.approx(expected, abs=1e-6)
    assert (thresholds(found)[0.01] or 0) > expected - 1e-6
    threshold = found.thresholds.name(0.01)
    assert (threshold.impostors, threshold.genuine, threshold.people) == (600, 600, PEOPLE)
    assert threshold.missed == 0.0  # everybody scores 0.8 with themselves
    assert thresholds(found)[0.001] is None and "3000 are needed" in found.thresholds.naming[-1].why
    assert found.twins == () and found.calibration is None
    assert found.thresholds.measured_on == "600 training pictures, each against all people but its own"


def test_one_person_under_two_names_is_found_and_counts_for_no_threshold() -> None:
    known = pictures(10)
    weight = WEIGHT.clone()
    weight[7] = weight[3]  # 7 is 3
    own = known.labels == 7
    known.embeddings[own] = known.embeddings[known.labels == 3]
    found = naming.decide(weight, known)
    assert found.twins == ((3, 7),)
    assert thresholds(found)[0.01] == pytest.approx(0.1, abs=1e-6)  # not 0.8, by which they know each other
    assert (found.thresholds.pairs[0].value or 1.0) < 0.9  # nor do pairs of the two names count as two people
    assert found.thresholds.name(0.01).people == PEOPLE - 2


def test_the_order_of_the_pictures_changes_no_threshold_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=generator)
    centres[7] = centres[31]  # one person under two names
    labels = torch.arange(40).repeat_interleave(8)
    embeddings = centres[labels] + 0.7 * torch.randn(320, 64, generator=generator)
    found = []
    for order in (torch.arange(320), torch.arange(320).flip(0), torch.randperm(320, generator=generator)):
        pictures = LabelledEmbeddings(embeddings[order], labels[order], 40)
        decisions = naming.decide(baselines.class_means(embeddings, labels, 40), pictures, trained=False)
        assert decisions.twins == ((7, 31),)
        found.append([threshold.value for threshold in decisions.thresholds.pairs])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0] == pytest.approx(found[2], abs=1e-6)
    assert found[0][0] is not None


def test_people_trained_on_pass_for_strangers_half_as_often_as_strangers_do() -> None:
    known = pictures(10, planted={row: 0.5 for row in range(5)})  # 5 of 600 are below 1 %, and above half of it
    means, trained = (naming.decide(WEIGHT, known, trained=trained).thresholds for trained in (False, True))
    assert means.name(0.01).value == pytest.approx(0.1, abs=1e-6)
    assert trained.name(0.01).value == pytest.approx(0.5, abs=1e-6)
    interval = trained.name(0.01).rate_interval
    assert interval is not None and interval.high <= 10 * 0.01 * naming.TRAINED_SPREAD
    assert [threshold.rate for threshold in trained.naming] == [threshold.rate for threshold in means.naming]


def test_rate_whose_half_cannot_be_shown_gets_the_careful_end_of_its_own_threshold() -> None:
    known = pictures(6)  # 360 pictures of strangers show 1 %, and no half of it
    means, trained = (naming.decide(WEIGHT, known, trained=trained).thresholds for trained in (False, True))
    plain = means.name(0.01)
    assert plain.interval is not None and trained.name(0.01).value == plain.interval.high


def test_who_is_missed_at_the_careful_end_is_counted_there() -> None:
    known = pictures(6, planted={row: 0.55 for row in range(3)})  # 3 of 360 pass at 1 %; more careful, none of them
    rows = torch.arange(100, 136)
    known.embeddings[rows, known.labels[rows]] = 3 * 0.4  # known people, less like themselves
    known.embeddings[rows, PEOPLE + rows % 24] = 3 * (1 - 0.16 - 0.01) ** 0.5
    means, trained = (naming.decide(WEIGHT, known, trained=trained).thresholds.name(0.01) for trained in (False, True))
    assert means.missed == 0 and trained.missed == pytest.approx(0.1)
    assert trained.missed == naming.scores(known, WEIGHT).missed(trained.require()).mean()
    assert trained.missed_interval is not None and trained.missed_interval.low < 0.1 < trained.missed_interval.high


def test_pictures_kept_out_of_training_count_among_the_others() -> None:
    few = pictures(1, likeness=0.3)
    found = naming.decide(WEIGHT, pictures(25), few, trained=False)
    assert thresholds(found)[0.05] == pytest.approx(0.1, abs=1e-6)
    assert thresholds(found)[0.01] == pytest.approx(0.3, abs=1e-6)
    assert found.thresholds.measured_on.startswith("1500 training pictures and 60 kept out of it, ")


def test_pictures_without_a_name_count_for_nothing() -> None:
    known = pictures(10)
    more = LabelledEmbeddings(
        torch.cat([known.embeddings, WEIGHT[:20]]), torch.cat([known.labels, torch.full((20,), -1)]), PEOPLE
    )
    assert naming.decide(WEIGHT, more) == naming.decide(WEIGHT, known)


def test_too_few_pictures_have_no_threshold_and_say_how_many_are_needed() -> None:
    found = naming.decide(WEIGHT, pictures(1))
    near = pytest.approx(0.1, abs=1e-6)
    assert thresholds(found) == {0.1: near, 0.05: near, 0.01: None, 0.001: None}
    assert "60 pictures of strangers cannot show a rate of 0.01; 300 are needed" in found.thresholds.naming[2].why
    with pytest.raises(ValueError, match="two people are needed for a stranger"):
        naming.decide(WEIGHT[:1], LabelledEmbeddings(WEIGHT[:1], torch.zeros(1, dtype=torch.long), 1))


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_the_temperature_makes_up_for_any_scale_of_the_logits(factor: float) -> None:
    fair = pictures(8)
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(len(fair.labels), PEOPLE, generator=generator)
    logits[torch.arange(len(logits)), fair.labels] += 6
    one, other = (naming.decide(WEIGHT, pictures(10), fair, scale * logits).calibration for scale in (1.0, factor))
    assert one is not None and other is not None and one.rows == 480
    assert other.temperature / factor == pytest.approx(one.temperature, rel=1e-4)
    assert other.nll == pytest.approx(one.nll, rel=1e-4) and one.nll < one.nll_before + 1e-9
    assert naming.decide(WEIGHT, pictures(10), fair).calibration is None


# Wishes.


@pytest.mark.parametrize(
    ("wish", "rate"),
    [("auto", 0.01), ("far@1e-2", 0.01), ("fpir@0.05", 0.05), ("none", None), ("0.4", None), ("-1", None)],
)
def test_a_wish_is_a_rate_a_score_or_nobody_unknown(wish: str, rate: float | None) -> None:
    assert naming.asked_rate(wish) == rate


@pytest.mark.parametrize("wish", ["", "far", "far@", "far@0", "far@1", "far@x", "frr@0.1", "nan", "inf", "all"])
def test_another_wish_is_refused_with_those_that_there_are(wish: str) -> None:
    with pytest.raises(ValueError, match=r"give far@1e-2 \(part of strangers named\), a score, auto or none"):
        naming.asked_rate(wish)


def known(values: dict[float, float | None]) -> Thresholds:
    return Thresholds(
        naming=tuple(NamingThreshold(rate, value, 40, 40, why="too few") for rate, value in values.items())
    )


def test_the_score_needed_is_the_threshold_of_the_rate_or_the_number_itself() -> None:
    find = known({0.1: 0.2, 0.01: 0.4, 0.001: None}).name
    assert naming.score_needed("auto", find) == 0.4
    assert naming.score_needed("far@1e-1", find) == 0.2
    assert naming.score_needed("0.25", find) == 0.25
    assert naming.score_needed("none", find) == -math.inf
    with pytest.raises(ValueError, match="there is no threshold for fpir 0.001: too few"):
        naming.score_needed("far@1e-3", find)
    with pytest.raises(ValueError, match="known: 0.1, 0.01, 0.001"):
        naming.score_needed("far@0.02", find)


def test_the_strictest_threshold_is_that_of_the_lowest_rate_which_the_pictures_support() -> None:
    assert naming.strictest(known({0.1: 0.2, 0.05: 0.3, 0.01: 0.4, 0.001: 0.9}).name).rate == 0.01
    assert naming.strictest(known({0.1: 0.2, 0.05: 0.3, 0.01: None}).name).rate == 0.05
    few = (
        NamingThreshold(0.05, 0.3, 200, 200, Interval(0.25, 0.41), missed=0.1, missed_interval=Interval(0.05, 0.2)),
        NamingThreshold(0.01, None, 200, 200, why="few"),
    )
    careful = naming.strictest(Thresholds(naming=few).name)
    assert (careful.rate, careful.value) == (0.05, 0.41)
    assert (careful.missed, careful.missed_interval) == (None, None)  # nobody looked at 0.41
    with pytest.raises(ValueError, match="there is no threshold for fpir 0.01: too few"):
        naming.strictest(known({0.1: None, 0.05: None, 0.01: None}).name)
    with pytest.raises(ValueError, match="naming at FPIR 0.01; known: none"):
        naming.strictest(known({}).name)


# Names.


def test_names_are_the_most_probable_and_the_score_is_the_cosine_with_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    embeddings: Tensor = torch.tensor([[0.0, 3.0, 4.0], [1.0, 0.0, 0.0]])
    first, second = naming.name_faces(2 * torch.eye(3), logits, embeddings, ("ann", "bo", "cy"), 2)
    assert (first.names, second.names) == (("bo", "cy"), ("ann", "bo"))
    assert first.score == pytest.approx(0.6) and second.score == pytest.approx(1.0)
    assert first.probabilities == pytest.approx(torch.softmax(logits[0], 0)[[1, 2]].tolist())
    assert len(naming.name_faces(torch.eye(3), logits, embeddings, ("ann", "bo", "cy"), 9)[0].names) == 3
