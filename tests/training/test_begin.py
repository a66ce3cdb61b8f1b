"""How a phase begins: what the recipe left open, the weights and heads it starts from, and what a run that goes on
takes from its folder instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import FaceIndex
from facefast.data.divide import PhaseData
from facefast.evaluation.baselines import class_means
from facefast.evaluation.embed import embed_rows
from facefast.models import FaceModel, Source, checkpoint, load_source
from facefast.recipe import (
    AttributeSpec,
    AugmentSpec,
    DistillConfig,
    EvalConfig,
    ImageSpec,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
)
from facefast.training import begin
from facefast.training.step import SideInputs, TrainState
from tests.support import small
from tests.support.beginning import NOBODY, RUN, SCRATCH, Said, make_state, same

# What the recipe left open.


def faces(landmarks: bool) -> PhaseData:
    points = np.zeros((2, 5, 2), np.float32) if landmarks else None
    return PhaseData(FaceIndex.build("x", [b"a", b"b"], [0, 1], ("ann", "bo"), landmarks=points), NOBODY, NOBODY)


def source_of(backbone: str = "resnet18", **image: Any) -> Source:
    return Source("weights.pt", backbone, 64, ImageSpec(**image), frozenset({"size", "width", "mean"}), {})


@pytest.mark.parametrize(
    ("landmarks", "template"), [((True, True), "arcface"), ((True, False), "none"), ((False, False), "none")]
)
def test_faces_are_aligned_where_every_phase_knows_where_they_are(landmarks: tuple[bool, ...], template: str) -> None:
    recipe = Recipe(phases=(SCRATCH, Phase(name="second")))
    settled = begin.settle(recipe, None, None, tuple(map(faces, landmarks)))
    assert settled.image == ImageSpec(size=112, template=template)
    assert (settled.model.backbone, settled.model.embedding) == ("mobilefacenet", 0)
    typed = dataclasses.replace(recipe, image=ImageSpec(size=64, template="celeba"))
    assert begin.settle(typed, None, None, tuple(map(faces, landmarks))).image.template == "celeba"


def test_what_was_left_open_is_the_sources_and_what_was_typed_stays() -> None:
    recipe = Recipe(model=ModelConfig(source="weights.pt"), phases=(Phase(start="source"),))
    source = source_of(size=160, width=128, template="celeba", mean=(1.0, 2.0, 3.0))
    settled = begin.settle(recipe, source, None, (faces(True),))
    assert settled.image == source.image
    assert (settled.model.backbone, settled.model.embedding) == ("resnet18", 64)
    typed = dataclasses.replace(
        recipe,
        image=ImageSpec(template="none"),
        model=ModelConfig(source="weights.pt", backbone="resnet34", embedding=32),
    )
    settled = begin.settle(typed, source, None, (faces(True),))
    assert settled.image == dataclasses.replace(source.image, template="none")
    assert (settled.model.backbone, settled.model.embedding) == ("resnet34", 32)
    with pytest.raises(ValueError, match="image.size is 112, but the source model was trained with 160"):
        begin.settle(dataclasses.replace(recipe, image=ImageSpec(size=112)), source, None, (faces(True),))


def test_weights_that_do_not_tell_their_architecture_are_taken_for_the_usual_one() -> None:
    recipe = Recipe(model=ModelConfig(source="weights.pt"), phases=(Phase(start="source"),))
    assert begin.settle(recipe, source_of("", size=112), None, (faces(True),)).model.backbone == "mobilefacenet"


def test_a_student_is_the_next_shallower_network_and_sees_what_its_teacher_sees() -> None:
    phase = Phase(start="scratch", distill=DistillConfig(embeddings=1.0))
    recipe = Recipe(model=ModelConfig(teacher="run"), phases=(phase,))
    teacher = FaceModel(ModelConfig("mobilefacenet"), 0, ImageSpec(size=64, template="celeba"))
    settled = begin.settle(recipe, None, teacher, (faces(False),))
    assert settled.image == teacher.image
    assert (settled.model.backbone, settled.model.embedding) == ("mobilefacenet_short", 0)
    with torch.device("meta"):
        shallow = FaceModel(ModelConfig("resnet18"), 0, ImageSpec(size=64))
    assert begin.settle(recipe, None, shallow, (faces(True),)).model.backbone == "mobilefacenet"  # nothing is shallower
    with pytest.raises(ValueError, match="image.template is none"):
        begin.settle(dataclasses.replace(recipe, image=ImageSpec(template="none")), None, teacher, (faces(True),))


# The source and the teacher.


def test_a_run_without_source_and_teacher_reads_neither(source_run: Path) -> None:
    recipe = Recipe(phases=(SCRATCH,))
    assert begin.find_source(recipe) is None
    assert begin.find_teacher(recipe, None, RUN.device) is None
    own = Phase(start="source", distill=DistillConfig(embeddings=1.0))
    recipe = Recipe(model=ModelConfig(source=str(source_run), teacher="source"), phases=(own,))
    assert begin.find_teacher(recipe, begin.find_source(recipe), RUN.device) is None


def test_a_teacher_is_asked_as_it_is_and_one_that_is_not_there_is_named(source_run: Path, tmp_path: Path) -> None:
    phase = Phase(start="scratch", distill=DistillConfig(embeddings=1.0))
    recipe = Recipe(model=ModelConfig(teacher=str(source_run)), phases=(phase,))
    teacher = begin.find_teacher(recipe, None, RUN.device)
    assert teacher is not None and not teacher.training
    assert same(teacher, small.make_model(template="none"))
    gone = dataclasses.replace(recipe, model=ModelConfig(teacher=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="gone does not exist; give a run, checkpoint or package folder, or weights"):
        begin.find_teacher(gone, None, RUN.device)


def test_a_student_that_cannot_start_from_its_teacher_is_refused_before_any_photograph(
    source_run: Path,
) -> None:
    def recipe(backbone: str) -> Recipe:
        return Recipe(
            model=ModelConfig(backbone=backbone, teacher=str(source_run)),
            phases=(Phase(start="teacher", distill=DistillConfig(embeddings=1.0)),),
        )

    assert begin.find_teacher(recipe("auto"), None, RUN.device) is not None
    with pytest.raises(ValueError, match="resnet18 has the stages .*, the teacher mobilefacenet"):
        begin.find_teacher(recipe("resnet18"), None, RUN.device)


# The weights that a phase starts from.


def test_random_weights_are_those_of_the_phases_own_seed_and_draw_from_nobody_elses(index: FaceIndex) -> None:
    data = PhaseData(index, NOBODY, NOBODY)
    state = make_state(SCRATCH, dataclasses.replace(SCRATCH, name="again"), data=(data, data))
    before = torch.get_rng_state()
    one, two, other = (begin.starting_model(state, number, data, None, None) for number in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two, "")
    assert not same(one, other)
    torch.manual_seed(99)
    assert same(one, begin.starting_model(state, 0, data, None, None), "")


def test_a_source_gives_everything_but_the_head(index: FaceIndex, source_run: Path) -> None:
    data = PhaseData(index, NOBODY, NOBODY)
    state = make_state(
        Phase(start="source", batch_size=4, loss=LossConfig(scale=16.0)), data=(data,), source=source_run
    )
    found = begin.starting_model(state, 0, data, load_source(source_run), None)
    theirs = checkpoint.load_model(source_run)
    assert same(found, theirs)
    assert found.class_names == theirs.class_names == small.PEOPLE
    assert found.head is not None and theirs.head is not None
    assert not torch.equal(found.head.weight, theirs.head.weight)
    assert found.scale == 16.0


def test_without_a_loss_on_names_there_is_no_head(index: FaceIndex) -> None:
    data = PhaseData(index, NOBODY, NOBODY)
    phase = dataclasses.replace(
        SCRATCH, sampler="pk", pictures_per_identity=2, loss=LossConfig(weight=0.0, triplet=1.0)
    )
    found = begin.starting_model(make_state(phase, data=(data,)), 0, data, None, None)
    assert (found.head, found.num_classes, found.class_names) == (None, 0, ())


@pytest.fixture
def first_done(index: FaceIndex) -> TrainState:
    """The end of a first phase; the averaged weights are what is handed on."""
    data = PhaseData(index, NOBODY, NOBODY)
    second = Phase(name="second", head_start="previous", batch_size=4)
    state = make_state(SCRATCH, second, data=(data, data), ema=0.5)
    state.enter(0, begin.starting_model(state, 0, data, None, None))
    with torch.no_grad():
        for parameter in state.evaluated.parameters():
            parameter.add_(1.0)
    return state


def test_the_next_phase_starts_from_the_averaged_weights_of_the_one_before(
    first_done: TrainState, index: FaceIndex
) -> None:
    found = begin.starting_model(first_done, 1, PhaseData(index, NOBODY, NOBODY), None, None)
    assert same(found, first_done.evaluated, "")
    assert not same(found, first_done.model)


def test_a_run_that_goes_on_in_a_phase_does_not_start_it_from_the_phase_before_again(
    first_done: TrainState, index: FaceIndex
) -> None:
    first_done.phase_number = 1  # as `find_saved` leaves it: what is in the state is no phase's end
    assert not same(
        begin.starting_model(first_done, 1, PhaseData(index, NOBODY, NOBODY), None, None), first_done.evaluated
    )


@pytest.mark.parametrize("change", ["wanted", "other people", "not wanted"])
def test_a_head_is_taken_over_only_where_it_stands_for_the_same_people_and_is_wanted(
    first_done: TrainState, index: FaceIndex, change: str
) -> None:
    if change == "other people":
        index = dataclasses.replace(index, class_names=("ann", "bo", "dan"))
    if change == "not wanted":
        phases = (SCRATCH, dataclasses.replace(first_done.recipe.phases[1], head_start="random"))
        first_done.recipe = dataclasses.replace(first_done.recipe, phases=phases)
    found = begin.starting_model(first_done, 1, PhaseData(index, NOBODY, NOBODY), None, None)
    assert same(found, first_done.evaluated)
    assert same(found, first_done.evaluated, "head.") == (change == "wanted")
    assert found.class_names == index.class_names


@pytest.mark.parametrize("same_attributes", [True, False])
def test_attribute_heads_are_taken_over_where_they_tell_the_same(index: FaceIndex, same_attributes: bool) -> None:
    values = np.tile(np.array([[0.0], [1.0], [1.0]], np.float32), (3, 1))
    index = dataclasses.replace(index, attributes=values, attribute_names=("smile",))
    data = PhaseData(index, NOBODY, NOBODY, (AttributeSpec("smile"),))
    state = make_state(SCRATCH, Phase(name="second", batch_size=4), data=(data, data))
    state.enter(0, begin.starting_model(state, 0, data, None, None))
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    if not same_attributes:
        index = dataclasses.replace(index, attribute_names=("beard",))
        data = PhaseData(index, NOBODY, NOBODY, (AttributeSpec("beard"),))
    found = begin.starting_model(state, 1, data, None, None)
    assert same(found, state.model)
    assert same(found, state.model, "attribute_heads.") == same_attributes


def test_a_student_starts_from_its_teachers_layers(index: FaceIndex) -> None:
    data, teacher = PhaseData(index, NOBODY, NOBODY), small.make_model(template="none")
    phase = Phase(start="teacher", batch_size=4, distill=DistillConfig(embeddings=1.0))
    state = make_state(phase, data=(data,), model={"teacher": "run"})
    assert same(begin.starting_model(state, 0, data, None, teacher), teacher)


# What stands beside the batches.


def side_inputs(phase: Phase, data: PhaseData, source_run: Path, **model: str) -> SideInputs:
    state = make_state(phase, data=(data,), source=source_run, model=model)
    source = load_source(source_run)
    network = begin.starting_model(state, 0, data, source, None)
    return begin.side_inputs(state, 0, network, data, source, None, torch.tensor([3, 3, 3]))


def test_a_plain_phase_learns_from_its_batches_alone(index: FaceIndex, source_run: Path) -> None:
    found = side_inputs(Phase(start="source", batch_size=4), PhaseData(index, NOBODY, NOBODY), source_run)
    assert (found.embeddings, found.teacher, found.source) == (None, None, None)
    assert found.values is not None and found.values.shape == (9, 0)
    pulled = side_inputs(Phase(start="source", batch_size=4, l2sp=0.1), PhaseData(index, NOBODY, NOBODY), source_run)
    assert pulled.source is not None and "backbone.conv1.conv.weight" in pulled.source


def test_a_frozen_backbone_sees_each_picture_once_and_unreadable_ones_are_no_number(
    index: FaceIndex, source_run: Path
) -> None:
    phase = Phase(start="source", batch_size=4, trainable=("head",))
    found = side_inputs(phase, PhaseData(index, NOBODY, NOBODY), source_run).embeddings
    assert found is not None
    assert [row for row in range(9) if found[row].isnan().all()] == [small.BROKEN]
    rows = [row for row in range(9) if row != small.BROKEN]
    unit = torch.nn.functional.normalize(found[rows])
    assert unit.isfinite().all()
    assert float((unit @ unit.T - torch.eye(8)).max()) < 0.99  # each its own
    varied = dataclasses.replace(phase, augment=AugmentSpec(flip=0.5))
    assert side_inputs(varied, PhaseData(index, NOBODY, NOBODY), source_run).embeddings is None


def test_the_source_itself_may_teach_and_does_not_learn(index: FaceIndex, source_run: Path) -> None:
    phase = Phase(start="source", batch_size=4, distill=DistillConfig(embeddings=1.0))
    teacher = side_inputs(phase, PhaseData(index, NOBODY, NOBODY), source_run, teacher="source").teacher
    assert teacher is not None and not teacher.model.training
    assert same(teacher.model, checkpoint.load_model(source_run))
    assert teacher.cache is not None and teacher.cache[small.BROKEN].isnan().all()  # pictures that never change
    varied = dataclasses.replace(phase, augment=AugmentSpec(flip=0.5))
    teacher = side_inputs(varied, PhaseData(index, NOBODY, NOBODY), source_run, teacher="source").teacher
    assert teacher is not None and teacher.cache is None and not teacher.model.training


# Beginning.


def test_a_phase_begins_with_class_means(index: FaceIndex, source_run: Path, tmp_path: Path) -> None:
    data, said = PhaseData(index, NOBODY, NOBODY), Said()
    phase = Phase(name="tune", start="source", head_start="class_mean", batch_size=4, steps=5)
    state = make_state(phase, data=(data,), source=source_run)
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, said.log)
    assert said[0] == "phase tune: 9 pictures of 3 identities, 5 steps of 4, starts from source"
    embeddings, seen = embed_rows(
        checkpoint.load_model(source_run), index, RUN, state.precision, state.reading, batch_size=4
    )
    labels = torch.tensor(index.labels, dtype=torch.long).where(seen, -1)
    assert labels.tolist() == [0, 0, 0, 1, -1, 1, 2, 2, 2]  # bo's second picture counts for nothing
    means = class_means(embeddings, labels, 3)
    assert state.model.head is not None
    rows = torch.nn.functional.normalize(state.model.head.weight.detach())
    torch.testing.assert_close(rows, means, rtol=0, atol=1e-5)
    assert state.side_inputs.counts is not None and state.side_inputs.counts.tolist() == [3, 3, 3]
    assert state.model.training


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_embedded_before_a_phase_that_begins_with_another_head(
    index: FaceIndex, source_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    data = PhaseData(index, NOBODY, NOBODY)
    monkeypatch.setattr(begin, "embed_rows", lambda *_, **__: pytest.fail("nobody wants embeddings"))
    state = make_state(
        Phase(start="source", batch_size=4), data=(data,), source=source_run, eval=EvalConfig(baselines=wanted)
    )
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, Said().log)
    assert begin.wants_baselines(state, data) == wanted  # after the phase


def test_a_phase_that_is_taken_up_has_its_checkpoints_weights_and_embeds_nothing(
    index: FaceIndex, source_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = PhaseData(index, NOBODY, NOBODY), Said()
    phase = Phase(name="tune", start="source", head_start="class_mean", batch_size=4, steps=5)
    state = make_state(phase, data=(data,), source=source_run)
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, said.log)
    state.step = state.phase_step = 3
    state.best, state.chosen = 0.5, (0, 2)
    state.validated, state.reported = {"tune": {"top1": 0.5}}, {"class means": {"top1": 0.25, "auc": float("nan")}}
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    saved = checkpoint.save(tmp_path, 3, tensors=state.tensors(), documents=state.documents(), best=True, keep=1)
    monkeypatch.setattr(begin, "embed_rows", lambda *_, **__: pytest.fail("what it knew is in the checkpoint"))
    resumed = make_state(phase, data=(data,), source=source_run)
    begin.begin(tmp_path, resumed, 0, data, load_source(source_run), None, saved, said.log)
    assert same(resumed.model, state.model, "")
    assert (resumed.step, resumed.phase_step, resumed.best, resumed.chosen) == (3, 3, 0.5, (0, 2))
    assert resumed.validated == state.validated
    assert resumed.reported["class means"].pop("top1") == 0.25
    assert np.isnan(resumed.reported["class means"].pop("auc"))  # null in the file
    assert said[-1].endswith("5 steps of 4, goes on")


def test_a_class_without_a_readable_picture_has_no_mean(index: FaceIndex, source_run: Path, tmp_path: Path) -> None:
    rows = [0, 1, 2, small.BROKEN, 6, 7, 8]  # bo has only the picture that cannot be read
    data = PhaseData(index.select(rows), NOBODY, NOBODY)
    phase = Phase(start="source", head_start="class_mean", batch_size=4)
    state = make_state(phase, data=(data,), source=source_run)
    with pytest.raises(ValueError, match="1 of 3 classes have no readable picture"):
        begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, Said().log)


# Advice.


PHASE = Phase(name="finetune", start="scratch")


def test_advice_comes_where_it_is_needed() -> None:
    assert list(begin.advice(torch.tensor([10, 12, 9]), PHASE)) == []
    assert list(begin.advice(torch.tensor([10, 2, 1]), PHASE)) == [
        "2 of 3 identities have one or two pictures: their accuracy says little"
    ]
    (text,) = begin.advice(torch.tensor([90, 4]), PHASE)
    assert "largest identity has 90 pictures, the smallest 4: consider --phases.finetune.sampler balanced" in text
    assert list(begin.advice(torch.zeros(0, dtype=torch.long), PHASE)) == []


def test_a_margin_that_no_model_could_satisfy_is_pointed_out_before_it_is_trained() -> None:
    arc = dataclasses.replace(PHASE, loss=LossConfig(margin="arc", margin_size=0.5, scale=4.0))
    (text,) = begin.advice(torch.full((1000,), 10), arc)
    assert text.startswith("loss.margin arc 0.5 at loss.scale 4.0 is too much for 1000 identities")
    assert "would be 3% sure" in text
    assert list(begin.advice(torch.full((1000,), 10), dataclasses.replace(arc, loss=LossConfig()))) == []
    enough = dataclasses.replace(arc, loss=LossConfig(margin="arc", margin_size=0.5, scale=64.0))
    assert list(begin.advice(torch.full((1000,), 10), enough)) == []
