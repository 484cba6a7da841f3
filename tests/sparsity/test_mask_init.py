# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The first masks: by chance or by the weights that a network already has."""

import copy

import pytest
import torch
from torch import nn

from nt_transformers.sparsity import Sparsifier, SparsityConfig


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


def sparsify(network: nn.Module, **fields: object) -> Sparsifier:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    config = SparsityConfig(**{"method": "rigl", "density": 0.4, "update_interval": 2, **fields})  # type: ignore[arg-type]
    return Sparsifier(network, optimizer, config, total_steps=40)


def train(network: nn.Module, sparsifier: Sparsifier, steps: int) -> None:
    inputs = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        network(inputs).square().mean().backward()
        sparsifier.optimizer.step()
        sparsifier.step()
        sparsifier.optimizer.zero_grad()


def test_magnitude_keeps_the_largest_of_each_tensor() -> None:
    network = make_network()
    dense = copy.deepcopy(network.state_dict())
    for name, mask in sparsify(network, mask_init="magnitude").masks.items():
        assert dense[name][mask].abs().min() >= dense[name][~mask].abs().max()
        assert torch.equal(network.get_parameter(name), dense[name] * mask)


@pytest.mark.parametrize("mask_init", ["random", "magnitude", "soft_magnitude"])
def test_counts_are_exact(mask_init: str) -> None:
    reference = sparsify(make_network()).summary()
    summary = sparsify(make_network(), mask_init=mask_init).summary()
    assert summary == reference
    assert summary.nonzeros == round(0.4 * summary.numel)


def test_soft_magnitude_favours_large_weights_and_draws_anew_for_each_tensor() -> None:
    network = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(2)))
    with torch.no_grad():
        weight = torch.rand(100, 100, generator=torch.Generator().manual_seed(0))
        for layer in network:
            layer.weight.copy_(weight)
    first, second = sparsify(network, mask_init="soft_magnitude", density=0.5).masks.values()
    assert not torch.equal(first, second)
    for mask in (first, second):
        quartiles = [mask[(weight >= low) & (weight < low + 0.25)].float().mean() for low in (0.0, 0.25, 0.5, 0.75)]
        assert quartiles == sorted(quartiles)
        assert quartiles[0] < 0.1 < 0.8 < quartiles[3]


@pytest.mark.parametrize("mask_init", ["magnitude", "soft_magnitude"])
def test_a_sparse_network_keeps_its_trained_weights(mask_init: str) -> None:
    network = make_network()
    train(network, sparsify(network), 30)
    trained = copy.deepcopy(network.state_dict())
    again = sparsify(network, mask_init=mask_init, seed=5)
    torch.testing.assert_close(network.state_dict(), trained, rtol=0, atol=0)
    assert again.density == pytest.approx(0.4, abs=1e-3)


def test_a_continued_sparsifier_touches_no_weight() -> None:
    whole = make_network()
    train(whole, sparsify(whole), 10)
    network = make_network()
    sparsifier = sparsify(network)
    train(network, sparsifier, 5)
    before, state = copy.deepcopy(network.state_dict()), sparsifier.state_dict()
    resumed = Sparsifier(network, sparsifier.optimizer, sparsifier.config, total_steps=40, state=state)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert resumed.steps == 5
    train(network, resumed, 5)
    torch.testing.assert_close(network.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask_init='largest'.*random, magnitude, soft_magnitude"):
        SparsityConfig(mask_init="largest")  # type: ignore[arg-type]
    network = make_network()
    with torch.no_grad():
        network[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="non-finite weight of 2.weight"):
        sparsify(network, mask_init="magnitude")
