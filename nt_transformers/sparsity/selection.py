# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Choosing positions of a tensor by score or at random, in time linear in its size, with an exact count."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


# Below this size a bracket costs more than it saves.
_SMALL = 1 << 14


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator seeded by the key alone: the same draws on every rank and after every resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def largest(scores: Tensor, candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of the `count` candidates with the largest scores; those that tie for the last places are chosen at random.

    Ties are common: the gradient of an embedding row that no token of the batch used is exactly zero, and choosing by
    position would favour the low token ids.

    Args:
        scores: float32 or float64, without NaN, and above -inf at the candidates.
        candidates: bool, same shape.
        count: at most the number of candidates.
        generator: on the device of the scores; drawn from only if there are ties to break.

    Returns:
        Bool tensor of the same shape with exactly `count` true entries, all of them candidates.
    """
    available = int(candidates.count_nonzero())
    assert 0 <= count <= available, (count, available)
    if count == 0:
        return torch.zeros_like(candidates)
    if count == available:
        return candidates.clone()
    threshold = _kth_largest(scores, candidates, count, available)
    chosen = (scores >= threshold).logical_and_(candidates)
    surplus = int(chosen.count_nonzero()) - count
    if surplus == 0:
        return chosen
    tied = (scores == threshold).logical_and_(candidates)
    return chosen.logical_xor_(random_subset(tied, surplus, generator))


def random_subset(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of `count` candidates, every subset of that size being equally likely.

    Args:
        candidates: bool tensor on the device of the generator.
        count: at most the number of candidates.
        generator: the source of randomness.

    Returns:
        Bool tensor of the same shape with exactly `count` true entries, all of them candidates.
    """
    available = int(candidates.count_nonzero())
    keys = torch.rand(available, generator=generator, device=candidates.device)
    chosen = largest(keys, torch.ones_like(keys, dtype=torch.bool), count, generator)
    return torch.zeros_like(candidates).masked_scatter_(candidates, chosen)


def _kth_largest(scores: Tensor, candidates: Tensor, k: int, available: int) -> Tensor:
    """The k-th largest score among the candidates, of which there are `available`.

    After Floyd and Rivest ("Expected time bounds for selection", 1975): a sample brackets the score, one pass counts
    what lies above the bracket, and only the few scores inside it are partitioned.
    """
    scores, candidates = scores.flatten(), candidates.flatten()
    if len(scores) < _SMALL:
        return _ranked(_compress(scores, candidates), [available - k])[0]
    low, high = _bracket(scores, candidates, 1 - k / available)
    inside = (scores >= low).logical_and_(scores <= high).logical_and_(candidates)
    rank = k - int((scores > high).logical_and_(candidates).count_nonzero())
    size = int(inside.count_nonzero())
    if not 1 <= rank <= size:
        # The sample misled, as it may where the scores follow a pattern.
        return _ranked(_compress(scores, candidates), [available - k])[0]
    if low == high:
        return low
    return _ranked(_compress(scores, inside), [size - rank])[0]


def _bracket(scores: Tensor, candidates: Tensor, quantile: float) -> Tensor:
    """[2] scores that very likely enclose the quantile of the candidates."""
    # Odd, so that the sample meets every column of a matrix, whose width is mostly even.
    step = round(len(scores) ** (1 / 3)) | 1
    sample = scores[::step][candidates[::step]]
    size = len(sample)
    middle, deviation = quantile * size, math.sqrt(quantile * (1 - quantile) * size)
    first, last = math.floor(middle - 4 * deviation), math.ceil(middle + 4 * deviation)
    infinity = sample.new_tensor([torch.inf])
    return _ranked(torch.cat([-infinity, sample, infinity]), [max(first, 0), min(last + 1, size + 1)])


def _ranked(values: Tensor, ranks: list[int]) -> Tensor:
    """The values at these places of the ascending order."""
    if values.device.type == "cpu":
        # torch's sort takes ten times as long on CPU.
        return torch.from_numpy(np.partition(values.numpy(), ranks)[ranks])
    return values.sort().values[ranks]


def _compress(values: Tensor, chosen: Tensor) -> Tensor:
    """A copy of the chosen values; both tensors have one dimension."""
    if values.device.type == "cpu":
        # A quarter of the time of torch's masked_select on CPU.
        return torch.from_numpy(np.compress(chosen.numpy(), values.numpy()))
    return values[chosen]
