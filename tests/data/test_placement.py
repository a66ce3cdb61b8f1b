"""Where a GPU's pictures are decoded: what is asked for, what a measurement chooses, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import placement
from facefast.data.placement import CANDIDATES, GAIN, PAYS, USUAL, Candidate, Job, asked_for, best_of, choose
from facefast.recipe import DataConfig, Decoding, ImageSpec, Reading
from facefast.runtime.process import Runtime, World
from tests.support.pictures import encode, garbled_png, make_index, smooth_picture

RUN = Runtime(World(), torch.device("cpu"))
Rates = dict[Candidate, float]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facefast"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    names = [f"{i:03}.jpg" for i in range(12)]
    (tmp_path / "photographs").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "photographs" / name).write_bytes(encode(smooth_picture(40, 48, i)))
    index = make_index(tmp_path / "photographs", names, (48, 40))
    return Job(index, ImageSpec(24), None, Reading(threads=1), 4, torch.float32, True, PAYS)


class Meter:
    """Rates as they are told, and what was asked."""

    def __init__(self, rates: Rates) -> None:
        self.rates, self.asked = rates, list[Candidate]()

    def __call__(self, job: Job, candidate: Candidate, run: Runtime) -> float:
        self.asked.append(candidate)
        return self.rates.get(candidate, 1000.0)


def test_a_recipe_that_says_nothing_leaves_every_candidate_with_the_usual_one_first() -> None:
    assert asked_for("auto", -1) == list(CANDIDATES) and CANDIDATES[0] == USUAL == ("gpu", 0.65)


@pytest.mark.parametrize(
    ("place", "load", "expected"),
    [
        ("gpu", -1, [("gpu", 0.65), ("gpu", 1.0), ("gpu", 0.37), ("gpu", 0.0)]),
        ("gpu", 0.5, [("gpu", 0.5)]),
        ("regions", -1, [("regions", 0.65)]),
        ("cpu", -1, [("cpu", 0.0)]),
        ("auto", 0.9, [("gpu", 0.9), ("regions", 0.9), ("cpu", 0.0)]),
    ],
)
def test_what_a_recipe_asks_for_is_not_measured_against_anything_else(
    place: str, load: float, expected: list[Candidate]
) -> None:
    assert asked_for(place, load) == expected


def test_one_candidate_is_taken_as_it_is(job: Job, cache: Path) -> None:
    meter = Meter({})
    assert choose(job, asked_for("cpu", -1), RUN, meter) == Decoding("cpu", 0.0, "asked")
    assert meter.asked == [] and not cache.exists()


@pytest.mark.parametrize("best", CANDIDATES)
def test_the_fastest_is_chosen_kept_and_not_measured_again(job: Job, best: Candidate, cache: Path) -> None:
    meter = Meter({best: 1500.0})
    assert choose(job, CANDIDATES, RUN, meter) == Decoding(*best, "measured")
    assert meter.asked == [USUAL, *CANDIDATES]  # once before, for the files
    again = Meter({})
    assert choose(job, CANDIDATES, RUN, again) == Decoding(*best, "measured") and again.asked == []
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["pictures_a_second"] == [
        [*candidate, 1500.0 if candidate == best else 1000.0] for candidate in CANDIDATES
    ]


def test_a_short_run_measures_nothing_but_takes_what_a_long_one_found(job: Job) -> None:
    short, meter = dataclasses.replace(job, pictures=PAYS - 1), Meter({("cpu", 0.0): 9000.0})
    assert choose(short, CANDIDATES, RUN, meter) == Decoding(*USUAL, "usual") and meter.asked == []
    choose(job, CANDIDATES, RUN, meter)
    assert choose(short, CANDIDATES, RUN, Meter({})) == Decoding("cpu", 0.0, "measured")


def test_what_is_not_clearly_faster_than_the_usual_place_is_noise() -> None:
    other: Candidate = ("cpu", 0.0)
    assert best_of({USUAL: 1000.0, other: 1000.0 * GAIN - 1}) == USUAL
    assert best_of({USUAL: 1000.0, other: 1000.0 * GAIN}) == other
    assert best_of({USUAL: 0.0, other: 1.0}) == other  # no such decoder on this GPU


CHANGES: dict[str, Callable[[Job], Job]] = {
    "larger pictures": lambda job: dataclasses.replace(
        job, index=dataclasses.replace(job.index, widths=job.index.widths * 10, heights=job.index.heights * 10)
    ),
    "another format": lambda job: dataclasses.replace(
        job, index=dataclasses.replace(job.index, paths=np.char.replace(job.index.paths, b".jpg", b".png"))
    ),
    "another output": lambda job: dataclasses.replace(job, image=ImageSpec(48)),
    "another type": lambda job: dataclasses.replace(job, dtype=torch.float16),
    "other batches": lambda job: dataclasses.replace(job, batch_size=2),
    "other threads": lambda job: dataclasses.replace(job, reading=Reading(threads=2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_pictures_or_other_batches_are_measured_anew(job: Job, change: str) -> None:
    choose(job, CANDIDATES, RUN, Meter({}))
    meter = Meter({})
    choose(CHANGES[change](job), CANDIDATES, RUN, meter)
    assert meter.asked


def test_more_of_the_same_pictures_are_the_same_kind(job: Job) -> None:
    choose(job, CANDIDATES, RUN, Meter({}))
    meter = Meter({})
    choose(dataclasses.replace(job, index=job.index.select(np.arange(9))), CANDIDATES, RUN, meter)
    assert meter.asked == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"decoding": "tpu", "hw_decoder_load": 1}', '{"decoding": []}'])
def test_a_damaged_answer_is_measured_again(job: Job, content: str, cache: Path) -> None:
    choose(job, CANDIDATES, RUN, Meter({}))
    (file,) = cache.iterdir()
    file.write_text(content)
    meter = Meter({("regions", 0.65): 2000.0})
    assert choose(job, CANDIDATES, RUN, meter) == Decoding("regions", 0.65, "measured") and meter.asked
    assert json.loads(file.read_text())["decoding"] == "regions"


def test_a_cache_that_cannot_be_written_costs_a_measurement_and_no_run(job: Job, cache: Path) -> None:
    cache.parent.write_text("a file where a folder should be")
    for _ in range(2):
        meter = Meter({})
        assert choose(job, CANDIDATES, RUN, meter).why == "measured" and meter.asked


def test_the_slowest_rank_counts(job: Job) -> None:
    class Two(Runtime):
        """Two ranks, the other of which is slow with the CPU."""

        def gather(self, value: Any) -> list[Any]:
            return [value, 100.0 if meter.asked[-1] == ("cpu", 0.0) else value]

    meter = Meter({("cpu", 0.0): 5000.0, ("gpu", 1.0): 2000.0})
    assert choose(job, CANDIDATES, Two(World(0, 2, 0, 2), RUN.device), meter) == Decoding("gpu", 1.0, "measured")


def test_a_measurement_runs_the_loader_whatever_its_pictures_are(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    Path(job.index.path(3)).write_bytes(garbled_png())
    assert placement.pictures_a_second(job, USUAL, RUN) > 0
    capfd.readouterr()


def test_a_place_where_nothing_can_be_decoded_has_no_rate(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA allocation failed")

    monkeypatch.setattr(placement, "make_loader", failing)
    assert placement.pictures_a_second(job, USUAL, RUN) == 0


def test_options_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"data\.hw_decoder_load is 1\.5"):
        DataConfig(hw_decoder_load=1.5)
    with pytest.raises(ValueError, match=r"hw_decoder_load 0\.5 has no effect: data\.decoding cpu"):
        DataConfig(hw_decoder_load=0.5, decoding="cpu")
    with pytest.raises(ValueError, match="decoding is 'tpu'; it must be gpu, regions, cpu"):
        Reading(decoding="tpu")  # type: ignore[arg-type]


def test_without_a_measurement_files_are_read_as_the_options_say() -> None:
    asked = DataConfig(decoding="regions", hw_decoder_load=0.2).reading(3)
    assert (asked.threads, asked.decoding, asked.hw_decoder_load) == (3, "regions", 0.2)
    assert (DataConfig().reading(3).decoding, DataConfig().reading(3).hw_decoder_load) == USUAL
