# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Saving and resuming: bit for bit the run that was never stopped, and no state of another run."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from sparse_training import METHODS, OPTIMIZERS, Bare, frozen_sgd, make_config, make_network, train_step

from nt_transformers.sparsity import Sparsifier


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load without unpickling code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors by safetensors, everything else by JSON."""
    parts = ("masks", "explored")
    tensors = load(save({f"{part}/{name}": tensor for part in parts for name, tensor in state[part].items()}))
    rest = json.loads(json.dumps({key: value for key, value in state.items() if key not in parts}))
    for part in parts:
        rest[part] = {key.removeprefix(f"{part}/"): t for key, t in tensors.items() if key.startswith(f"{part}/")}
    return rest


def make_sparsifier(*shapes: tuple[int, ...], total_steps: int = 9, method: str = "rigl", **fields: Any) -> Sparsifier:
    model = Bare(*shapes)
    return Sparsifier(model, frozen_sgd(model), make_config(method, **fields), total_steps=total_steps)


@pytest.mark.parametrize("optimizer_name", ["momentum", "adam"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transport", [through_torch, through_safetensors])
def test_resume_equals_the_run_that_was_never_stopped(
    method: str, optimizer_name: str, transport: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    model = make_network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config(method, exclude=["7.*"]), total_steps=14)
    for step in range(7):
        train_step(model, optimizer, sparsifier, step)
    saved = through_torch({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    topology = transport(sparsifier.state_dict())

    resumed = make_network(seed=1)
    resumed_optimizer = OPTIMIZERS[optimizer_name](resumed.parameters())
    resumed_sparsifier = Sparsifier(resumed, resumed_optimizer, make_config(method, exclude=["7.*"]), total_steps=14)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed_sparsifier.load_state_dict(topology)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

    for step in range(7, 14):
        train_step(model, optimizer, sparsifier, step)
        train_step(resumed, resumed_optimizer, resumed_sparsifier, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, resumed_sparsifier.masks[name]) for name, mask in sparsifier.masks.items())
    assert sparsifier.summary() == resumed_sparsifier.summary()


def test_each_update_draws_anew() -> None:
    def masks_after(update: int) -> torch.Tensor:
        sparsifier = make_sparsifier((20, 20), method="set", update_interval=1, drop_schedule="constant")
        sparsifier.load_state_dict(sparsifier.state_dict() | {"steps": update - 1})
        sparsifier.step()
        return sparsifier.masks["weights.0"]

    assert torch.equal(masks_after(1), masks_after(1))
    assert not torch.equal(masks_after(1), masks_after(2))


def test_state_has_one_bit_per_weight() -> None:
    model = Bare((123, 45))
    state = Sparsifier(model, frozen_sgd(model), make_config("rigl"), total_steps=9).state_dict()
    for part in ("masks", "explored"):
        assert state[part]["weights.0"].dtype == torch.uint8
        assert state[part]["weights.0"].numel() == (123 * 45 + 7) // 8


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_sparsifier((4, 6), seed=1, density=0.7), "fields differ: density, seed"),
        (make_sparsifier((4, 6), total_steps=10), "total_steps=9"),
        (make_sparsifier((4, 6), (2, 2)), r"another model: weights\.1"),
        (make_sparsifier((6, 4)), r"shapes differ: weights\.0"),
    ],
)
def test_state_of_another_run_is_refused(other: Sparsifier, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sparsifier((4, 6)).load_state_dict(other.state_dict())


def test_damaged_state_is_refused() -> None:
    sparsifier = make_sparsifier((4, 6))
    state = sparsifier.state_dict()
    for part in state:
        with pytest.raises(ValueError, match=f"lacks {part}"):
            sparsifier.load_state_dict({key: value for key, value in state.items() if key != part})
    for part in ("masks", "explored"):
        with pytest.raises(ValueError, match=rf"damaged: {part} of weights\.0"):
            sparsifier.load_state_dict(state | {part: {"weights.0": torch.zeros(2, dtype=torch.uint8)}})
