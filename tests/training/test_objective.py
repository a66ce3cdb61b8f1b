"""Every term of an objective reaches the weights that it should, and means are over the rows that count."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from facefast import ops
from facefast.data import Batch
from facefast.models import FaceModel, build_model, checkpoint
from facefast.models.heads import unit
from facefast.recipe import (
    AttributeSpec,
    AugmentSpec,
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
from facefast.training.distill import Teacher, caches_teacher, stage_outputs
from facefast.training.losses import effective_weights, mix, supervised_contrastive
from facefast.training.objective import Objective, RowCounts
from facefast.training.step import SideInputs, TrainState, train_step
from tests.support import small
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
RUN = Runtime(World(), CPU)
SPECS = (AttributeSpec("Male"), AttributeSpec("age", (20.0, 30.0, 40.0, 50.0)))
ROW_COUNTS = RowCounts(8, 8)


def model_with(seed: int = 1, **more: Any) -> FaceModel:
    """A tiny model whose BatchNorm has seen pictures."""
    torch.manual_seed(seed)
    config = ModelConfig(backbone=more.pop("backbone", "mobilefacenet"), embedding=16, head="cosine")
    image = ImageSpec(size=small.SIZE, template="none")
    model = build_model(config, more.pop("classes", 4), image, more.pop("names", small.NAMES), **more)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        model.encode(torch.randn(16, 3, small.SIZE, small.SIZE))
    return model.eval()


def batch_of(rows: int = 8, labels: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(rows, 3, small.SIZE, small.SIZE, generator=generator)
    return Batch(images, torch.arange(rows) % 4 if labels is None else labels, torch.arange(rows))


def phase_with(**fields: Any) -> Phase:
    return Phase(start="scratch", batchnorm="frozen", schedule="constant", lr=0.05, batch_size=8, **fields)


def loss_of(phase: Phase, batch: Batch, **more: Any) -> tuple[Objective, dict[str, float], float]:
    """The objective, its terms by name, and their weighted total."""
    values, row_counts = more.pop("values", torch.zeros(8, 0)), more.pop("row_counts", ROW_COUNTS)
    objective = Objective(more.pop("model", None) or model_with(), phase, more.pop("tasks", None), **more)
    with torch.no_grad():
        terms = objective.eval()(batch, values, row_counts.on(CPU), 1)
    return objective, dict(zip(objective.names, terms.parts.tolist(), strict=True)), float(terms.total)


def test_class_weights_follow_the_effective_number_of_pictures() -> None:
    counts = torch.tensor([1, 2, 30, 100])
    model, batch = model_with(), batch_of()
    phase = phase_with(loss=LossConfig(class_weights="effective", effective_beta=0.9, scale=8))
    _, parts, total = loss_of(phase, batch, model=model, counts=counts)
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(8 * model(batch.images), batch.labels, reduction="none")
    expected = (each * effective_weights(counts, 0.9)[batch.labels]).mean()
    assert parts["identity"] == total == pytest.approx(float(expected), rel=1e-5)
    assert total != pytest.approx(float(each.mean()), rel=1e-3)


def test_adaface_spares_pictures_of_low_norm() -> None:
    model, batch = model_with(), batch_of()
    phase = phase_with(loss=LossConfig(margin="ada", margin_size=0.4, scale=8))
    objective, parts, _ = loss_of(phase, batch, model=model)
    with torch.no_grad():
        embeddings = model.encode(batch.images)
        margin = ops.AdaFace(0.4).eval()(embeddings.norm(dim=1))
        expected = ops.reference.focal_loss(model.classify(embeddings), batch.labels, gamma=0.0, margin=margin, scale=8)
    assert parts["identity"] == pytest.approx(float(expected), rel=1e-5)
    assert set(objective.own_state()) == {"margin.mean", "margin.std"}  # a checkpoint keeps what it has seen
    objective.train()(batch, torch.zeros(8, 0), ROW_COUNTS.on(CPU), 1)
    assert objective.margin is not None and float(objective.margin.mean) != 20.0


@pytest.mark.parametrize("term", ["triplet", "contrastive"])
def test_pairs_move_the_backbone_without_a_head(term: str) -> None:
    model = model_with(classes=0, names=())
    weights: dict[str, Any] = {"weight": 0.0, term: 2.0}
    phase = phase_with(loss=LossConfig(**weights), sampler="pk")
    objective, parts, total = loss_of(phase, batch_of(), model=model)
    assert list(parts) == [term]
    assert total == pytest.approx(2 * parts[term])
    objective(batch_of(), torch.zeros(8, 0), ROW_COUNTS.on(CPU), 1).total.backward()
    grad = model.get_parameter("backbone.conv1.conv.weight").grad
    assert grad is not None and grad.abs().sum() > 0


def test_losses_mix_by_weight() -> None:
    phase = phase_with(loss=LossConfig(weight=0.5, contrastive=3.0, scale=4), sampler="pk")
    model, batch = model_with(), batch_of()
    _, parts, total = loss_of(phase, batch, model=model)
    with torch.no_grad():
        expected = supervised_contrastive(model.encode(batch.images), batch.labels, 0.1)
    assert parts["contrastive"] == pytest.approx(float(expected), rel=1e-5)
    assert total == pytest.approx(0.5 * parts["identity"] + 3 * parts["contrastive"], rel=1e-6)


def test_mixup_and_cutmix_pay_for_both_labels() -> None:
    for fields in ({"mixup": 0.4}, {"cutmix": 0.4}):
        model = model_with()
        torch.manual_seed(0)
        objective, parts, _ = loss_of(phase_with(**fields, loss=LossConfig(scale=8)), batch_of(), model=model)
        torch.manual_seed(0)
        mixed = mix(batch_of().images, fields.get("mixup", 0), fields.get("cutmix", 0))
        labels = batch_of().labels
        with torch.no_grad():
            logits = 8 * objective.model(mixed.images)
        both = [torch.nn.functional.cross_entropy(logits, of) for of in (labels, labels[mixed.partner])]
        expected = mixed.weight * both[0] + (1 - mixed.weight) * both[1]
        assert parts["identity"] == pytest.approx(float(expected), rel=1e-4)


def test_attributes_are_learnt_where_they_are_known_and_nowhere_else() -> None:
    model = model_with(attributes=SPECS)
    values = torch.tensor(
        [[1.0, 20], [0, 30], [torch.nan, 50], [1, torch.nan], [torch.nan, torch.nan]] + [[0, 40.0]] * 3
    )
    row_counts = RowCounts(8, 8, (6, 6))
    tasks = TaskConfig(attributes=("Male", "age"), weights=(0.5, 2.0), gamma=0.0)
    objective, parts, total = loss_of(
        phase_with(), batch_of(), model=model, values=values, row_counts=row_counts, tasks=tasks
    )
    with torch.no_grad():
        logits = model.attribute_logits(model.encode(batch_of().images))
    assert logits is not None
    male, age = logits[:, 0], logits[:, 1:]
    cross = torch.nn.functional.binary_cross_entropy_with_logits
    known = ~values[:, 0].isnan()
    assert parts["Male"] == pytest.approx(float(cross(male[known], values[known, 0])), rel=1e-5)
    known = ~values[:, 1].isnan()
    steps = (values[known, 1:] > torch.tensor([[20.0, 30.0, 40.0]])).float()  # older than, older than, older than
    expected = cross(age[known], steps, reduction="none").sum(1).mean()
    assert parts["age"] == pytest.approx(float(expected), rel=1e-5)
    assert total == pytest.approx(parts["identity"] + 0.5 * parts["Male"] + 2 * parts["age"], rel=1e-5)
    nobody = torch.full((8, 2), torch.nan)
    objective.model.zero_grad()
    objective(batch_of(), nobody, RowCounts(8, 8, (0, 0)).on(CPU), 1).total.backward()
    heads = objective.model.attribute_heads
    assert heads is not None
    for parameter in (heads.weight, heads.biases):
        assert parameter.grad is not None and not parameter.grad.any()


def test_an_age_is_told_by_the_steps_that_are_likelier_than_not() -> None:
    heads = model_with(attributes=SPECS).attribute_heads
    assert heads is not None
    logits = torch.tensor([[2.0, -1, -1, -1], [-2, 1, 1, -1], [0.5, 1, 1, 1]])
    told = heads.read(logits)
    assert told[:, 1].tolist() == [20, 40, 50]
    torch.testing.assert_close(told[:, 0], torch.sigmoid(logits[:, 0]))
    values = torch.tensor([[1.0, 50.0]] * 3 + [[0.0, 20.0]])
    heads.start_from(values)
    assert torch.sigmoid(heads.biases).tolist() == pytest.approx([4 / 6] * 4)


def test_uncertainty_weighs_losses_by_what_it_learns() -> None:
    model = model_with(attributes=SPECS[:1])
    values, row_counts = torch.tensor([[1.0], [0.0]] * 4), RowCounts(8, 8, (8,))
    tasks = TaskConfig(attributes=("Male",), weighting="uncertainty", gamma=0.0)
    objective = Objective(model, phase_with(), tasks)
    assert objective.log_variances is not None
    with torch.no_grad():
        objective.log_variances.copy_(torch.tensor([0.7, -0.4]))
    terms = objective(batch_of(), values, row_counts.on(CPU), 1)
    s = torch.tensor([0.7, -0.4])
    torch.testing.assert_close(terms.total, ((-s).exp() * terms.parts + s / 2).sum())
    terms.total.backward()
    torch.testing.assert_close(objective.log_variances.grad, -(-s).exp() * terms.parts + 0.5)
    assert [name for name, _ in objective.own_parameters()] == ["log_variances"]


@pytest.mark.parametrize("kind", ["coral", "mmd"])
def test_alignment_is_between_pictures_with_and_without_a_name(kind: str) -> None:
    labels = torch.tensor([0, 1, 2, 3, -100, -100, -100, -100])
    objective, parts, _ = loss_of(
        phase_with(align=kind, align_weight=2.0), batch_of(labels=labels), row_counts=RowCounts(8, 4)
    )
    assert parts["align"] > 0
    _, alone, _ = loss_of(phase_with(align=kind, align_weight=2.0), batch_of())  # no target domain in this batch
    assert alone["align"] == 0
    plain = loss_of(phase_with(), batch_of(labels=labels), row_counts=RowCounts(8, 4), model=objective.model)[1]
    assert parts["identity"] == pytest.approx(plain["identity"])


def distilled(config: DistillConfig, **more: Any) -> tuple[Objective, dict[str, float]]:
    teacher = more.pop("teacher", None) or model_with(seed=9)
    student = more.pop("student", None) or model_with(seed=1, backbone="mobilefacenet_half")
    phase = phase_with(distill=config, loss=LossConfig(scale=8))
    student.scale = teacher.scale = 8
    objective, parts, _ = loss_of(phase, more.pop("batch", batch_of()), model=student, teacher=Teacher(teacher), **more)
    return objective, parts


def test_a_student_is_drawn_to_the_teachers_embeddings_and_answers() -> None:
    teacher, batch = model_with(seed=9), batch_of()
    objective, parts = distilled(DistillConfig(embeddings=1.0, logits=0.5, temperature=3.0), teacher=teacher)
    with torch.no_grad():
        own, theirs = objective.model.encode(batch.images), teacher.encode(batch.images)
        cosines = (unit(own) * unit(theirs)).sum(1)
        soft, hard = (
            torch.log_softmax(8 / 3 * m.classify(e), 1) for m, e in ((teacher, theirs), (objective.model, own))
        )
        divergence = (soft.exp() * (soft - hard)).sum(1).mean() * 9
    assert parts["distill_embeddings"] == pytest.approx(float((1 - cosines).mean()), rel=1e-4)
    assert parts["distill_logits"] == pytest.approx(float(divergence), rel=1e-4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective(batch, torch.zeros(8, 0), ROW_COUNTS.on(CPU), 1).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in objective.state_dict())


def test_a_teacher_with_longer_embeddings_is_reached_through_a_projection_that_a_checkpoint_keeps() -> None:
    torch.manual_seed(2)
    image = ImageSpec(size=small.SIZE, template="none")
    teacher = build_model(ModelConfig(backbone="mobilefacenet", embedding=24), 0, image).eval()
    objective, parts = distilled(DistillConfig(embeddings=1.0), teacher=teacher)
    assert "distill_embeddings" in parts
    assert objective.own_state()["distillation.projection.weight"].shape == (24, 16)
    assert [name for name, _ in objective.own_parameters()] == ["distillation.projection.weight"]


@pytest.mark.parametrize("match", ["attention", "projected"])
def test_stages_are_compared_one_by_one_and_a_student_equal_to_its_teacher_has_nothing_to_learn(
    match: Literal["attention", "projected"],
) -> None:
    config = DistillConfig(features=1.0, match=match)
    objective, parts = distilled(config)
    assert parts["distill_features"] > 0
    with stage_outputs(objective.model) as own:
        objective.model.encode(batch_of().images)
    assert len(own) == 4  # stem and three stages, not the embedding
    assert objective.distillation is not None
    assert len(objective.distillation.convolutions) == (4 if match == "projected" else 0)
    objective(batch_of(), torch.zeros(8, 0), ROW_COUNTS.on(CPU), 1).total.backward()
    grad = objective.model.get_parameter("backbone.blocks.0.conv.0.weight").grad
    assert grad is not None and grad.abs().sum() > 0
    if match == "attention":
        twin = model_with(seed=9)
        assert distilled(config, student=twin, teacher=model_with(seed=9))[1]["distill_features"] < 1e-6
    assert not objective.model.backbone._forward_hooks and not any(
        module._forward_hooks for module in objective.model.modules()
    )


def test_cached_answers_of_a_teacher_equal_its_fresh_ones() -> None:
    teacher = model_with(seed=9)
    config = DistillConfig(embeddings=1.0, logits=1.0)
    _, fresh = distilled(config, teacher=teacher)
    with torch.no_grad():
        cache = teacher.encode(batch_of().images)
    student = model_with(seed=1, backbone="mobilefacenet_half")
    student.scale = 8
    phase = phase_with(distill=config, loss=LossConfig(scale=8))
    known = Teacher(teacher, torch.cat([torch.full((3, 16), torch.nan), cache]))
    shifted = batch_of()._replace(rows=torch.arange(8) + 3)
    _, parts, _ = loss_of(phase, shifted, model=student, teacher=known)
    assert parts == pytest.approx(fresh, rel=1e-5)
    assert caches_teacher(dataclasses.replace(phase, augment=AugmentSpec()))
    assert not caches_teacher(dataclasses.replace(phase, augment=AugmentSpec(flip=0.5)))
    assert not caches_teacher(dataclasses.replace(phase, distill=DistillConfig(features=1.0)))


def test_teachers_of_other_people_or_other_pictures_are_refused() -> None:
    others = model_with(seed=9, names=("a", "b", "c", "d"))
    with pytest.raises(
        ValueError, match=r"distill\.logits 1\.0 compares the 4 identities .* the teacher's 4, which are"
    ):
        distilled(DistillConfig(logits=1.0), teacher=others)
    distilled(DistillConfig(embeddings=1.0), teacher=others)  # embeddings need no names
    image = ImageSpec(size=small.SIZE, template="none", color="bgr")
    bgr = build_model(ModelConfig(backbone="mobilefacenet", embedding=16), 0, image).eval()
    with pytest.raises(ValueError, match="takes other pictures"):
        distilled(DistillConfig(embeddings=1.0), teacher=bgr)


def train_on(phase: Phase, steps: int = 6, side: SideInputs | None = None, **fields: Any) -> TrainState:
    """A few updates on one batch."""
    recipe = Recipe(
        image=ImageSpec(size=small.SIZE, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16, head="cosine", source="file"),
        phases=(dataclasses.replace(phase, start="source"),),
        precision="fp32",
        **fields,
    )
    state = TrainState(recipe, resolve(recipe, (IndexFacts(64, 4, "f"),), 1), RUN)
    state.enter(0, model_with(), side)
    for _ in range(steps):
        train_step(state, [batch_of()], ROW_COUNTS)
    return state


def test_l2sp_keeps_the_backbone_near_the_source_and_leaves_the_head_alone() -> None:
    source = {name: value.clone() for name, value in model_with().state_dict().items()}
    distances, heads = [], []
    for strength in (0.0, 20.0):
        phase = phase_with(l2sp=strength, momentum=0.0, weight_decay=0.0, loss=LossConfig(scale=8))
        phase = dataclasses.replace(phase, lr=0.02)
        state = train_on(phase, side=SideInputs(source=source))
        moved = [(p - source[n]).norm() for n, p in state.model.named_parameters() if n.startswith("backbone")]
        distances.append(float(torch.stack(moved).norm().detach()))
        heads.append(float((state.model.get_parameter("head.weight") - source["head.weight"]).norm().detach()))
    assert distances[1] < 0.6 * distances[0]
    assert heads[1] > 0.5 * heads[0]


def test_pruned_weights_are_zero_in_the_end_and_after_a_resume(tmp_path: Any) -> None:
    from facefast.training.prune import sparsity_of

    state = train_on(phase_with(prune=0.5, steps=8), steps=8)
    assert sparsity_of(state.model) == pytest.approx(0.5, abs=0.01)
    path = checkpoint.save(tmp_path, 8, tensors=state.tensors(), documents=state.documents(), best=True, keep=1)
    assert sparsity_of(checkpoint.load_model(path)) == sparsity_of(state.model)
    assert sparsity_of(train_on(phase_with(steps=8), steps=8).model) == 0


def test_stochastic_depth_leaves_blocks_out_in_training_only() -> None:
    image = ImageSpec(size=small.SIZE, template="none")
    config = ModelConfig(backbone="mobilefacenet", embedding=16, drop_path=0.9)
    model = build_model(config, 4, image)
    with torch.no_grad():
        model(torch.randn(16, 3, small.SIZE, small.SIZE))
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        one, two = model(batch_of().images), model(batch_of().images)
        assert not torch.equal(one, two)
        model.eval()
        assert torch.equal(model(batch_of().images), model(batch_of().images))
    with pytest.raises(ValueError, match="drop_path 0.1 has no effect on resnet18"):
        build_model(ModelConfig(backbone="resnet18", drop_path=0.1), 4, image)


def half_an_update(rank: int, out: str, world: int) -> int:
    """One update of a run with attributes, a projection, learnt weights and terms that compare pictures, on this rank's
    part of the batch; of two ranks neither has pictures of different people."""
    with process.start() as run:
        values = torch.tensor([[1.0], [torch.nan], [0.0], [1.0], [torch.nan], [0.0], [1.0], [0.0]])
        loss = LossConfig(scale=8, triplet=0.5, contrastive=0.5)
        phase = phase_with(distill=DistillConfig(embeddings=1.0), loss=loss, accumulate=2, sampler="pk")
        recipe = Recipe(
            image=ImageSpec(size=small.SIZE, template="none"),
            model=ModelConfig(backbone="mobilefacenet", embedding=16, head="cosine", teacher="teacher"),
            phases=(phase,),
            tasks=TaskConfig(attributes=("Male",), weighting="uncertainty", gamma=0.0),
            precision="fp32",
        )
        state = TrainState(recipe, resolve(recipe, (IndexFacts(64, 4, "f"),), world), run)
        torch.manual_seed(3)
        image = ImageSpec(size=small.SIZE, template="none")
        teacher = build_model(ModelConfig(backbone="mobilefacenet", embedding=24), 0, image).eval()
        state.enter(0, model_with(attributes=SPECS[:1]), SideInputs(values=values, teacher=Teacher(teacher)))
        whole = batch_of()
        parts = [Batch(*(column[k + 2 * rank :: 2 * world] for column in whole)) for k in range(2)]
        train_step(state, parts, RowCounts(8, 8, (6,)))
        if rank == 0:
            found = state.model.state_dict() | {f"own.{n}": p for n, p in state.objective.own_parameters()}
            torch.save({name: value.detach().clone() for name, value in found.items()}, out)
    return 0


def test_two_ranks_make_the_update_that_one_makes(tmp_path: Any) -> None:
    for world in (1, 2):
        assert run_ranks(half_an_update, world, str(tmp_path / f"{world}.pt"), world) == [0] * world
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for name in one:  # halves are summed in another order, which moves weights of about 1 by a few of their last digits
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=5e-6, msg=name)
    assert one["own.log_variances"].any()
