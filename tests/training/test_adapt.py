"""A source model is adapted by as much as people left out gain, and stays as it is where they gain nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from facefast import train
from facefast.data import FaceIndex, divide, make_loader, read_index
from facefast.data.drawn import synthetic
from facefast.deploy import gallery
from facefast.evaluation import baselines
from facefast.evaluation.embed import embed_rows
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import AdaptConfig, Phase, Reading
from facefast.runtime import files, process
from facefast.runtime.exits import NumericsError
from facefast.runtime.lines import read_lines
from facefast.training import adapt as adapting
from facefast.training import choice, leftout
from facefast.training import restate as restating
from facefast.training.adapt import LEAST_PEOPLE, adapt, adapt_embeddings, choose_map, gather
from facefast.training.leftout import Trial, choose, groups_of_people, rows_to_ask, tar_of_people
from facefast.training.restate import layers, restate, statistics_of
from facefast.training.whiten import added, whitening
from tests.support import small
from tests.support.ranks import run_ranks

PEOPLE, PICTURES = 12, 6
Known = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(PEOPLE, 0, 0), pictures=PICTURES, seed=5)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def source(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("source") / "run", small.make_model(), drawn)


def embeddings_of(
    within: float, *, size: int = 24, people: int = 60, seed: int = 0, middle: float = 0.0
) -> tuple[Tensor, NDArray[np.int64]]:
    """People who differ in all numbers alike, their pictures by `within` in the first quarter of them and by little
    elsewhere, all of them `middle` away from 0."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), 6)
    spread = np.full(size, 0.5)
    spread[: size // 4] = within
    vectors = generator.normal(size=(people, size))[labels] + spread * generator.normal(size=(len(labels), size))
    return torch.tensor(vectors + middle).float(), labels


# What is measured.


def test_tar_of_people_is_that_of_the_definition() -> None:
    embeddings, labels = embeddings_of(1.0, people=12)
    labels[-5:] = 100  # the last person has one picture left
    directions = torch.nn.functional.normalize(embeddings, dim=1)
    scores = (directions @ directions.T).numpy()
    left, right = np.triu_indices(len(labels), 1)
    different = np.sort(scores[left, right][labels[left] != labels[right]])[::-1]
    threshold = different[int(np.ceil(len(different) * leftout.FAR)) - 1]
    expected = []
    for person in np.unique(labels):
        own = np.flatnonzero(labels == person)
        pairs = [scores[a, b] >= threshold for a in own for b in own if a < b]
        expected += [np.mean(pairs)] if pairs else []
    np.testing.assert_allclose(tar_of_people(embeddings, labels).numpy(), expected)


def test_setting_is_taken_only_where_its_gain_is_above_chance() -> None:
    before = torch.linspace(0.2, 0.8, 20).double()
    noise = torch.tensor([0.1, -0.1] * 10).double()
    best, trials = choose([("noise", before + noise), ("small", before + 0.05), ("large", before + 0.1)], before)
    assert best == 2 and [trial.name for trial in trials] == ["noise", "small", "large"]
    assert trials[0].low < 0 < trials[0].high and trials[2].gain == pytest.approx(0.1)
    assert choose([("noise", before + noise), ("worse", before - 0.1)], before)[0] == -1


def chosen_map(within: float, middle: float = 0.0) -> tuple[float | None, tuple[Trial, ...]]:
    embeddings, labels = embeddings_of(within, middle=middle)
    groups, seen = groups_of_people(labels, 5, seed=0), torch.ones(len(labels), dtype=torch.bool)
    return choose_map(embeddings, labels, groups, gather(embeddings, seen, labels, groups, 5, centre=True), 0)


def test_whitening_is_chosen_where_people_scatter_unevenly_and_left_where_they_do_not() -> None:
    chosen, trials = chosen_map(4.0)
    assert chosen is not None and chosen < 1
    assert max(trial.gain for trial in trials) > 0.2
    assert chosen_map(0.5)[0] is None


def test_embeddings_are_centred_where_all_of_them_point_the_same_way() -> None:
    chosen, trials = chosen_map(1.0, middle=8.0)
    assert chosen is not None
    assert trials[0].name == "centred" and trials[0].gain > 0.05


def test_people_left_out_have_no_part_in_the_map_that_they_are_verified_by() -> None:
    # Of two pictures a person nearly all scatter is their own: a map that knew of it would whiten it away.
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 2)
    embeddings = torch.tensor(generator.normal(size=(40, 64)), dtype=torch.float32)
    groups, seen = groups_of_people(labels, 5, seed=0), torch.ones(40, dtype=torch.bool)
    people = gather(embeddings, seen, labels, groups, 5, centre=True)
    before, whitened = adapting.tars_left_out(embeddings, labels, groups, people, (0.1,), seed=0)
    everybody = whitening(added(people.scatters), 0.1)(embeddings.double())
    known = torch.cat([tar_of_people(everybody[groups[labels] == k], labels[groups[labels] == k]) for k in range(5)])
    assert known.mean() > whitened.mean() + 0.2
    assert abs(whitened.mean() - before.mean()) < 0.2


def test_embeddings_are_mapped_in_place_and_rows_that_hold_nothing_say_nothing() -> None:
    embeddings, labels = embeddings_of(4.0, middle=3.0)
    broken = torch.cat([embeddings, torch.full((2, 24), torch.nan), 1e4 * torch.ones(1, 24)])
    names = np.concatenate([labels, [0, 1, 0]])
    seen = torch.arange(len(broken)) < len(broken) - 1  # the last could not be read
    config = AdaptConfig("given", centre=True, shrinkage=0.3)
    alone = embeddings.clone()
    expected = adapt_embeddings(alone, torch.ones(len(alone), dtype=torch.bool), labels, config, run_of(), 0)
    found = adapt_embeddings(broken, seen, names, config, run_of(), 0)
    assert expected.map is not None and found.map is not None
    for one, other in zip((*found.map, found.mean, found.variance), (*expected.map, expected.mean, expected.variance),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected.map(embeddings), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(broken[: len(alone)], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.double().mean(0), found.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.double().var(0, correction=0), found.variance, rtol=1e-3, atol=1e-4)
    assert found.mean.abs().max() < 1e-4


def test_groups_divide_people_evenly_and_rows_are_whole_people_up_to_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.concatenate([np.repeat(np.arange(10), 4), np.arange(10, 15), [-1]])
    groups = groups_of_people(labels, 5, seed=1)
    assert len(groups) == 15 and np.bincount(groups[:10]).tolist() == [2] * 5
    assert not np.array_equal(groups, groups_of_people(labels, 5, seed=2))
    rows = rows_to_ask(labels, np.ones(15, bool), 0)
    assert sorted(rows) == list(range(40))
    monkeypatch.setattr(leftout, "MOST_ASKED", 7)
    monkeypatch.setattr(leftout, "MOST_EACH", 3)
    draws = [rows_to_ask(labels, np.ones(15, bool), seed) for seed in range(40)]
    for rows in draws:
        assert np.bincount(labels[rows])[np.unique(labels[rows])].tolist() == [3, 3]
        assert (np.diff(labels[rows]) >= 0).all()
    # Neither people nor pictures are those that come first.
    assert set(np.concatenate(draws)) == set(range(40))
    assert np.array_equal(draws[0], rows_to_ask(labels, np.ones(15, bool), 0))


def test_a_copy_under_another_name_makes_no_part_of_pairs_negative() -> None:
    for seed in range(20):
        embeddings = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        embeddings[3] = embeddings[0]
        assert tar_of_people(embeddings, np.array([0, 0, 1, 1, 2, 2])).tolist() == [0, 0, 0]


def test_where_hardly_anything_can_be_read_nothing_is_chosen() -> None:
    embeddings, labels = embeddings_of(4.0)
    for readable in (0, 8):  # nothing, and two people, who are left out one at a time
        seen = torch.arange(len(labels)) < readable
        found = adapt_embeddings(embeddings.clone(), seen, labels, AdaptConfig("auto"), run_of(), 0)
        assert (found.map, found.shrinkage, found.trials) == (None, 1.0, ())
    assert choose([("one person", torch.ones(1).double())], torch.zeros(1).double()) == (-1, ())


def test_rows_that_are_not_finite_have_no_part_in_the_choice() -> None:
    embeddings, labels = embeddings_of(4.0)
    broken = torch.cat([embeddings, torch.full((20, 24), torch.nan)])
    names = np.concatenate([labels, np.arange(20)])
    everyone = [torch.ones(len(each), dtype=torch.bool) for each in (embeddings, broken)]
    alone = adapt_embeddings(embeddings, everyone[0], labels, AdaptConfig("auto"), run_of(), 0)
    found = adapt_embeddings(broken, everyone[1], names, AdaptConfig("auto"), run_of(), 0)
    assert found.shrinkage == alone.shrinkage < 1
    assert [trial.name for trial in found.trials] == [trial.name for trial in alone.trials]
    for one, other in zip(found.trials, alone.trials, strict=True):
        assert one.gain == pytest.approx(other.gain, abs=1e-6)


# BatchNorm's statistics.


def run_of(rank: int = 0, world: int = 1) -> Any:
    return process.Runtime(process.World(rank, world, rank, world), torch.device("cpu"))


def statistics(model: FaceModel, index: FaceIndex) -> restating.Statistics:
    precision = Precision.choose("fp32", model.config.backbone, False, torch.device("cpu"))
    return statistics_of(model, index, run_of(), precision, Reading(threads=1), seed=3)


def test_statistics_are_those_of_what_reaches_each_layer(drawn: Path) -> None:
    model, index = small.make_model(), read_index(drawn)
    found = statistics(model, index)
    assert set(found) == set(layers(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restate(model, found, 1.0, 1.0)
    # The pictures that the statistics are of leave every layer with mean 0 and variance 1 before its own factors.
    reached: dict[str, Tensor] = {}
    for name, layer in layers(model).items():
        layer.register_forward_hook(lambda layer, given, _, name=name: reached.__setitem__(name, given[0]))
    with torch.no_grad(), make_loader(index, model.image, batch_size=len(index)) as loader:
        model.eval().encode(next(iter(loader)).images)
    for name, given in reached.items():
        axes, (mean, variance) = [0, *range(2, given.ndim)], found[name]
        assert (given.mean(axes) - mean).abs().max() < 1e-3 * variance.mean().sqrt(), name
        assert (given.var(axes, correction=0) - variance).abs().max() < 1e-3 * variance.mean(), name
    assert not torch.equal(
        state["backbone.conv1.bn.running_mean"], model.state_dict()["backbone.conv1.bn.running_mean"]
    )


def test_statistics_of_several_batches_are_those_of_all_together() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, generator=generator).double() + shift for shift in (0.0, 2.0)]
    total = torch.zeros(4, 3, dtype=torch.float64)
    for batch in batches:
        mean = batch.mean(0)
        total += 8 * torch.stack([torch.ones(3).double(), mean, mean.square(), batch.var(0, correction=0)])
    mean, variance = restating._moments(total)
    torch.testing.assert_close(mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(variance, torch.cat(batches).var(0, correction=0))


def test_weights_mix_the_statistics_with_those_of_the_source_along_the_depth() -> None:
    model = small.make_model()
    names = list(layers(model))
    before = {name: layer.running_mean.clone() for name, layer in layers(model).items()}  # type: ignore[union-attr]
    theirs = {name: (mean.double() + 1, torch.ones(len(mean)).double()) for name, mean in before.items()}
    restate(model, theirs, 0.75, 0.25)
    moved = [float((layers(model)[name].running_mean - before[name]).mean()) for name in names]  # type: ignore[operator]
    np.testing.assert_allclose(moved, np.linspace(0.75, 0.25, len(names)), rtol=1e-4)


def _statistics_on_ranks(rank: int, root: str, out: str) -> int:
    with process.start(rank_timeout=60) as run:
        model = small.make_model()
        precision = Precision.choose("fp32", model.config.backbone, False, torch.device("cpu"))
        restating.BATCH = 16  # several batches, not as many for each rank
        found = statistics_of(model, read_index(root), run, precision, Reading(threads=1), seed=3)
        torch.save(found, f"{out}/{run.world.size}-{run.world.rank}.pt")
    return 0


def test_statistics_do_not_depend_on_the_number_of_ranks(drawn: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        assert run_ranks(_statistics_on_ranks, world, str(drawn), str(tmp_path)) == [0] * world
    alone, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for found in both:
        for name, moments in alone.items():
            for one, other in zip(moments, found[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# The whole.


def adapted(
    index: FaceIndex, config: AdaptConfig, model: FaceModel | None = None
) -> tuple[adapting.Adaptation, Known, FaceModel]:
    model = model or small.make_model()
    precision = Precision.choose("fp32", model.config.backbone, False, torch.device("cpu"))

    def embed(network: FaceModel, of: FaceIndex, mirror: bool) -> Known:
        return embed_rows(
            network, of, run_of(), precision, Reading(threads=1), batch_size=64, mirror="mean" if mirror else "none"
        )

    done, known = adapt(model, index, None, config, embed(model, index, True), embed, statistics, run_of(), seed=1)
    torch.testing.assert_close(known[0], embed(model, index, True)[0], rtol=1e-3, atol=1e-3)  # of the model as it is
    return done, known, model


def test_given_amounts_are_done_as_they_are(drawn: Path) -> None:
    given = AdaptConfig("given", batchnorm=0.5, batchnorm_last=0.25, centre=True, shrinkage=0.4)
    done, known, model = adapted(read_index(drawn), given)
    assert (done.batchnorm, done.batchnorm_last, done.centre, done.shrinkage) == (0.5, 0.25, True, 0.4)
    assert (done.changes, done.trials) == (True, ())
    untouched = small.make_model().state_dict()
    assert not torch.equal(
        model.state_dict()["backbone.linear1.conv.weight"], untouched["backbone.linear1.conv.weight"]
    )


def test_pictures_as_the_source_sees_them_are_not_embedded_again(drawn: Path) -> None:
    index, model = read_index(drawn), small.make_model()
    untouched, asked = model.state_dict()["backbone.conv1.bn.running_mean"].clone(), list[bool]()
    precision = Precision.choose("fp32", model.config.backbone, False, torch.device("cpu"))

    def embed(network: FaceModel, of: FaceIndex, mirror: bool) -> Known:
        same = torch.equal(network.state_dict()["backbone.conv1.bn.running_mean"], untouched)
        asked.append(same and network.smoothing is None)
        return embed_rows(
            network, of, run_of(), precision, Reading(threads=1), batch_size=64, mirror="mean" if mirror else "none"
        )

    known, (plain, _) = embed(model, index, True), embed(model, index, False)
    asked.clear()
    again, _ = adapt(model, index, None, AdaptConfig("auto"), known, embed, statistics, run_of(), seed=1)
    assert asked.count(True) == 1
    asked.clear()
    model = small.make_model()
    done, _ = adapt(model, index, None, AdaptConfig("auto"), known, embed, statistics, run_of(), seed=1, plain=plain)
    assert asked.count(True) == 0 and len(asked) >= 4
    assert done == again and len(done.trials) >= 2


@pytest.mark.parametrize("people", [1, LEAST_PEOPLE - 1])
def test_too_few_people_to_choose_by_leave_the_model_as_it_is_and_are_counted(drawn: Path, people: int) -> None:
    index = read_index(drawn)
    done, _, model = adapted(index.select(index.labels < people), AdaptConfig("auto"))
    assert not done.changes and f"{people} people have two pictures or more" in done.why
    untouched = small.make_model().state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_one_picture_a_person_is_too_few_and_a_given_whitening_of_them_is_refused(drawn: Path) -> None:
    index = read_index(drawn)
    single = index.select(np.unique(index.labels, return_index=True)[1])
    assert "0 people have two pictures" in adapted(single, AdaptConfig("auto"))[0].why
    with pytest.raises(ValueError, match=r"no person has two pictures that differ; set 1"):
        adapted(single, AdaptConfig("given", shrinkage=0.5))


def test_statistics_for_a_network_without_batchnorm_are_refused_when_given(drawn: Path) -> None:
    model = small.make_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity())
    with pytest.raises(ValueError, match="has no BatchNorm"):
        adapted(read_index(drawn), AdaptConfig("given", batchnorm=1.0), model)


def test_config_refuses_amounts_without_effect_and_phases_without_a_source() -> None:
    for wrong in (
        {"choose": "auto", "batchnorm": 0.5}, {"shrinkage": 0.5}, {"centre": True}, {"batchnorm_last": 1.0},
        {"choose": "given"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="only then"):
            AdaptConfig(**wrong)
    with pytest.raises(ValueError, match="must lie in"):
        AdaptConfig("given", batchnorm=2)
    with pytest.raises(ValueError, match="must lie in"):
        AdaptConfig("given", batchnorm_last=-0.5)
    with pytest.raises(ValueError, match="adapts the source model, but the phase starts from scratch"):
        Phase(start="scratch", adapt=AdaptConfig("auto"))
    with pytest.raises(ValueError, match="must be above 0"):
        Phase(start="source", epochs=0)
    assert dataclasses.replace(Phase(start="source"), epochs=0, adapt=AdaptConfig("auto")).epochs == 0


WORDS = ("--data.format=celeba", "--eval.pairs=20", "--eval.folds=2", "--precision=fp32", "--pictures=0", "--threads=1",
         "--data.validation-fraction=0.4")  # fmt: skip


def test_recipe_that_only_adapts_hands_on_a_model_that_says_so(drawn: Path, source: Path, tmp_path: Path) -> None:
    given = ("--phases.adapt.adapt.choose=given", "--phases.adapt.adapt.shrinkage=0.2", "--eval.no-baselines")
    out = tmp_path / "run"
    assert (
        train.main(["adapt", f"--data.root={drawn}", f"--model.source={source}", f"--out={out}", *WORDS, *given]) == 0
    )
    status = files.read_json(out / "status.json")
    assert status["state"] == "done" and status["step"] == 0 and status["best"]["phase"] == "adapt"
    model = checkpoint.load_model(out)
    assert model.adaptation is not None and model.adaptation["shrinkage"] == 0.2


def test_fine_tuning_goes_on_from_the_adapted_model_and_resumes_with_it(
    drawn: Path, source: Path, tmp_path: Path
) -> None:
    words = [
        "finetune", f"--data.root={drawn}", f"--model.source={source}", *WORDS, "--phases.last.adapt.choose=given",
        "--phases.last.adapt.shrinkage=0.2", "--phases.last.adapt.batchnorm=1", "--phases.last.steps=3",
        "--phases.last.adapt.luma=3", "--phases.last.adapt.chroma=8",
        "--phases.all.steps=2", "--phases.last.batch-size=8", "--phases.all.batch-size=8", "--save-every=2", "--keep=9",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*words, f"--out={whole}"]) == 0
    rows = [line["phase"] for line in lines(whole) if line["split"] == "test"]
    assert rows[:4] == ["adapted class means", "adapted linear probe", "last", "class means"]
    last = checkpoint.load_model(checkpoint.of_step(whole, 5))
    assert last.adaptation is not None and last.adaptation["batchnorm"] == 1
    assert last.layers() == {"smoothing": {"luma": 3.0, "chroma": 8.0}}
    # From a checkpoint in the middle of the phase that adapted, to the same bits.
    assert train.main([*words, f"--out={cut}", f"--resume={checkpoint.of_step(whole, 2)}"]) == 0
    again = checkpoint.load_model(checkpoint.of_step(cut, 5))
    assert again.layers() == last.layers()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in last.state_dict().items())


def test_adapted_model_that_no_update_improves_is_handed_on_by_its_name(
    drawn: Path, source: Path, tmp_path: Path
) -> None:
    words = [
        "finetune", f"--data.root={drawn}", f"--model.source={source}", f"--out={tmp_path}", *WORDS,
        "--phases.last.adapt.choose=given", "--phases.last.adapt.shrinkage=0.2", "--eval.no-baselines",
        "--phases.last.steps=2", "--phases.all.steps=2", "--phases.last.batch-size=8", "--phases.all.batch-size=8",
        "--phases.last.lr=5", "--phases.all.lr=5", "--phases.last.warmup=0", "--phases.last.clip-grad=0",
    ]  # fmt: skip
    assert train.main(words) == 0  # at a rate that ruins what it begins from
    assert files.read_json(tmp_path / "status.json")["best"]["phase"] == "adapted class means"
    rows = [line["phase"] for line in lines(tmp_path) if line["split"] == "test"]
    assert rows == ["adapted class means", "last", "all"]


def test_probe_on_the_adapted_model_is_handed_on_as_the_same_model_adapted_once_more(
    drawn: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "handed_on", lambda state: baselines.ADAPTED_PROBE)
    words = [
        "adapt", f"--data.root={drawn}", f"--model.source={source}", f"--out={tmp_path}", *WORDS,
        "--phases.adapt.adapt.choose=given", "--phases.adapt.adapt.batchnorm=1", "--phases.adapt.adapt.centre",
        "--phases.adapt.adapt.shrinkage=0.2", "--phases.adapt.adapt.luma=2", "--data.test-fraction=0.2",
    ]  # fmt: skip
    monkeypatch.setattr(divide, "LEAST_TO_CHOOSE", 8)  # names choose
    assert train.main(words) == 0
    best = tmp_path / "checkpoints" / "best"
    assert best.readlink() == Path("adapted-linear-probe")
    adapted_before, probed = checkpoint.load_model(checkpoint.of_step(tmp_path, 0)), checkpoint.load_model(best)
    assert probed.adaptation == adapted_before.adaptation is not None
    assert probed.layers() == adapted_before.layers() == {"smoothing": {"luma": 2.0, "chroma": 0.0}}
    for name, tensor in adapted_before.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(probed.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(probed.state_dict()["head.weight"], adapted_before.state_dict()["head.weight"], atol=1e-3)
    row = [line for line in lines(tmp_path) if line["phase"] == baselines.ADAPTED_PROBE][-1]
    assert files.read_json(tmp_path / "status.json")["best"]["value"] == row["top1"]


def test_l2sp_pulls_to_the_adapted_weights_also_in_a_run_that_goes_on(
    drawn: Path, source: Path, tmp_path: Path
) -> None:
    words = [
        "finetune", f"--data.root={drawn}", f"--model.source={source}", *WORDS, "--phases.last.adapt.choose=given",
        "--phases.last.adapt.shrinkage=0.2", "--phases.last.adapt.centre", "--phases.last.steps=2",
        "--phases.all.steps=4", "--phases.last.batch-size=8", "--phases.all.batch-size=8", "--save-every=2",
        "--keep=9", "--phases.all.l2sp=100000", "--phases.all.lr=1e-5", "--phases.all.warmup=0",
        "--phases.all.schedule=constant", "--phases.all.momentum=0", "--phases.all.layer-decay=1",
        "--eval.no-baselines",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*words, f"--out={whole}"]) == 0
    name = "backbone.linear1.conv.weight"
    start = checkpoint.load_model(checkpoint.of_step(whole, 0)).state_dict()[name]
    end = checkpoint.load_model(checkpoint.of_step(whole, 6)).state_dict()[name]
    unadapted = checkpoint.load_model(source).state_dict()[name]
    # A pull of the whole way a step: it ends where it is pulled to, but for the last gradient.
    assert (end - start).norm() < 0.05 * (unadapted - start).norm()
    assert train.main([*words, f"--out={cut}", f"--resume={checkpoint.of_step(whole, 4)}"]) == 0
    assert torch.equal(checkpoint.load_model(checkpoint.of_step(cut, 6)).state_dict()[name], end)


def test_gallery_enrolled_by_the_source_is_refused_by_the_adapted_model(drawn: Path, tmp_path: Path) -> None:
    model = small.make_model().eval()
    path = tmp_path / "people.gallery"
    width = model.embedding_size
    offered = gallery.Offer(["ann", "bo"], torch.randn(2, width), np.arange(1, 5, dtype=np.uint64).reshape(2, 2))
    gallery.enroll(path, offered, gallery.fingerprint(model))
    gallery.Gallery(path, gallery.fingerprint(model))
    for config in (AdaptConfig("given", centre=True), AdaptConfig("given", luma=1.0)):
        _, _, changed = adapted(read_index(drawn), config, small.make_model().eval())
        with pytest.raises(ValueError, match="enrolled with another model"):
            gallery.Gallery(path, gallery.fingerprint(changed))


def test_pictures_whose_embeddings_are_not_finite_end_before_anything_is_adapted(drawn: Path) -> None:
    model = small.make_model()
    with torch.no_grad():
        next(iter(layers(model).values())).weight[0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        adapted(read_index(drawn), AdaptConfig("auto"), model)


def lines(run: Path) -> list[dict[str, Any]]:
    return list(read_lines(run / "metrics.jsonl"))
