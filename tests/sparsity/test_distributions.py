# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Layer densities against an independent solver; whole numbers that add up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nt_transformers.sparsity.distributions import apportion, erk_densities, nonzero_counts


dimensions = st.integers(1, 60)
shape_lists = st.lists(
    st.one_of(
        st.tuples(dimensions, dimensions), st.tuples(dimensions, dimensions, st.integers(1, 7), st.integers(1, 7))
    ),
    min_size=1,
    max_size=8,
)
densities = st.floats(0.001, 1.0)


def erk_by_bisection(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """min(1, scale * sum / prod), the scale found by bisection on the number of non-zeros."""

    def at(scale: float) -> list[float]:
        return [min(1.0, scale * sum(shape) / math.prod(shape)) for shape in shapes]

    sizes = [math.prod(shape) for shape in shapes]
    low, high = 0.0, float(max(sizes))
    for _ in range(200):
        middle = (low + high) / 2
        nonzeros = sum(d * size for d, size in zip(at(middle), sizes, strict=True))
        low, high = (middle, high) if nonzeros < density * sum(sizes) else (low, middle)
    return at(high)


@given(shapes=shape_lists, density=densities)
def test_erk_equals_bisection(shapes: list[tuple[int, ...]], density: float) -> None:
    assert erk_densities(shapes, density) == pytest.approx(erk_by_bisection(shapes, density), rel=1e-9)


@given(shapes=shape_lists, density=densities)
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_counts_add_up_and_stay_within_one_of_their_share(
    distribution: str, shapes: list[tuple[int, ...]], density: float
) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    counts = nonzero_counts(shapes, density, distribution)  # type: ignore[arg-type]
    assert sum(counts) == round(density * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    expected = [density] * len(shapes) if distribution == "uniform" else erk_by_bisection(shapes, density)
    for count, d, size in zip(counts, expected, sizes, strict=True):
        assert abs(count - d * size) <= 1 + 1e-6


def test_erk_differs_from_uniform_and_fills_narrow_layers() -> None:
    shapes = [(10, 2), (200, 200)]
    assert nonzero_counts(shapes, 0.2, "erk")[0] == 20
    assert nonzero_counts(shapes, 0.2, "uniform") == [4, 8000]


def test_largest_remainders_are_rounded_up_within_limits() -> None:
    assert apportion([1.2, 2.7, 3.1], 7, [9, 9, 9]) == [1, 3, 3]
    assert apportion([1.2, 2.7, 3.1], 7, [9, 2, 9]) == [2, 2, 3]
    assert apportion([0.5, 5.5], 6, [0, 9]) == [0, 6]
