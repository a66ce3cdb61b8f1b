"""A head whose classes lie on several ranks beside one that every rank has whole: the same training, the same files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast import train
from facefast.data import Batch
from facefast.data.drawn import synthetic
from facefast.models import build_model, checkpoint
from facefast.models.heads import CosineHead
from facefast.models.spread import Spread
from facefast.ops import class_block
from facefast.recipe import (
    AugmentSpec,
    DistillConfig,
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    resolve,
)
from facefast.runtime import files, process
from facefast.runtime.process import Runtime
from facefast.training import objective
from facefast.training.losses import batch_hard_triplet
from facefast.training.objective import RowCounts
from facefast.training.step import SideInputs, TrainState, train_step
from tests.support.ranks import run_ranks

IDENTITIES = 7
"""A number that neither 2 nor 4 divides."""
TINY = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=mobilefacenet_half",
    "--model.batchnorm=sync",
    "--model.head=cosine",
    "--model.embedding=16",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
    "--phases.scratch.batch-size=16",
    "--phases.scratch.steps=4",
    "--save-every=2",
    "--phases.scratch.clip-grad=1",
    "--phases.scratch.schedule=constant",
    "--lr=1e-5",  # a random network amplifies what fp32 rounds; the head, which it does not, learns a lot faster
    "--phases.scratch.head-lr=30000",
    "--phases.scratch.loss.margin=arc",
    "--ema=0.5",
    "--phases.scratch.loss.margin-size=0.3",
    "--phases.scratch.loss.scale=8",
)
SHARD = "--model.shard-head=ranks"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(IDENTITIES, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def training(rank: int, root: str, out: str, *more: str) -> int:
    return train.main([*TINY, f"--data.root={root}", f"--out={out}", *more])


def trained(ranks: int, drawn: Path, out: Path, *more: str) -> Path:
    assert run_ranks(training, ranks, str(drawn), str(out), *more) == [0] * ranks
    return out


def stopped(run: Path, out: Path) -> Path:
    """A copy of a run as it was halfway."""
    shutil.copytree(run, out, symlinks=True)
    shutil.rmtree(checkpoint.of_step(out, 4))
    for link in ("last", "best"):
        files.replace_link(out / "checkpoints" / link, checkpoint.of_step(out, 2).name)
    return out


def losses(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["split"] == "train"])


def measured(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] not in ("train",) and "top1" in line][-1]
    return {name: last[name] for name in ("loss", "top1", "top5", "ece", "per_class")}


def tensors(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    path = checkpoint.of_step(run, step)
    return {f"{stem} {name}": t for stem in ("model", "optimizer", "ema")
            for name, t in checkpoint.read_tensors(path, stem).items()}  # fmt: skip


def assert_close(one: Path, other: Path) -> None:
    """All tensors of two runs' last checkpoints; gradients of a random network are float32's rounding, amplified."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        near = 2e-2 if value.shape == (IDENTITIES, 16) else 5e-2
        value, true = value.double(), theirs[name].double()
        assert (value - true).norm() <= near * true.norm() + 1e-6, (name, float((value - true).norm() / true.norm()))


def test_a_run_that_shares_its_head_ends_as_one_that_does_not_and_goes_on_at_any_number_of_ranks(
    drawn: Path, tmp_path: Path
) -> None:
    """Losses, weights, the optimiser's state, averages, what is measured; from 2 ranks to 1, 2 and 4, from 4 to 2."""
    whole = trained(1, drawn, tmp_path / "whole")
    shared = {ranks: trained(ranks, drawn, tmp_path / f"on-{ranks}", SHARD) for ranks in (2, 4)}
    for run in shared.values():
        torch.testing.assert_close(losses(run), losses(whole), rtol=1e-4, atol=0)
        assert_close(run, whole)
        for name, value in measured(whole).items():
            assert measured(run)[name] == pytest.approx(value, rel=1e-3), name
        model = checkpoint.load_model(run)  # as evaluate, predict and export do
        assert model.head is not None and model.head.weight.shape == (IDENTITIES, 16)
    for before, after in ((2, 2), (2, 4), (2, 1), (4, 2), (4, 3)):
        run, same = stopped(shared[before], tmp_path / f"{before}-to-{after}"), whole
        trained(after, drawn, run, SHARD)
        if before == after:
            assert all(torch.equal(value, tensors(shared[before])[name]) for name, value in tensors(run).items())
        if (
            after < before
        ):  # in two passes, so that BatchNorm has other pictures: as with a whole head, and no other way
            same = stopped(shared[before], tmp_path / f"{before}-to-{after}-whole")
            trained(after, drawn, same, "--model.shard-head=none")
            plan = files.read_json(checkpoint.of_step(run, 4) / "plan.json")["phases"][0]
            # Of 3 ranks each takes 3 pictures at a time; 2 of 18 places are padding.
            assert (plan["passes"], plan["batch_per_rank"]) == (2, {1: 8, 2: 4, 3: 3}[after])
        torch.testing.assert_close(losses(run), losses(same), rtol=1e-4, atol=0)
        assert_close(run, same)
    # One process has the whole head, and finds what several could not.
    done = tmp_path / "on-2"
    assert files.read_json(done / "checkpoints" / "best" / "model.json")["thresholds"] is None
    trained(1, drawn, done, "--model.shard-head=none")
    assert files.read_json(done / "checkpoints" / "best" / "model.json")["thresholds"] is not None


# ---------------------------------------------------------------------------------------------
# Updates, in every kind of loss and optimiser

CLASSES = 11
ADAM = {"lr": 1e-7}
"""Adam's first step is as long for a gradient that is 0 but for its rounding: what it remembers is compared instead."""
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of the loss and of the phase
    "arc": ({"margin": "arc", "margin_size": 0.3, "scale": 8.0}, {"clip_grad": 0.5}),
    "ada focal": ({"margin": "ada", "margin_size": 0.3, "scale": 8.0, "gamma": 1.5}, {"optimizer": "adamw"} | ADAM),
    "smooth weights": (
        {"label_smoothing": 0.1, "scale": 4.0, "class_weights": "effective", "contrastive": 0.5, "triplet": 0.5},
        {"optimizer": "adam", "sampler": "pk"} | ADAM,
    ),
    "cos mixed": ({"margin": "cos", "margin_size": 0.2, "scale": 8.0}, {"mixup": 0.4, "clip_grad": 0.5, "lr": 1e-5}),
    "head alone": ({"scale": 8.0}, {"trainable": ("head",), "clip_grad": 1.0}),
}


def state_of(
    run: Runtime, loss: dict[str, Any], phase: dict[str, Any], shard: Any, classes: int = CLASSES, dropout: float = 0.1
) -> TrainState:
    """Before its first update, with the same weights whoever holds them."""
    fields: dict[str, Any] = {"start": "scratch", "batch_size": 8, "lr": 0.02, "weight_decay": 0.01}
    fields |= {"batchnorm": "frozen", "schedule": "constant", "augment": AugmentSpec(rotation=5)}
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16, head="cosine", dropout=dropout, shard_head=shard),
        phases=(Phase(loss=LossConfig(**loss), **(fields | phase)),),
        precision="fp32",
        ema=0.5,
    )
    state = TrainState(recipe, resolve(recipe, (IndexFacts(80, classes, "f"),), run.world.size), run)
    torch.manual_seed(1)
    model = build_model(recipe.model, 0, recipe.image, world=state.sharing)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        # A kink at 0 turns a pre-activation's rounding, -9e-8 here and 4e-7 there, into 0.4 % of a gradient.
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.ones_(module.weight)
    model.train()
    with torch.no_grad():
        model.encode(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(2)
    model.set_classes(classes)
    state.enter(0, model, SideInputs(counts=torch.arange(1, classes + 1)))
    return state


def update(state: TrainState, seed: int, passes: int = 2, classes: int = CLASSES) -> torch.Tensor:
    """One, of pictures that do not depend on the number of ranks: 8 for each pass, one of which is not named. Where
    they do not divide among the ranks, rows -1 fill up the last one, as they do a sampler's parts."""
    world, batches = state.run.world, []
    for k in range(passes):
        generator = torch.Generator().manual_seed(100 * seed + k)
        labels = torch.randint(classes, (8,), generator=generator)
        labels[5] = -100
        whole = Batch(torch.randn(8, 3, 32, 32, generator=generator), labels, torch.arange(8))
        each = -(-8 // world.size)
        place = torch.arange(world.rank * each, (world.rank + 1) * each)
        own = [column[place.clamp(max=7)] for column in whole]  # padding comes with another row's picture
        own[1:] = (column.where(place < 8, none) for column, none in zip(own[1:], (-100, -1), strict=True))
        batches.append(Batch(*own))
    return train_step(state, batches, RowCounts(8 * passes, 7 * passes))


def rows(state: TrainState, named: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors, of what has a row for each class those of a sharing rank."""
    block = class_block(CLASSES, state.run.world.size, state.run.world.rank)
    found = {f"{file} {name}": tensor for file, tensors in named.items() for name, tensor in tensors.items()}
    for name, tensor in found.items():
        if isinstance(tensor, Spread):
            assert tensor.rows == CLASSES
            found[name] = tensor.block
        elif tensor.shape == (CLASSES, 16) and len(block) < CLASSES:
            found[name] = tensor[block.start : block.stop]
    return found


def smallest_gap(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> float:
    """How far a batch-hard triplet loss is from another choice of pictures, or from where a row begins to count."""
    vectors = torch.nn.functional.normalize(embeddings.detach().double())
    distances, found = torch.cdist(vectors, vectors), [2.0]
    for row, label in enumerate(labels.tolist()):
        far = distances[row][labels == label].sort(descending=True).values.tolist()
        near = distances[row][(labels != label) & (labels >= 0)].sort().values.tolist()
        if label >= 0 and len(far) > 1 and near:  # one of the same is itself
            found += [
                abs(margin + far[0] - near[0]),
                far[0] - far[1],
                *(b - a for a, b in itertools.pairwise(near[:2])),
            ]
    return min(found)


def updates_agree(rank: int) -> int:
    gaps = []

    def triplet(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
        gaps.append(smallest_gap(embeddings, labels, margin))
        return batch_hard_triplet(embeddings, labels, margin)

    setattr(objective, "batch_hard_triplet", triplet)  # noqa: B010 -- it is not exported
    with process.start("cpu") as run:
        for name, (loss, phase) in VARIANTS.items():
            whole, shared = (state_of(run, loss, phase, shard) for shard in ("none", "ranks"))
            head, other = shared.model.head, whole.model.head
            assert (
                head is not None
                and other is not None
                and len(head.weight) == len(class_block(CLASSES, run.world.size, rank))
            )
            assert torch.equal(head.weight, other.weight[head.block.start : head.block.stop])
            for seed in range(2):
                torch.testing.assert_close(update(shared, seed), update(whole, seed), rtol=2e-5, atol=1e-6, msg=name)
            ours, theirs = rows(shared, shared.tensors()), rows(whole, whole.tensors())
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                error = (value - theirs[key]).abs().max() if value.numel() else torch.zeros(())
                largest = max(0.02, float(theirs[key].abs().max())) if value.numel() else 1.0
                assert error <= 1e-4 * largest, (name, key, float(error), largest)
    assert len(gaps) == 8 and min(gaps) > 1e-4, gaps  # no choice that rounding could turn
    return 0


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
def test_updates_of_a_shared_head_are_those_of_a_whole_one_on_as_many_ranks(ranks: int) -> None:
    """Weights, averages, momenta and statistics after two updates of two passes each, to what a random network makes of
    float32's rounding; the gradients themselves are compared in tests/ops/test_sharded_focal.py."""
    assert run_ranks(updates_agree, ranks) == [0] * ranks


def overflows_on_one_rank(rank: int) -> int:
    with process.start("cpu") as run:
        state = state_of(run, {"scale": 8.0}, {}, "ranks")
        update(state, 0)
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        assert state.shared_weight is not None
        if rank == 1:
            state.shared_weight.register_hook(lambda grad: grad * torch.inf)
        assert update(state, 1)[3] == 1  # an update that is not finite
        assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    return 0


def test_a_gradient_of_one_ranks_classes_that_is_not_finite_stops_the_update_on_all_ranks() -> None:
    assert run_ranks(overflows_on_one_rank, 2) == [0, 0]


# ---------------------------------------------------------------------------------------------
# Some classes at a time

MANY = 300


def draws(rank: int, out: str) -> int:
    with process.start("cpu") as run:
        loss = {"margin": "cos", "margin_size": 0.2, "scale": 8.0, "negatives": 0.25, "class_weights": "effective"}
        # Adam's first step is as long for a gradient of 1e-9 as for any, and its sign is rounding: a short one.
        for kind, rate in (("sgd", 0.02), ("adamw", 1e-4)):
            state = state_of(run, loss, {"optimizer": kind, "lr": rate}, "ranks", MANY, dropout=0.0)
            head = state.model.head
            assert isinstance(head, CosineHead)
            for seed in range(2):
                before = head.weight.detach().clone()
                stats = update(state, seed, classes=MANY)
                moved = (head.weight != before).any(1).nonzero()[:, 0] + head.block.start
                slots = state.optimizer.state[head.weight]
                held = [v for v in slots.values() if v.dim() == 2]
                assert head.weight.shape == before.shape and head.drawn is None
                assert held and all(v.shape == before.shape for v in held)
                torch.save((stats, moved, head.weight.detach().clone()), f"{out}/{kind}-{seed}-{run.world.size}-{rank}")
    return 0


def test_drawn_classes_alone_move_and_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        assert run_ranks(draws, ranks, str(tmp_path)) == [0] * ranks
    for kind, seed in itertools.product(("sgd", "adamw"), range(2)):
        found = {r: [torch.load(tmp_path / f"{kind}-{seed}-{r}-{k}") for k in range(r)] for r in (1, 2, 4)}
        stats, moved, weight = found[1][0]
        assert 0.1 * MANY < len(moved) < 0.45 * MANY  # weight decay would have moved all
        for ranks in (2, 4):
            assert torch.equal(torch.cat([each[1] for each in found[ranks]]), moved)
            torch.testing.assert_close(found[ranks][0][0][:2], stats[:2], rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.cat([each[2] for each in found[ranks]]), weight, rtol=1e-4, atol=2e-5)


def test_a_draw_takes_about_the_part_that_was_asked_for_and_all_classes_of_the_update() -> None:
    head = CosineHead(4, 20_000)
    labels = torch.tensor([3, 19_999, -100, 3])
    chosen = head.draw(labels, 0.1, key=5)
    assert {3, 19_999} <= set(chosen.tolist()) and torch.equal(chosen, chosen.unique())
    assert len(chosen) == pytest.approx(2000, rel=0.1)
    assert not torch.equal(head.draw(labels, 0.1, key=6), chosen)
    assert torch.equal(head.draw(labels, 0.1, key=5), chosen)


@pytest.mark.parametrize(
    ("model", "loss", "phase", "said"),
    [
        ({"head": "linear"}, {}, {}, "shard_head ranks needs model.head cosine"),
        ({}, {}, {"optimizer": "lamb"}, "optimizer lamb"),
        ({}, {"weight": 0.0, "triplet": 1.0}, {"sampler": "pk"}, "shard_head ranks has no effect"),
        ({"shard_head": "none"}, {"negatives": 0.5}, {}, "negatives 0.5 needs model.shard_head ranks"),
        ({}, {"negatives": 0.5, "label_smoothing": 0.1}, {}, "label_smoothing 0.1 is over all classes"),
        ({}, {"negatives": 0.0}, {}, "negatives is 0.0"),
        ({"source": "weights.pth"}, {}, {"start": "source"}, "set eval.baselines False"),
        ({"teacher": "run"}, {}, {"distill": DistillConfig(logits=1.0)}, "use distill.embeddings"),
    ],
)
def test_what_a_shared_head_cannot_do_is_refused_by_name(
    model: dict[str, Any], loss: dict[str, Any], phase: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(
            model=ModelConfig(**({"head": "cosine", "shard_head": "ranks"} | model)),
            phases=(Phase(**({"start": "scratch"} | phase), loss=LossConfig(**loss)),),
        )


@pytest.mark.parametrize("classes", (7, 4100, 8193))
def test_random_weights_do_not_depend_on_who_holds_them(classes: int) -> None:
    torch.manual_seed(3)
    whole = CosineHead(3, classes).weight
    for ranks in (2, 3):
        parts: list[torch.Tensor] = []
        for rank in range(ranks):
            torch.manual_seed(3)
            parts.append(CosineHead(3, classes, class_block(classes, ranks, rank)).weight)
        assert torch.equal(torch.cat(parts), whole)
