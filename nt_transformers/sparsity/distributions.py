# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How many non-zeros each tensor gets: layer densities, and whole numbers that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .config import Distribution


def nonzero_counts(shapes: Sequence[Sequence[int]], density: float, distribution: Distribution) -> list[int]:
    """Number of non-zeros of each tensor; together `round(density * total)`.

    Args:
        shapes: the shape of each tensor.
        density: share of weights kept over all tensors, in (0, 1].
        distribution: `uniform`, or `erk` (Erdos-Renyi-Kernel, section 3 of "Rigging the Lottery", Evci et al., 2020).
    """
    sizes = [math.prod(shape) for shape in shapes]
    densities = erk_densities(shapes, density) if distribution == "erk" else [density] * len(shapes)
    shares = [d * size for d, size in zip(densities, sizes, strict=True)]
    return apportion(shares, round(density * sum(sizes)), sizes)


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Layer densities `min(1, scale * sum(shape) / prod(shape))`, scaled to give the density over all layers."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    budget = density * sum(sizes)
    open_layers = set(range(len(shapes)))
    while open_layers:
        scale = budget / sum(raw[i] * sizes[i] for i in open_layers)
        full = {i for i in open_layers if scale * raw[i] >= 1}
        if not full:
            break
        # Cutting a layer off at 1 leaves more for the others: the scale grows, so none of the full layers opens again.
        open_layers -= full
        budget -= sum(sizes[i] for i in full)
    return [scale * raw[i] if i in open_layers else 1.0 for i in range(len(shapes))]


def apportion(shares: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Round the shares to whole numbers of the given total by largest remainder, none above its limit."""
    assert total <= sum(limits)
    counts = [min(math.floor(share), limit) for share, limit in zip(shares, limits, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    missing = total - sum(counts)
    assert missing >= 0
    while missing > 0:
        for i in order:
            if missing > 0 and counts[i] < limits[i]:
                counts[i] += 1
                missing -= 1
    return counts
