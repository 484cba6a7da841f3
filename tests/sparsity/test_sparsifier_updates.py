# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""One topology update against a reference that goes weight by weight, and whole runs against their schedules."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_training import OPTIMIZERS, Bare, frozen_sgd, make_config, make_network, train_step
from torch import Tensor
from torch.optim import SGD, Adam

from nt_transformers.sparsity import Sparsifier


def reference_update(
    weights: list[float], scores: list[float], active: set[int], count: int, allow_regrow: bool
) -> tuple[set[int], set[int]]:
    """What a magnitude drop removes and a growth by score adds, one weight at a time; no ties expected."""
    dropped: set[int] = set()
    for _ in range(count):
        dropped.add(min(active - dropped, key=lambda i: abs(weights[i])))
    inactive = set(range(len(weights))) - active
    candidates = inactive | dropped if allow_regrow else inactive
    grown: set[int] = set()
    for _ in range(count):
        grown.add(max(candidates - grown, key=lambda i: abs(scores[i])))
    return dropped, grown


def positions(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    density=st.floats(0.2, 1.0),
    rate=st.floats(0.01, 1.0),
    growth=st.sampled_from(["gradient", "momentum"]),
    allow_regrow=st.booleans(),
    grow_init=st.sampled_from(["zero", "keep"]),
    optimizer_state=st.sampled_from(["reset", "keep"]),
)
def test_update_equals_the_reference(
    size: int, density: float, rate: float, growth: str, allow_regrow: bool, grow_init: str, optimizer_state: str
) -> None:
    model = Bare((size, 3))
    config = make_config(
        "rigl",
        density=density,
        update_interval=1,
        drop_fraction=rate,
        drop_schedule="constant",
        growth=growth,
        allow_regrow=allow_regrow,
        grow_init=grow_init,
        optimizer_state=optimizer_state,
    )
    optimizer = frozen_sgd(model, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, config, total_steps=10)
    optimizer.step()
    model.draw_gradients()
    optimizer.step()  # The momentum now ranks the weights differently from the gradient.
    weight = model.weights[0]
    active, before = positions(sparsifier.masks["weights.0"]), weight.flatten().tolist()
    momentum = optimizer.state[weight]["momentum_buffer"].flatten().tolist()
    scores = momentum if growth == "momentum" else weight.grad.flatten().tolist()

    sparsifier.step()

    count = math.ceil(round(rate * len(active), 6))
    count = count if allow_regrow else min(count, 3 * size - len(active))
    count = 0 if len(active) == 3 * size else count
    dropped, grown = reference_update(before, scores, active, count, allow_regrow)
    kept = active - dropped
    assert positions(sparsifier.masks["weights.0"]) == kept | grown
    valued = kept | (grown & dropped if grow_init == "keep" else set())
    assert weight.flatten().tolist() == [before[i] if i in valued else 0.0 for i in range(3 * size)]
    cleared = dropped | grown if optimizer_state == "reset" else grown - active
    expected = [0.0 if i in cleared else value for i, value in enumerate(momentum)]
    assert optimizer.state[weight]["momentum_buffer"].flatten().tolist() == expected


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw"])
def test_reset_clears_every_moment_of_dropped_and_grown_weights_only(optimizer_name: str) -> None:
    model = make_network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("rigl", update_interval=3), total_steps=12)
    for step in range(2):
        train_step(model, optimizer, sparsifier, step)
    old = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    train_step(model, optimizer, sparsifier, 2)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 3
        if name in old:
            changed = old[name] ^ sparsifier.masks[name]
            assert changed.any()
            moments = [value for key, value in state.items() if key != "step"]
            assert len(moments) == (3 if optimizer_name == "adam" else 2)
            assert all((moment[changed] == 0).all() for moment in moments)
            # A weight without any gradient so far has moments of zero anyway.
            had_gradient = parameter.grad != 0
            assert all((moment[~changed & had_gradient] != 0).all() for moment in moments)


def test_keep_leaves_the_moments_of_adam() -> None:
    model = Bare((9, 9))
    optimizer = Adam(model.parameters(), lr=0.0)
    config = make_config("neurotrails_llm", update_interval=1)
    sparsifier = Sparsifier(model, optimizer, config, total_steps=9)
    optimizer.step()
    moments = {key: value.clone() for key, value in optimizer.state[model.weights[0]].items()}
    assert sparsifier.step()
    assert all(torch.equal(value, moments[key]) for key, value in optimizer.state[model.weights[0]].items())


def test_random_growth_ignores_the_gradient_and_covers_everything() -> None:
    model = Bare((100, 100))
    config = make_config("set", density=0.5, update_interval=1, drop_schedule="constant")
    sparsifier = Sparsifier(model, frozen_sgd(model), config, total_steps=9)
    old = sparsifier.masks["weights.0"].clone()
    sparsifier.step()
    grown = sparsifier.masks["weights.0"] & ~old
    gradient = model.weights[0].grad.abs()
    assert grown.sum() == 2500
    assert gradient[grown].mean().item() == pytest.approx(gradient[~old].mean().item(), rel=0.05)
    assert grown[:50].sum().item() == pytest.approx(1250, abs=150)


def test_soft_magnitude_drop_is_in_effect() -> None:
    """Unlike the magnitude drop it spares some weights below the median, and by temperature more or fewer."""

    def spared(**fields: Any) -> int:
        model = Bare((100, 100))
        config = make_config("rigl", density=0.5, update_interval=1, drop_schedule="constant", **fields)
        sparsifier = Sparsifier(model, frozen_sgd(model), config, total_steps=9)
        old, magnitude = sparsifier.masks["weights.0"].clone(), model.weights[0].detach().abs().clone()
        sparsifier.step()
        below = magnitude < magnitude[old].median()
        return int((sparsifier.masks["weights.0"] & old & below).sum())

    assert spared(drop="magnitude") == 0
    counts = [spared(drop="soft_magnitude", temperature=temperature) for temperature in (6.0, 3.0, 1.0)]
    assert 0 < counts[0] < counts[1] < counts[2] < 1250


CLOSED_FORMS = {
    "cosine": lambda progress: 0.1 + (0.6 - 0.1) / 2 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 0.6 - (0.6 - 0.1) * progress,
    "constant": lambda progress: 0.6,
}


@pytest.mark.parametrize("stop_fraction", [0.5, 1.0])
@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_drop_counts_of_a_run_follow_the_schedule(schedule: str, stop_fraction: float) -> None:
    model = Bare((60, 50))
    config = make_config(
        "rigl",
        update_interval=3,
        stop_fraction=stop_fraction,
        drop_schedule=schedule,
        drop_fraction=0.6,
        final_drop_fraction=0.1,
    )
    sparsifier = Sparsifier(model, frozen_sgd(model), config, total_steps=60)
    nonzeros = sparsifier.summary().nonzeros
    for step in range(1, 61):
        model.draw_gradients()
        # All weights away from zero, as training would bring them.
        model.weights[0].data = torch.randn(60, 50, generator=model.generator)
        old = sparsifier.masks["weights.0"].clone()
        updated = sparsifier.step()
        due = step % 3 == 0 and step <= stop_fraction * 60 and step < 60
        expected = math.ceil(CLOSED_FORMS[schedule](step / (stop_fraction * 60)) * nonzeros - 1e-6) if due else 0
        assert updated == due
        assert int((old & ~sparsifier.masks["weights.0"]).sum()) == expected


PRUNING = {
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("schedule", PRUNING)
def test_density_of_gmp_follows_the_schedule_and_ends_at_the_target(schedule: str, distribution: str) -> None:
    shapes = [(40, 30), (7, 3), (11, 5, 3, 3)]
    model = Bare(*shapes)
    config = make_config("gmp", update_interval=3, density_schedule=schedule, distribution=distribution, density=0.17)
    sparsifier = Sparsifier(model, frozen_sgd(model), config, total_steps=41)
    numel, target = sum(map(math.prod, shapes)), round(0.17 * sum(map(math.prod, shapes)))
    assert sparsifier.density == 1
    for step in range(1, 42):
        old = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        magnitudes = {name: weight.detach().abs() for name, weight in model.named_parameters()}
        sparsifier.step()
        # 31 is the last step of the first 75 %, so the tenth update is the last.
        pruned = PRUNING[schedule](min(step // 3, 10) / 10)
        assert sparsifier.summary().nonzeros == round(numel - pruned * (numel - target))
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~old[name]).any()
            if (old[name] & ~mask).any() and mask.any():
                assert magnitudes[name][old[name] & ~mask].max() <= magnitudes[name][mask].min()


def test_without_regrow_nothing_dropped_comes_back_at_once() -> None:
    model = Bare((30, 30))
    # The largest gradients are those of the smallest active weights: regrowing them would be tempting.
    model.weights[0].grad = 1 / model.weights[0].detach().abs()
    for allow_regrow, comes_back in ((False, False), (True, True)):
        fresh = Bare((30, 30))
        fresh.weights[0].grad = model.weights[0].grad
        config = make_config("rigl", update_interval=1, allow_regrow=allow_regrow)
        sparsifier = Sparsifier(fresh, SGD(fresh.parameters(), lr=0.0), config, total_steps=10)
        old = sparsifier.masks["weights.0"].clone()
        smallest = old & (fresh.weights[0].detach().abs() < 0.01)
        assert smallest.any()
        sparsifier.step()
        assert bool((sparsifier.masks["weights.0"] & smallest).any()) is comes_back
