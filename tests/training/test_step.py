"""The update: accumulation equals the big batch, padded rows count for nothing, broken gradients change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from facefast.data import Batch
from facefast.models import FaceModel, build_model, checkpoint
from facefast.recipe import (
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    resolve,
)
from facefast.runtime.log import STATS
from facefast.runtime.process import Runtime, World
from facefast.training.objective import RowCounts
from facefast.training.step import TrainState, train_step

CLASSES = 5
RUN = Runtime(World(), torch.device("cpu"))
# Frozen statistics: with batch statistics, accumulation and the big batch are different computations.
PHASE = Phase(start="scratch", batch_size=8, lr=0.05, batchnorm="frozen", schedule="constant")


def make_state(phase: Phase = PHASE, run: Runtime = RUN, **recipe_fields: object) -> TrainState:
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        **({"precision": "fp32", "phases": (phase,)} | recipe_fields),  # type: ignore[arg-type]
    )
    plan = resolve(recipe, (IndexFacts(80, CLASSES, "f"),) * len(recipe.phases), 1)
    state = TrainState(recipe, plan, run)
    state.enter(0, make_model(recipe).to(run.device))
    return state


def make_model(recipe: Recipe) -> FaceModel:
    """Random weights whose BatchNorm statistics are those of random pictures: frozen at 0 and 1 they would explode."""
    torch.manual_seed(1)
    model = build_model(recipe.model, CLASSES, recipe.image)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    return model


def share(rows: int) -> RowCounts:
    """An update of so many rows, all with a label."""
    return RowCounts(rows, rows)


def make_batch(size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(torch.randn(size, 3, 32, 32, generator=generator), labels, torch.arange(size))


def part(batch: Batch, which: slice) -> Batch:
    return Batch(*(column[which] for column in batch))


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0, atol: float = 0) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, rtol=rtol, atol=atol)


def test_accumulated_micro_batches_equal_the_big_batch() -> None:
    batch = make_batch()
    whole, parts = make_state(), make_state()
    a = train_step(whole, [batch], share(8))
    b = train_step(parts, [part(batch, slice(i, i + 2)) for i in range(0, 8, 2)], share(8))
    torch.testing.assert_close(a, b)
    assert_same(weights(whole), weights(parts), rtol=1e-5, atol=1e-6)  # a second update would amplify the last bits


def test_padded_rows_count_for_nothing() -> None:
    batch = make_batch()
    padded = Batch(
        torch.cat([batch.images, batch.images[:3]]),
        torch.cat([batch.labels, torch.full((3,), -100)]),
        torch.cat([batch.rows, torch.full((3,), -1)]),
    )
    one, two = make_state(), make_state()
    a, b = train_step(one, [batch], share(8)), train_step(two, [padded], share(8))
    torch.testing.assert_close(a, b)
    assert_same(weights(one), weights(two), rtol=1e-5, atol=1e-6)


def test_rows_that_turn_out_unreadable_leave_the_mean_over_the_others() -> None:
    batch = make_batch()
    lost = torch.arange(8) >= 5
    missing = batch._replace(labels=batch.labels.masked_fill(lost, -100), rows=batch.rows.masked_fill(lost, -1))
    one, two = make_state(), make_state()
    a = train_step(one, [part(batch, slice(0, 5))], share(5))
    b = train_step(two, [missing], share(8))  # the sampler promised 8, the files gave 5
    torch.testing.assert_close(a, b)
    assert_same(weights(one), weights(two), rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_single_readable_row_does_not_break_the_weights() -> None:
    state = make_state(dataclasses.replace(PHASE, weight_decay=0.0))
    batch = make_batch()
    before = weights(state)
    unreadable = batch._replace(labels=torch.full((8,), -100), rows=torch.full((8,), -1))
    stats = train_step(state, [unreadable], share(8))
    assert not stats.any()
    assert_same(before, weights(state))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_non_finite_picture_skips_the_update_in_every_precision(precision: str) -> None:
    state = make_state(precision=precision)
    train_step(state, [make_batch()], share(8))
    before, moments = weights(state), checkpoint.pack_optimizer(state.optimizer)[0]
    moments = {name: value.clone() for name, value in moments.items()}
    batch = make_batch(seed=1)
    batch.images[3, 0, 0, 0] = float("nan")
    stats = dict(zip(STATS, train_step(state, [batch], share(8)).tolist(), strict=False))
    assert stats["skipped"] == 1
    assert_same(before, weights(state))
    assert_same(moments, checkpoint.pack_optimizer(state.optimizer)[0])
    assert train_step(state, [make_batch(seed=2)], share(8))[STATS.index("skipped")] == 0


def test_the_counts_are_those_of_the_batch() -> None:
    state, batch = make_state(), make_batch()
    with torch.no_grad():
        logits = state.model(batch.images)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    stats = train_step(state, [batch], share(8))
    torch.testing.assert_close(stats[0], expected)
    assert stats[1] == (logits.argmax(1) == batch.labels).sum()
    assert stats[2] == 8


def test_clipping_bounds_the_step_that_plain_sgd_takes() -> None:
    phase = dataclasses.replace(PHASE, clip_grad=0.01, momentum=0.0, weight_decay=0.0)
    state = make_state(phase)
    before = weights(state)
    train_step(state, [make_batch()], share(8))
    moved = torch.cat([(weights(state)[k] - before[k]).flatten() for k, _ in state.model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(phase.lr * phase.clip_grad, rel=1e-3)


def test_training_learns_a_small_batch_by_heart_with_margin_and_focal_loss() -> None:
    phase = dataclasses.replace(
        PHASE, batchnorm="train", loss=LossConfig(gamma=1.0, margin="cos", margin_size=0.1, scale=16)
    )
    recipe_model = ModelConfig(backbone="mobilefacenet", embedding=16, head="cosine")
    recipe = Recipe(image=ImageSpec(size=32, template="none"), model=recipe_model, phases=(phase,), precision="fp32")
    state = TrainState(recipe, resolve(recipe, (IndexFacts(80, CLASSES, "f"),), 1), RUN)
    state.enter(0, make_model(recipe))
    losses = [float(train_step(state, [make_batch()], share(8))[0]) for _ in range(30)]
    assert losses[-1] < losses[0] / 4


def test_the_averaged_weights_follow_the_raw_ones_and_are_what_is_evaluated() -> None:
    state = make_state(ema=0.5)
    start = weights(state)["head.weight"]
    train_step(state, [make_batch()], share(8))
    first = weights(state)["head.weight"]
    train_step(state, [make_batch(seed=1)], share(8))
    second = weights(state)["head.weight"]
    del start  # the first update starts the average
    averaged = state.evaluated.state_dict()["head.weight"]
    torch.testing.assert_close(averaged, 0.5 * first + 0.5 * second)


def test_a_state_taken_up_from_its_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    phase = dataclasses.replace(PHASE, optimizer="adamw", lr=1e-3, batchnorm="train")
    batches = [make_batch(seed=k) for k in range(6)]
    straight = make_state(phase, ema=0.9)
    for number, batch in enumerate(batches):
        train_step(straight, [batch], share(8))
        if number == 2:
            path = checkpoint.save(
                tmp_path, 3, tensors=straight.tensors(), documents=straight.documents(), best=False, keep=1
            )
    resumed = make_state(phase, ema=0.9)
    resumed.load(path)
    for batch in batches[3:]:
        train_step(resumed, [batch], share(8))
    assert resumed.step == 6
    assert_same(weights(straight), weights(resumed))
    assert_same(straight.evaluated.state_dict(), resumed.evaluated.state_dict())


@pytest.mark.gpu
def test_an_update_on_the_gpu_waits_for_nothing() -> None:
    run = Runtime(World(), torch.device("cuda"))
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        phases=(PHASE,),
        precision="bf16",
    )
    state = TrainState(recipe, resolve(recipe, (IndexFacts(80, CLASSES, "f"),), 1), run)
    model = build_model(recipe.model, CLASSES, recipe.image).cuda()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state.enter(0, model)
    batch = Batch(*(column.cuda() for column in make_batch()))
    train_step(state, [batch], share(8))
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = train_step(state, [batch], share(8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats[2] == 8
