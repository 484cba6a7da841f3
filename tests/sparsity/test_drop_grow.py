# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Drop and growth rules against slow, readable references."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_transformers.sparsity.drop import magnitude, soft_magnitude
from nt_transformers.sparsity.grow import at_random, by_score
from nt_transformers.sparsity.selection import keyed_generator


def generator(*key: int | str) -> torch.Generator:
    return keyed_generator(torch.device("cpu"), *key)


def stay_probabilities(weights: list[float], stay: int, temperature: float) -> list[float]:
    """Probability of each weight to stay, by going through all orders in which they can be drawn one by one."""
    powers = [abs(weight) ** temperature for weight in weights]
    result = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), stay):
        probability, left = 1.0, sum(powers)
        for position in order:
            probability *= powers[position] / left
            left -= powers[position]
        for position in order:
            result[position] += probability
    return result


@given(
    rows=st.lists(st.tuples(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_magnitude_drops_the_smallest(rows: list[tuple[float, bool]], share: float) -> None:
    weight, mask = torch.tensor([w for w, _ in rows]), torch.tensor([active for _, active in rows])
    count = int(share * int(mask.sum()))
    dropped = magnitude(weight, mask, count, generator(0))
    assert not (dropped & ~mask).any()
    assert sorted(weight[dropped].abs().tolist()) == sorted(weight[mask].abs().tolist())[:count]


@pytest.mark.parametrize(("temperature", "drop"), [(3.0, 2), (1.0, 1), (0.3, 3), (8.0, 2)])
def test_soft_magnitude_draws_without_replacement(temperature: float, drop: int) -> None:
    weights = [0.4, -0.1, 0.3, -0.25, 0.2]
    runs = 1500
    counts = torch.zeros(len(weights))
    for run in range(runs):
        dropped = soft_magnitude(
            torch.tensor(weights), torch.ones(5).bool(), drop, generator(run), temperature=temperature
        )
        assert dropped.sum() == drop
        counts += ~dropped
    expected = stay_probabilities(weights, len(weights) - drop, temperature)
    assert (counts / runs).tolist() == pytest.approx(expected, abs=5 * (0.25 / runs) ** 0.5)


@pytest.mark.parametrize("temperature", [0.01, 3.0, 1000.0])
def test_soft_magnitude_drops_zeros_first_at_random(temperature: float) -> None:
    weight = torch.tensor([1e-30, 0.0, -1e30, 0.0, 1.0, 0.0])
    mask = torch.ones(6).bool()
    drops = [soft_magnitude(weight, mask, 2, generator(run), temperature=temperature) for run in range(60)]
    assert all(not dropped[[0, 2, 4]].any() and dropped.sum() == 2 for dropped in drops)
    assert torch.stack(drops).any(dim=0)[[1, 3, 5]].all()


def test_soft_magnitude_of_equal_weights_is_uniform_and_ignores_inactive_ones() -> None:
    weight, mask = torch.full((4, 500), 0.1), torch.ones(4, 500).bool()
    mask[0] = False
    dropped = soft_magnitude(weight, mask, 600, generator(0), temperature=3.0)
    assert not dropped[0].any()
    assert dropped.sum(dim=1)[1:].tolist() == pytest.approx([200] * 3, abs=60)


def test_soft_magnitude_approaches_magnitude() -> None:
    weight, mask = torch.randn(50, 50, generator=generator(4)), torch.ones(50, 50).bool()
    soft = soft_magnitude(weight, mask, 1000, generator(0), temperature=1e4)
    assert (soft & magnitude(weight, mask, 1000, generator(0))).sum() > 980


@pytest.mark.parametrize("count", [0, 1])
def test_one_element(count: int) -> None:
    weight, mask = torch.tensor([[0.3]]), torch.tensor([[True]])
    assert magnitude(weight, mask, count, generator(0)).sum() == count
    assert soft_magnitude(weight, mask, count, generator(0), temperature=3.0).sum() == count
    assert by_score(weight, mask, count, generator(0)).sum() == count
    assert at_random(mask, count, generator(0)).sum() == count


def test_growth_by_score_takes_the_largest_of_either_sign() -> None:
    gradient = torch.tensor([[5.0, -4.0, 0.0], [3.0, -6.0, 0.0]])
    candidates = torch.tensor([[False, True, True], [True, True, True]])
    grown = by_score(gradient, candidates, 2, generator(0))
    assert grown.tolist() == [[False, True, False], [False, True, False]]


def test_growth_among_unused_embedding_rows_does_not_favour_low_ids() -> None:
    gradient = torch.zeros(100, 20)
    gradient[7] = 1.0
    grown = by_score(gradient, torch.ones(100, 20).bool(), 1020, generator(0))
    assert grown[7].all()
    assert grown[:50].sum().item() == pytest.approx(510, abs=80)
