# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Selection by score and at random against slow, readable references."""

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nt_transformers.sparsity import selection
from nt_transformers.sparsity.selection import keyed_generator, largest, random_subset


CPU = torch.device("cpu")


def generator(*key: int | str) -> torch.Generator:
    return keyed_generator(CPU, *key)


def positions(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Scores of few distinct values, so with many ties; candidates; a feasible count."""
    size = draw(st.integers(1, 40))
    scores = draw(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0]), min_size=size, max_size=size))
    candidates = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(scores), torch.tensor(candidates), draw(st.integers(0, sum(candidates)))


@given(problem=problems(), seed=st.integers(0, 1000))
def test_largest_takes_the_scores_that_a_full_sort_takes(problem: tuple[Tensor, Tensor, int], seed: int) -> None:
    scores, candidates, count = problem
    chosen = largest(scores, candidates, count, generator(seed))
    assert chosen.dtype == torch.bool
    assert not (chosen & ~candidates).any()
    assert sorted(scores[chosen].tolist(), reverse=True) == sorted(scores[candidates].tolist(), reverse=True)[:count]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_ties_the_choice_is_unique(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = torch.rand(shape, dtype=dtype, generator=generator(1))
    everywhere = torch.ones(shape, dtype=torch.bool)
    order = scores.flatten().argsort(descending=True).tolist()
    for count in range(scores.numel() + 1):
        assert positions(largest(scores, everywhere, count, generator(2))) == set(order[:count])


def test_scores_near_the_largest_float() -> None:
    big = torch.finfo(torch.float32).max
    scores = torch.tensor([big, -big, 0.0, big])
    candidates = torch.tensor([True, True, True, False])
    assert positions(largest(scores, candidates, 2, generator(0))) == {0, 2}


def test_strided_scores() -> None:
    scores = torch.arange(24.0).view(4, 6).t()
    chosen = largest(scores, torch.ones(6, 4, dtype=torch.bool), 5, generator(0))
    assert sorted(scores[chosen].tolist()) == [19.0, 20.0, 21.0, 22.0, 23.0]


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("key", [torch.abs, torch.neg])
def test_keys_of_a_tensor_in_pieces(
    piece: int, key: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_PIECE", piece)
    scores = torch.randn(8, 6, generator=generator(4))
    before = scores.clone()
    candidates = torch.rand(8, 6, generator=generator(5)) < 0.7
    order = [place for place in key(scores).flatten().argsort(descending=True).tolist() if candidates.flatten()[place]]
    for count in range(len(order) + 1):
        assert positions(largest(scores, candidates, count, generator(6), key)) == set(order[:count])
    assert torch.equal(scores, before)


def test_ties_do_not_favour_a_position() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    everywhere = torch.ones(6, dtype=torch.bool)
    runs = 2000
    counts = sum((largest(scores, everywhere, 4, generator(run)).long() for run in range(runs)), torch.zeros(6).long())
    assert counts[[0, 5]].tolist() == [runs, runs]
    assert counts[1:5].tolist() == pytest.approx([runs / 2] * 4, abs=5 * (runs / 4) ** 0.5)


def test_every_subset_is_equally_likely() -> None:
    candidates = torch.tensor([[True, False, True], [True, True, False]])
    runs = 6000
    counts = Counter(frozenset(positions(random_subset(candidates, 2, generator(run)))) for run in range(runs))
    assert counts.keys() == {frozenset(pair) for pair in itertools.combinations([0, 2, 3, 4], 2)}
    assert list(counts.values()) == pytest.approx([runs / 6] * 6, abs=5 * (runs / 6) ** 0.5)


def test_large_random_subset_is_exact_and_spread() -> None:
    size = 300_000
    chosen = random_subset(torch.ones(size, dtype=torch.bool), 100_001, generator(3))
    assert chosen.sum() == 100_001
    assert chosen[: size // 2].sum().item() == pytest.approx(50_000, abs=1000)


def test_generators_differ_by_every_part_of_the_key() -> None:
    keys: list[tuple[int | str, ...]] = [(0, 1, "a", "drop"), (1, 1, "a", "drop"), (0, 2, "a", "drop")]
    keys += [(0, 1, "b", "drop"), (0, 1, "a", "grow"), (0, 11, "", "drop"), (0, 1, "1", "drop")]
    draws = {tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(4, generator=generator(*keys[0])), torch.rand(4, generator=generator(*keys[0])))
