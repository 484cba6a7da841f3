# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Learning-rate schedules and optimizers."""

import math
import re
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import TrainingConfig
from nt_transformers.training.optimization import build_optimizer, learning_rate


def config(**fields: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "output_dir": "unused",
        "sparsity": SparsityConfig(),
        "max_steps": 100,
        "learning_rate": 2e-3,
    }
    return TrainingConfig(**defaults | fields)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_schedules_equal_those_of_transformers(ours: str, theirs: str, options: dict[str, float]) -> None:
    run = config(lr_schedule=ours, min_lr_ratio=options.get("min_lr_rate", 0.0))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run.learning_rate)
    reference = get_scheduler(theirs, optimizer, 10, run.max_steps, scheduler_specific_kwargs=options)
    for step in range(1, run.max_steps + 1):
        optimizer.step()
        reference.step()
        assert learning_rate(step, run) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)


def test_schedule_reaches_its_end_points() -> None:
    run = config()
    assert learning_rate(10, run) == run.learning_rate
    assert learning_rate(100, run) == pytest.approx(0.1 * run.learning_rate)
    assert learning_rate(1, config(warmup_ratio=0.0, lr_schedule="constant")) == run.learning_rate
    middle = learning_rate(55, run)
    assert middle == pytest.approx(run.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))


@pytest.mark.parametrize("milestones", [[0.25, 0.5, 0.75], [0.333], []])
def test_multistep_equals_that_of_torch(milestones: list[float]) -> None:
    run = config(lr_schedule="multistep", warmup_ratio=0.0, lr_milestones=milestones, lr_decay=0.2, learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    steps = [round(share * run.max_steps) for share in milestones]
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.2)
    for step in range(1, run.max_steps + 1):
        assert learning_rate(step, run) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_multistep_warms_up() -> None:
    run = config(lr_schedule="multistep", warmup_ratio=0.1, lr_milestones=[0.5], learning_rate=0.1)
    found = [learning_rate(step, run) for step in (1, 10, 11, 50, 51, 100)]
    assert found == pytest.approx([0.01, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_the_papers_write_it(nesterov: bool) -> None:
    """v = m v + g; w -= lr (g + m v) with Nesterov's momentum, w -= lr v without; g includes the weight decay."""
    weight = torch.nn.Linear(3, 2, bias=False)
    run = config(optimizer="sgd", learning_rate=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    built = build_optimizer(weight, run)
    expected, velocity = weight.weight.detach().clone(), torch.zeros(2, 3)
    for seed in range(3):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        weight.weight.grad = gradient.clone()
        built.step()
        decayed = gradient + 0.01 * expected
        velocity = 0.8 * velocity + decayed
        expected -= 0.1 * (decayed + 0.8 * velocity if nesterov else velocity)
    torch.testing.assert_close(weight.weight.detach(), expected)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_weight_decay_spares_norms_and_biases(optimizer: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    built = build_optimizer(model, config(optimizer=optimizer, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    built.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("global_batch_size", 0),
        ("per_device_batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", 1.5),
        ("min_lr_ratio", -0.1),
        ("lr_decay", 1.0),
        ("lr_milestones", [0.5, 1.0]),
        ("momentum", 1.0),
        ("adam_beta1", 1.0),
        ("adam_epsilon", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("logging_steps", 0),
        ("eval_steps", 0),
        ("checkpoint_steps", -5),
        ("keep_last", 0),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}={re.escape(repr(value))}: "):
        config(**{field: value})


def test_nesterov_without_momentum_is_named() -> None:
    with pytest.raises(ValueError, match="^nesterov=True: needs a momentum"):
        config(momentum=0.0)


def test_batch_that_does_not_divide_is_named() -> None:
    run = config(global_batch_size=48, per_device_batch_size=16)
    assert run.accumulation_steps(3) == 1
    with pytest.raises(ValueError, match=r"global_batch_size=48: make it a multiple of .* 16 x 2"):
        run.accumulation_steps(2)


def test_topology_takes_the_seed_of_the_run_unless_it_has_its_own() -> None:
    assert config(seed=7).sparsity.seed == 7
    assert config(seed=7, sparsity=SparsityConfig(seed=3)).sparsity.seed == 3
