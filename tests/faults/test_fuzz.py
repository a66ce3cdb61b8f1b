"""Damaged files of every format that is read: none crashes, hangs, takes memory, or raises anything but a named error.

`make faults` reads 150 of each; FACEFAST_FAULTS_SCALE=2000 as many as were read once, which takes an hour.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.formats import FORMATS, PLANTED
from tests.faults.fuzz import Order, Outcome, fuzz
from tests.support.scale import count

MUTATIONS = int(os.environ.get("FACEFAST_FAULTS_SCALE") or count(small=30, full=150))
NAMES = [name for name in FORMATS if name != PLANTED]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Two workers, for two cores."""
    with ThreadPoolExecutor(2) as both:
        parts = both.map(lambda names: fuzz(Order(names, MUTATIONS)), (NAMES[::2], NAMES[1::2]))
        return {name: outcome for part in parts for name, outcome in part.items()}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused_by_name(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert not outcome.faults, "\n".join(outcome.faults[:20])
    assert outcome.read + outcome.refused == MUTATIONS
    assert outcome.refused > 0


def test_what_is_planted_is_found() -> None:
    outcome = fuzz(Order([PLANTED], 8), hang_seconds=6, peak=1 << 30)[PLANTED]
    assert (outcome.read, outcome.refused) == (4, 1)
    assert [fault.partition(":")[0] for fault in outcome.crashes] == ["mutation 4"]
    assert [fault.partition(":")[0] for fault in outcome.hangs] == ["mutation 6"]
    assert outcome.exceptions == ["mutation 2: TypeError: planted"]
    assert [fault.partition(":")[0] for fault in outcome.too_large] == ["mutation 3"]
