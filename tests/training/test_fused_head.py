"""A whole head whose loss is computed in one with its logits, beside one that makes cosines first: the same updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.data import Batch
from facefast.models import FaceModel, build_model
from facefast.models.heads import SHORTEST, CosineHead
from facefast.ops.linear_focal import MEASURED
from facefast.recipe import (
    AttributeSpec,
    DistillConfig,
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    TaskConfig,
    resolve,
)
from facefast.runtime import process
from facefast.runtime.process import Runtime, World
from facefast.training.distill import Teacher
from facefast.training.graphs import WARM_UP
from facefast.training.objective import Objective, RowCounts
from facefast.training.step import TrainState, train_step
from tests.support.ranks import run_ranks
from tests.training.test_sharded_head import VARIANTS, state_of, update

CLASSES, WIDTH, ROWS = 13, 16, 24
NO_VALUES = torch.zeros(ROWS, 0)
Fuse = Callable[[torch.dtype | None], list[torch.dtype]]


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Fuse:
    """Decides for every head in which type it is fused; gives the types of the calls that follow."""

    def decide(dtype: torch.dtype | None) -> list[torch.dtype]:
        calls: list[torch.dtype] = []
        fused_loss = CosineHead.fused_loss

        def watched(head: CosineHead, x: Tensor, labels: Tensor, kind: torch.dtype, **options: Any) -> Any:
            calls.append(kind)
            return fused_loss(head, x, labels, kind, **options)

        monkeypatch.setattr(CosineHead, "fused_type", lambda head, embeddings: dtype)
        monkeypatch.setattr(CosineHead, "fused_loss", watched)
        return calls

    return decide


def model_of(**more: Any) -> FaceModel:
    torch.manual_seed(1)
    config = ModelConfig(
        backbone="mobilefacenet_half", embedding=WIDTH, head="cosine", dropout=more.pop("dropout", 0.0)
    )
    names = tuple(f"p{k}" for k in range(CLASSES))
    return build_model(config, CLASSES, ImageSpec(size=32, template="none"), names, **more)


def phase_of(loss: LossConfig | None = None, **fields: Any) -> Phase:
    return Phase(start="scratch", batch_size=ROWS, loss=loss or LossConfig(scale=8.0), **fields)


def embedded(model: FaceModel) -> Batch:
    """Embeddings of many lengths instead of pictures, half of which are near their label's direction; two of other
    people, and padding at the end, which comes with another row's embedding."""
    assert isinstance(model.head, CosineHead)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    vectors = torch.randn(ROWS, WIDTH, generator=generator)
    vectors[::2] = F.normalize(vectors[::2]) + F.normalize(model.head.weight.detach()[labels[::2]])
    vectors *= torch.linspace(0.5, 60, ROWS)[:, None] / vectors.norm(dim=1, keepdim=True)
    rows = torch.arange(ROWS)
    labels[[3, 8]] = -100
    vectors[-3:], labels[-3:], rows[-3:] = vectors[0].clone(), -100, -1
    return Batch(vectors, labels, rows)


CPU = torch.device("cpu")
ROW_COUNTS = RowCounts(ROWS - 3, ROWS - 5)


def gradients(model: FaceModel, phase: Phase, batch: Batch, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, accuracy's count, and the gradients of the embeddings and the head's weights."""
    torch.manual_seed(4)
    objective = Objective(model, phase, cached=True, counts=torch.arange(1, CLASSES + 1), **more).train()
    model.zero_grad()
    images = batch.images.clone().requires_grad_()
    terms = objective(batch._replace(images=images), NO_VALUES, ROW_COUNTS.on(CPU), 1)
    terms.total.backward()
    assert model.head is not None and model.head.weight.grad is not None and images.grad is not None
    return terms.total.detach(), terms.correct, images.grad, model.head.weight.grad.clone()


def apart(one: Tensor, two: Tensor) -> float:
    """The length of the difference, in lengths of the second."""
    return float((one - two).double().norm() / two.double().norm())


MARGINS: tuple[Literal["none", "cos", "arc", "ada"], ...] = ("none", "cos", "arc", "ada")
WEIGHTS: tuple[Literal["none", "effective"], ...] = ("none", "effective")
LOSSES = {
    f"{margin} {gamma} {smoothing} {weights}": LossConfig(
        margin=margin,
        margin_size=0.0 if margin == "none" else 0.3,
        scale=16.0,
        gamma=gamma,
        label_smoothing=smoothing,
        class_weights=weights,
    )
    for margin, gamma, smoothing, weights in itertools.product(MARGINS, (0.0, 1.5), (0.0, 0.1), WEIGHTS)
}


@pytest.mark.parametrize("name", LOSSES)
def test_fused_in_float32_it_is_the_same_loss_with_the_same_gradients_and_the_same_accuracy(
    name: str, fuse: Fuse
) -> None:
    model = model_of(dropout=0.1)
    phase, batch = phase_of(LOSSES[name]), embedded(model)
    fuse(None)
    wanted = gradients(model, phase, batch)
    calls = fuse(torch.float32)
    found = gradients(model, phase, batch)
    assert calls == [torch.float32]
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-6, atol=0)
    assert found[1].equal(wanted[1]) and 5 < int(found[1]) < ROWS - 5
    assert apart(found[2], wanted[2]) < 2e-6 and apart(found[3], wanted[3]) < 2e-6
    assert not found[2][batch.labels < 0].any()


@pytest.mark.parametrize("name", ("none 0.0 0.0 none", "arc 0.0 0.0 none", "ada 1.5 0.1 effective"))
@pytest.mark.parametrize(("dtype", "digits"), ((torch.bfloat16, 8), (torch.float16, 11)), ids=str)
def test_fused_in_16_bits_it_is_the_same_up_to_their_rounding(
    dtype: torch.dtype, digits: int, name: str, fuse: Fuse
) -> None:
    model = model_of()
    phase, batch = phase_of(LOSSES[name]), embedded(model)
    fuse(None)
    wanted = gradients(model, phase, batch)
    calls = fuse(dtype)
    found = gradients(model, phase, batch)
    assert calls == [dtype]
    unit = 2.0**-digits
    # A cosine is off by up to about one unit in its last place, and the scale of 16 makes that 16 in the exponent.
    torch.testing.assert_close(found[0], wanted[0], rtol=8 * unit, atol=0)
    assert abs(int(found[1]) - int(wanted[1])) <= 1
    assert apart(found[2], wanted[2]) < 8 * unit and apart(found[3], wanted[3]) < 8 * unit


def test_under_autocast_the_backbone_learns_the_same_from_either(fuse: Fuse) -> None:
    generator = torch.Generator().manual_seed(5)
    batch = Batch(torch.randn(ROWS, 3, 32, 32, generator=generator), torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
    found = []
    for dtype in (None, torch.bfloat16):
        calls = fuse(dtype)
        model = model_of().train()
        autocast = torch.autocast("cpu", torch.bfloat16)
        objective = Objective(model, phase_of(LossConfig(margin="arc", margin_size=0.3, scale=8.0)), autocast=autocast)
        objective(batch, NO_VALUES, RowCounts(ROWS, ROWS).on(CPU), 1).total.backward()
        assert len(calls) == (dtype is not None)
        gradient = [p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and "head" not in n]
        found.append(torch.cat(gradient))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert apart(found[1], found[0]) < 0.05


def test_only_what_learns_gets_a_gradient(fuse: Fuse) -> None:
    fuse(torch.float32)
    for frozen in ("head", "embeddings"):
        model = model_of()
        assert isinstance(model.head, CosineHead)
        model.head.weight.requires_grad_(frozen != "head")
        batch = embedded(model)
        images = batch.images.requires_grad_(frozen != "embeddings")
        objective = Objective(model, phase_of(), cached=True)
        objective(batch, NO_VALUES, ROW_COUNTS.on(CPU), 1).total.backward()
        assert (model.head.weight.grad is None) == (frozen == "head")
        assert (images.grad is None) == (frozen == "embeddings")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_an_embedding_without_length_disturbs_nobody(dtype: torch.dtype, fuse: Fuse) -> None:
    fuse(dtype)
    model = model_of()
    batch = embedded(model)
    batch.images[1] = 0
    batch.images[2] *= SHORTEST / 2 / batch.images[2].norm()
    _, _, by_embedding, by_weight = gradients(model, phase_of(), batch)
    assert not by_embedding[1:3].any() and by_embedding[0].any()
    assert by_embedding.isfinite().all() and by_weight.isfinite().all()
    if dtype == torch.float16:
        return
    batch.labels[1:3] = -100
    assert by_weight.equal(gradients(model, phase_of(), batch)[3])


# ---------------------------------------------------------------------------------------------
# Who takes which way


def test_logits_are_made_where_somebody_else_reads_them(fuse: Fuse) -> None:
    calls = fuse(torch.float32)
    model, teacher = model_of(), model_of().eval()
    generator = torch.Generator().manual_seed(6)
    batch = Batch(torch.randn(ROWS, 3, 32, 32, generator=generator), torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
    for fields, fused in (
        ({"distill": DistillConfig(logits=1.0)}, False),
        ({"distill": DistillConfig(embeddings=1.0)}, True),
        ({"mixup": 0.4}, False),
        ({"cutmix": 0.4}, False),
        ({}, True),
    ):
        calls.clear()
        phase = phase_of(**fields)
        objective = Objective(model, phase, teacher=Teacher(teacher) if "distill" in fields else None)
        objective(batch, NO_VALUES, RowCounts(ROWS, ROWS).on(CPU), 1)
        assert bool(calls) == fused, fields


def test_attributes_and_terms_about_pairs_are_learnt_beside_it(fuse: Fuse) -> None:
    generator = torch.Generator().manual_seed(6)
    batch = Batch(torch.randn(ROWS, 3, 32, 32, generator=generator), torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
    values, found = torch.arange(ROWS)[:, None] % 2.0, []
    for dtype in (None, torch.float32):
        calls = fuse(dtype)
        model = model_of(attributes=(AttributeSpec("Male"),)).train()
        phase = phase_of(LossConfig(scale=8.0, contrastive=0.5, triplet=0.5), sampler="pk")
        objective = Objective(model, phase, TaskConfig(attributes=("Male",)))
        found.append(objective(batch, values, RowCounts(ROWS, ROWS, (ROWS,)).on(CPU), 1).parts)
        assert len(calls) == (dtype is not None) and len(objective.names) == 4
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


def test_a_cpu_makes_logits_whatever_the_type_and_the_number_of_classes() -> None:
    head = CosineHead(4, 20_000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert head.fused_type(torch.zeros(8, 4, dtype=dtype)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert head.fused_type(torch.zeros(8, 4)) is None


# ---------------------------------------------------------------------------------------------
# Several ranks


def updates_agree(rank: int) -> int:
    with process.start("cpu") as run, pytest.MonkeyPatch.context() as patch:
        fused_loss, calls = CosineHead.fused_loss, []

        def watched(head: CosineHead, *given: Any, **options: Any) -> Any:
            calls.append(head)
            return fused_loss(head, *given, **options)

        patch.setattr(CosineHead, "fused_loss", watched)
        for name, (loss, phase) in VARIANTS.items():
            states = []
            for dtype in (None, torch.float32):
                patch.setattr(CosineHead, "fused_type", lambda head, embeddings, dtype=dtype: dtype)
                calls.clear()
                state = state_of(run, loss, phase, "none")
                numbers = [update(state, seed) for seed in range(2)]
                assert len(calls) == (0 if dtype is None or "mixup" in phase else 4), name
                states.append((numbers, state.model.state_dict()))
            (numbers, one), (others, two) = states
            for ours, theirs in zip(numbers, others, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=1e-6, msg=name)
            for key, value in one.items():
                error = (two[key] - value).abs().max()
                assert error <= 1e-4 * max(0.02, float(value.abs().max())), (name, key, float(error))
    return 0


@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_updates_of_several_ranks_are_the_same_either_way(ranks: int) -> None:
    """Two updates of two passes each, in which some ranks have padding."""
    assert run_ranks(updates_agree, ranks) == [0] * ranks


# ---------------------------------------------------------------------------------------------
# On a GPU, by its own choice


def state_on_gpu(classes: int) -> TrainState:
    run = Runtime(World(), torch.device("cuda"))
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet_half", embedding=WIDTH, head="cosine"),
        phases=(phase_of(batchnorm="frozen", schedule="constant", lr=1e-4),),
        precision="bf16",
    )
    state = TrainState(recipe, resolve(recipe, (IndexFacts(80, classes, "f"),), 1), run)
    torch.manual_seed(1)
    model = build_model(recipe.model, classes, recipe.image).to(run.device)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():  # frozen at 0 and 1 its statistics would explode
        model.train().encode(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(run.device))
    state.enter(0, model)
    return state


@pytest.mark.gpu
def test_on_a_gpu_updates_of_many_classes_are_fused_recorded_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes = MEASURED[0].classes
    generator = torch.Generator().manual_seed(6)
    images, labels = torch.randn(ROWS, 3, 32, 32, generator=generator), torch.arange(ROWS) * 97 % classes
    labels[3] = -100
    batch = Batch(images.cuda(), labels.cuda(), torch.arange(ROWS).cuda())
    fused, separate = state_on_gpu(classes), state_on_gpu(classes)
    made: list[Tensor] = []
    assert fused.model.head is not None and separate.model.head is not None
    fused.model.head.register_forward_hook(lambda module, given, cosines: made.append(cosines))
    found = [train_step(fused, [batch], RowCounts(ROWS, ROWS - 1))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(train_step(fused, [batch], RowCounts(ROWS, ROWS - 1)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [train_step(fused, [batch], RowCounts(ROWS, ROWS - 1)) for _ in range(WARM_UP)]  # the last are replayed
    assert not made
    monkeypatch.setattr(CosineHead, "fused_type", lambda head, embeddings: None)
    for ours in found:
        theirs = train_step(separate, [batch], RowCounts(ROWS, ROWS - 1))
        assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=0.03)
        assert float(ours[3]) == 0
