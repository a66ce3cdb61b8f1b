"""What moves and how fast: frozen stages and statistics, layer-wise rates, the feature cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from facefast.data import Batch
from facefast.models import FaceModel
from facefast.recipe import AugmentSpec, IndexFacts, Phase, Recipe, resolve
from facefast.runtime.process import Runtime, World
from facefast.training.objective import RowCounts
from facefast.training.step import SideInputs, TrainState, train_step
from facefast.training.transfer import (
    caches_features,
    freeze_batchnorm,
    freeze_stages,
    parameter_groups,
)
from tests.support import small

RUN = Runtime(World(), torch.device("cpu"))
PHASE = Phase(name="finetune", start="scratch", lr=0.1, weight_decay=0.01)


def learning(model: FaceModel) -> set[str]:
    """Stages with a parameter that learns; a stage learns as a whole or not at all."""
    found = set()
    for name, modules in model.stages().items():
        flags = {p.requires_grad for module in modules for p in module.parameters()}
        assert len(flags) == 1
        found |= {name} if flags == {True} else set()
    return found


def test_only_the_named_stages_learn() -> None:
    model = small.make_model()
    everything = set(model.stages())
    assert learning(model) == everything
    freeze_stages(model, ("head", "stage2"))
    assert learning(model) == {"head", "stage2"}
    freeze_stages(model, ("last:3",))
    assert learning(model) == {"stage3", "embedding", "head"}
    freeze_stages(model, ("all",))  # the next phase thaws them
    assert learning(model) == everything
    freeze_stages(model, (f"last:{len(everything)}",))
    assert learning(model) == everything


def test_a_stage_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    for name in ("stage9", "last:7", "last:0", "last:"):
        with pytest.raises(ValueError, match=f"{name}, which mobilefacenet does not have.*last:6, stem, stage1.*head"):
            freeze_stages(small.make_model(), ("head", name))


def statistics(model: FaceModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("everywhere", [False, True])
def test_frozen_layers_keep_their_statistics_and_learning_ones_only_where_the_phase_says_so(everywhere: bool) -> None:
    model = small.make_model()
    freeze_stages(model, ("stage3", "embedding", "head"))
    model.train()
    freeze_batchnorm(model, everywhere=everywhere)
    before = statistics(model)
    with torch.no_grad():
        model(torch.randn(4, 3, small.SIZE, small.SIZE))
    moved = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    thawed = ("backbone.blocks.12", "backbone.blocks.13", "backbone.blocks.14", "backbone.conv2", "backbone.linear")
    assert moved == (set() if everywhere else {name for name in before if name.startswith(thawed)})


def test_a_layer_without_parameters_takes_statistics_where_those_beside_it_learn() -> None:
    """The last one of AdaFace's networks."""
    model = small.make_model("adaface_ir18")
    for learns, moving in ((("all",), True), (("head",), False)):
        freeze_stages(model, learns)
        model.train()
        freeze_batchnorm(model, everywhere=False)
        before = statistics(model)
        with torch.no_grad():
            model(torch.randn(4, 3, small.SIZE, small.SIZE))
        assert all(torch.equal(value, before[name]) != moving for name, value in statistics(model).items())


def test_each_stage_further_from_the_head_learns_slower_and_vectors_do_not_decay() -> None:
    model = small.make_model()
    freeze_stages(model, ("stage2", "stage3", "embedding", "head"))
    phase = dataclasses.replace(PHASE, layer_decay=0.5, head_lr=10.0)
    groups = parameter_groups(model, phase)
    rates = {"head": 1.0, "embedding": 0.05, "stage3": 0.025, "stage2": 0.0125}  # 0.1 x 10, then halved each time
    of = {id(p): name for name, modules in model.stages().items() for m in modules for p in m.parameters()}
    seen = []
    for group in groups:
        assert group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(rates[of[id(parameter)]])
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)
            seen.append(id(parameter))
    assert sorted(seen) == sorted(id(p) for p in model.parameters() if p.requires_grad)  # each exactly once


def test_a_phase_in_which_nothing_learns_is_refused() -> None:
    model = small.make_model()
    freeze_stages(model, ())
    with pytest.raises(ValueError, match="phase finetune: trainable  leaves nothing to learn"):
        parameter_groups(model, dataclasses.replace(PHASE, trainable=()))


@pytest.mark.parametrize(
    ("trainable", "augment", "cached"),
    [
        (("head",), AugmentSpec(), True),
        (("head",), AugmentSpec(flip=0.5), False),  # other pictures each epoch
        (("embedding", "head"), AugmentSpec(), False),  # another network each step
        (("all",), AugmentSpec(), False),
    ],
)
def test_features_are_computed_once_where_they_cannot_change(
    trainable: tuple[str, ...], augment: AugmentSpec, cached: bool
) -> None:
    assert caches_features(dataclasses.replace(PHASE, trainable=trainable, augment=augment)) is cached


def test_a_head_learns_the_same_from_cached_features_as_from_the_pictures() -> None:
    phase = dataclasses.replace(PHASE, trainable=("head",), batch_size=8)
    model = small.make_model()
    recipe = Recipe(image=model.image, model=model.config, phases=(phase,), precision="fp32")
    plan = resolve(recipe, (IndexFacts(24, 4, "f"),), 1)
    images = torch.randn(24, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(24) % 4
    with torch.no_grad():
        embeddings = model.encode(images)
    heads = []
    for cached in (None, embeddings):
        state = TrainState(recipe, plan, RUN)
        state.enter(0, small.make_model(), SideInputs(embeddings=cached))
        for rows in torch.arange(24).split(8):
            train_step(
                state, [Batch((images if cached is None else cached)[rows], labels[rows], rows)], RowCounts(8, 8)
            )
        heads.append({name: value.clone() for name, value in state.model.get_submodule("head").state_dict().items()})
        start = small.make_model().backbone.state_dict()
        assert all(torch.equal(value, start[name]) for name, value in state.model.backbone.state_dict().items())
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(heads[0]["weight"], small.make_model().get_parameter("head.weight"))
