"""Optimisers and schedules: shapes of the curves, LAMB against its definition, steps that must change nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Literal

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from facefast.recipe import Phase
from facefast.training.optim import Lamb, build_optimizer, rate_factor

Optimizer = Literal["sgd", "adam", "adamw", "lamb"]


def curve(phase: Phase, steps: int = 100, steps_per_epoch: int = 10) -> list[float]:
    return [rate_factor(phase, step, steps, steps_per_epoch) for step in range(steps)]


def test_step_schedule_halves_every_five_epochs() -> None:
    factors = curve(Phase(schedule="step", step_epochs=5, step_gamma=0.5))
    assert factors[:50] == [1.0] * 50
    assert factors[50:] == [0.5] * 50


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_decaying_schedules_start_at_the_peak_and_fall_monotonically(schedule: Literal["cosine", "poly"]) -> None:
    factors = curve(Phase(schedule=schedule))
    assert factors[0] == 1.0
    assert all(a > b for a, b in zip(factors, factors[1:], strict=False))
    assert factors[-1] < 0.01


def test_warm_up_rises_linearly_to_the_peak_before_the_schedule_begins() -> None:
    factors = curve(Phase(schedule="cosine", warmup=0.1))
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0


def test_one_cycle_rises_then_falls_to_almost_nothing() -> None:
    factors = curve(Phase(schedule="onecycle"))
    assert factors[0] == pytest.approx(1 / 25)
    assert max(factors) == factors[30] == 1.0
    assert factors[-1] < 0.01


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_every_optimizer_minimises_and_leaves_weights_alone_when_a_gradient_is_not_finite(
    name: Optimizer,
) -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, -2.0]]))
    phase = Phase(optimizer=name, lr=0.05)
    optimizer = build_optimizer(phase, [{"params": [weight], "weight_decay": 0.0}], torch.device("cpu"))
    scaler = GradScaler("cpu", init_scale=1.0)
    for _ in range(100):
        scaler.scale(weight.square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
    assert weight.square().sum() < 1.0
    before = weight.detach().clone()
    moments = [t.clone() for t in optimizer.state[weight].values() if torch.is_tensor(t)]
    scaler.scale((weight * float("nan")).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(weight, before)
    after = [t for t in optimizer.state[weight].values() if torch.is_tensor(t)]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_lamb_takes_the_step_that_its_paper_defines() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = Lamb([weight], lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    gradient = torch.tensor([0.5, -1.0], dtype=torch.float64)
    weight.grad = gradient.clone()
    optimizer.step()
    first = 0.1 * gradient / (1 - 0.9)
    second = 0.001 * gradient**2 / (1 - 0.999)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    update = first / (second.sqrt() + 1e-6) + 0.01 * start
    expected = start - 0.1 * (math.sqrt(5) / update.norm()) * update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)


def test_lamb_follows_its_paper_through_many_steps_rates_and_a_weight_of_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, generator=generator, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    decays = (0.1, 0.0)
    optimizer = Lamb([{"params": [p], "weight_decay": d} for p, d in zip(parameters, decays, strict=True)], lr=0.1)
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(1, 7):
        rate = 0.1 / step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for k, (weight, decay) in enumerate(zip(weights, decays, strict=True)):
            gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            parameters[k].grad = gradient.clone()
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            update = first[k] / (1 - 0.9**step) / ((second[k] / (1 - 0.999**step)).sqrt() + 1e-6) + decay * weight
            trust = weight.norm() / update.norm() if weight.norm() > 0 else 1.0  # else zeros could never move
            weights[k] = weight - rate * trust * update
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        # The step count is float32, and with it the bias corrections.
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_a_first_update_that_is_skipped_leaves_nothing_behind(name: Optimizer, dtype: torch.dtype) -> None:
    junk = [torch.full((1000,), 1e30) for _ in range(50)]  # what an uninitialised buffer would find
    del junk
    ends = []
    for gradients in ((math.inf, 1.0, 2.0), (1.0, 2.0)):
        weight = torch.nn.Parameter(torch.full((1000,), 0.5))
        phase = Phase(optimizer=name, lr=0.05, weight_decay=0.01)
        group = {"params": [weight], "lr": phase.lr, "peak_lr": phase.lr, "weight_decay": phase.weight_decay}
        optimizer = build_optimizer(phase, [group], torch.device("cpu"))
        scale = 2.0**14 if dtype == torch.float16 else 1.0
        scaler = GradScaler("cpu", init_scale=scale)
        for gradient in gradients:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = (weight * gradient).sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update() if dtype == torch.float16 else scaler.update(1.0)
            optimizer.zero_grad(set_to_none=True)
        ends.append(weight.detach().clone())
    assert ends[0].isfinite().all()
    assert torch.equal(ends[0], ends[1])  # as if the skipped one had not been


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_an_update_and_a_checkpoint_of_it_load_no_compiler(name: str) -> None:
    code = f"""
import sys, torch
from facefast.recipe import Phase
from facefast.training.optim import build_optimizer
weight = torch.nn.Parameter(torch.ones(3))
group = {{"params": [weight], "lr": 0.1, "weight_decay": 0.0}}
optimizer = build_optimizer(Phase(optimizer={name!r}), [group], torch.device("cpu"))
weight.square().sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert (weight < 1).all() and not weight.grad
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
