"""Temperature and calibration error against naive forms and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facefast.evaluation import calibration


def test_a_temperature_undoes_a_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 7, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]  # they mean what they say
    found = calibration.calibrate(logits, labels)
    assert found.temperature == pytest.approx(1, abs=0.08)
    scaled = calibration.calibrate(5 * logits, labels)
    assert scaled.temperature == pytest.approx(5 * found.temperature, rel=1e-6)
    assert scaled.nll == pytest.approx(found.nll)
    assert scaled.nll_before > scaled.nll
    assert scaled.ece_before > 0.1 and scaled.ece < 0.03


def test_the_temperature_is_that_of_a_search_over_a_grid() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 10 * torch.randn(300, 5, generator=generator)
    labels = torch.where(torch.rand(300, generator=generator) < 0.6, logits.argmax(1), torch.arange(300) % 5)
    found = calibration.calibrate(logits, labels)
    grid = torch.logspace(-2, 2, 4001)
    targets = torch.full((300, 5), 1 / 302 / 4)
    targets[torch.arange(300), labels] = 301 / 302
    losses = [float(torch.nn.functional.cross_entropy(logits / t, targets)) for t in grid]
    assert found.temperature == pytest.approx(float(grid[int(np.argmin(losses))]), rel=0.005)
    plain = torch.nn.functional.cross_entropy(logits.double() / found.temperature, labels)
    assert found.nll == pytest.approx(float(plain), rel=1e-5)
    assert found.nll_before == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_few_pictures_that_are_all_named_rightly_make_no_name_certain() -> None:
    found = calibration.calibrate(torch.eye(4), torch.arange(4))
    assert found.temperature == pytest.approx(1 / math.log(15))  # by which the right one of four has 5/6
    assert found.ece == pytest.approx(1 / 6)
    one_class = calibration.calibrate(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    assert one_class.nll == 0


def test_logits_that_are_always_wrong_end_at_a_limit() -> None:
    logits = torch.eye(4)
    assert calibration.calibrate(logits, (torch.arange(4) + 1) % 4).temperature == pytest.approx(calibration.MOST)
    constant = calibration.calibrate(torch.zeros(6, 3), torch.arange(6) % 3)
    assert constant.nll == pytest.approx(math.log(3))


def test_rows_without_a_label_do_not_count() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    some = calibration.calibrate(logits, torch.tensor([0, 0, -1]))
    assert some == calibration.calibrate(logits[:2], torch.tensor([0, 0]))
    assert some.rows == 2
    with pytest.raises(ValueError, match="0 labelled rows"):
        calibration.calibrate(logits, torch.tensor([-1, -1, -1]))
    with pytest.raises(ValueError, match="for 1 labelled rows"):
        calibration.calibrate(logits, torch.tensor([2, -1, -1]))
    with pytest.raises(ValueError, match="1 of 6 logits are not finite"):
        calibration.calibrate(torch.tensor([[math.nan, 0], [1, 0], [0, 1]]), torch.tensor([0, 0, 1]))


def test_the_calibration_error_by_hand() -> None:
    # Two bins: 0.2 and 0.4, one right of two, and 0.9 twice, one right of two.
    assert calibration.expected_calibration_error([0.2, 0.4, 0.9, 0.9], [True, False, True, False], 2) == pytest.approx(
        (2 * abs(0.3 - 0.5) + 2 * abs(0.9 - 0.5)) / 4
    )
    assert calibration.expected_calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration.expected_calibration_error([1.0, 0.0], [False, True]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_equals_counting_bin_by_bin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sure = rng.integers(0, 31, 500) / 30 if seed else rng.random(500)  # on the edges of bins, or anywhere
    right = rng.random(500) < 0.5
    naive = 0.0
    for k in range(15):
        inside = (sure > k / 15) & (sure <= (k + 1) / 15) | ((k == 0) & (sure == 0))
        if inside.any():
            naive += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert calibration.expected_calibration_error(sure, right) == pytest.approx(naive)


@pytest.mark.parametrize(("sure", "right"), [([], []), ([0.5], [True, False]), ([1.5], [True]), ([math.nan], [True])])
def test_what_is_no_probability_is_refused(sure: list[float], right: list[bool]) -> None:
    with pytest.raises(ValueError, match="probabilit"):
        calibration.expected_calibration_error(sure, right)
