"""Pruning: as many weights as scheduled are 0 and stay so under momentum; a resumed run prunes the same ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from facefast.models import FaceModel
from facefast.training.prune import RAMP, Pruner, prunable, scheduled_sparsity, sparsity_of
from facefast.training.transfer import freeze_stages
from tests.support import small

STEPS = 12
TARGET = 0.6


def pictures(step: int) -> Tensor:
    return torch.randn(8, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: FaceModel, fused: bool = True) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=fused)


def step(model: FaceModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    labels = torch.arange(8) % len(small.NAMES)
    nn.functional.cross_entropy(model(pictures(number)), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: FaceModel, target: float | None = TARGET, until: int = STEPS) -> torch.optim.Optimizer:
    """The first `until` of `STEPS` steps of a phase."""
    model.train()
    optimizer = optimizer_of(model)
    pruner = Pruner(model, target) if target is not None else None
    for number in range(until):
        step(model, optimizer, number)
        if pruner is not None:
            pruner.update((number + 1) / STEPS)
    return optimizer


def test_the_schedule_rises_from_nothing_ever_slower_and_then_holds() -> None:
    values = [scheduled_sparsity(0.8, k / 100) for k in range(101)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[int(100 * RAMP) :] == [0.8] * (101 - int(100 * RAMP))
    assert scheduled_sparsity(0.8, RAMP / 2) == pytest.approx(0.8 * (1 - 0.5**3))  # Zhu and Gupta, equation 1
    assert values[10] - values[0] > 3 * (values[70] - values[60])


def test_exactly_the_scheduled_part_of_every_layer_is_zero_and_stays_so_under_momentum() -> None:
    model = small.make_model().train()
    optimizer, pruner = optimizer_of(model), Pruner(model, TARGET)
    dead: dict[str, Tensor] = {}
    for number in range(STEPS):
        step(model, optimizer, number)
        pruner.update((number + 1) / STEPS)
        sparsity = scheduled_sparsity(TARGET, (number + 1) / STEPS)
        for name, weight in prunable(model).items():
            assert int((weight == 0).sum()) == round(sparsity * weight.numel()), (name, number)
            assert not weight[dead[name]].any() if name in dead else True
            dead[name] = weight.detach() == 0
    assert sparsity_of(model) == pytest.approx(TARGET, abs=1e-3)
    buffers = [optimizer.state[weight]["momentum_buffer"] for weight in prunable(model).values()]
    assert all(
        bool(buffer[weight == 0].any()) for buffer, weight in zip(buffers, prunable(model).values(), strict=True)
    )


def test_training_without_a_pruner_leaves_nothing_zero_and_moves_what_was() -> None:
    model = small.make_model()
    optimizer = train(model, target=None)
    assert sparsity_of(model) == 0
    with torch.no_grad():
        Pruner(model, TARGET).update(1.0)
    assert sparsity_of(model) == pytest.approx(TARGET, abs=1e-3)
    step(model, optimizer, STEPS)
    assert sparsity_of(model) < 0.01


def test_the_smallest_weights_are_the_ones_that_go() -> None:
    model = small.make_model()
    before = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    Pruner(model, TARGET).update(1.0)
    for name, weight in prunable(model).items():
        gone = weight == 0
        assert before[name][gone].abs().max() < before[name][~gone].abs().min()
        assert torch.equal(weight[~gone], before[name][~gone])


@pytest.mark.parametrize("backbone", ["mobilefacenet", "resnet18", "iresnet18"])
def test_head_depthwise_and_first_layers_are_left_alone_and_most_weights_are_not(backbone: str) -> None:
    model = small.make_model(backbone)
    untouched = {name: value.clone() for name, value in model.state_dict().items() if name not in prunable(model)}
    Pruner(model, TARGET).update(1.0)
    for name, value in untouched.items():
        assert torch.equal(model.state_dict()[name], value), name
    first = next(name for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d))
    assert f"backbone.{first}.weight" in untouched
    assert "head.weight" in untouched
    depthwise = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert all(f"{name}.weight" in untouched for name in depthwise)
    assert bool(depthwise) == (backbone == "mobilefacenet")
    assert sum(w.numel() for w in prunable(model).values()) > 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stopped", [3, 10])
def test_a_resumed_run_has_the_same_weights_to_the_bit(stopped: int) -> None:
    whole = small.make_model()
    train(whole)
    begun = small.make_model()
    optimizer = train(begun, until=stopped)
    resumed = small.make_model().train()
    again = optimizer_of(resumed)
    pruner = Pruner(resumed, TARGET)  # as `TrainState.enter` makes it, before the checkpoint is read
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruner.adopt()
    for number in range(stopped, STEPS):
        step(resumed, again, number)
        pruner.update((number + 1) / STEPS)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_moving_average_is_not_touched_until_it_is_asked_for() -> None:
    model = small.make_model().train()
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner = Pruner(model, TARGET)
    pruner.update(1.0)
    evaluated = average.module
    assert isinstance(evaluated, FaceModel)
    assert sparsity_of(evaluated) == 0
    pruner.apply_to(evaluated)
    assert sparsity_of(evaluated) == sparsity_of(model)


def test_layers_that_do_not_learn_are_not_pruned() -> None:
    model = small.make_model()
    freeze_stages(model, ("last:2",))
    Pruner(model, TARGET).update(1.0)
    learns = {name: bool((weight == 0).any()) for name, weight in prunable(model).items()}
    assert learns == {name: weight.requires_grad for name, weight in prunable(model).items()}
    freeze_stages(model, ("head",))
    with pytest.raises(ValueError, match="nothing can be pruned.*trainable"):
        Pruner(model, TARGET)


def test_wrong_numbers_are_refused() -> None:
    model = small.make_model()
    for target in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="it must lie between 0 and 1"):
            Pruner(model, target)
    with pytest.raises(ValueError, match=r"progress is 1.5; it must lie in \[0, 1\]"):
        Pruner(model, TARGET).update(1.5)


@pytest.mark.gpu
def test_an_update_never_waits_for_the_device() -> None:
    model = small.make_model().cuda().train()
    pruner = Pruner(model, TARGET)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in (0.1, 0.5, 1.0):
            pruner.update(progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sparsity_of(model) == pytest.approx(TARGET, abs=1e-3)
