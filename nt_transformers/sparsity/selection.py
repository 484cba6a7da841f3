# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Choosing positions of a tensor by score or at random, in time linear in its size, with an exact count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


# Values that a CPU works on at a time.
_PIECE = 1 << 20


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator seeded by the key alone: the same draws on every rank and after every resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of some rows of each of the tensors, which have the same shape; of all rows at once but on CPUs.

    Done piece by piece, work on a large tensor stays in a CPU's cache and its intermediate results are small.
    """
    length, numel = len(tensors[0]), tensors[0].numel()
    rows = max(_PIECE * length // max(numel, 1), 1) if tensors[0].device.type == "cpu" else max(length, 1)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def count_true(mask: Tensor) -> int:
    """How many entries of a bool tensor are true."""
    if mask.device.type == "cpu":
        # A tenth of the time of torch's count_nonzero on CPU.
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def largest(
    scores: Tensor,
    candidates: Tensor,
    count: int,
    generator: torch.Generator,
    key: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Tensor:
    """Mask of the `count` candidates with the largest scores; those that tie for the last places are chosen at random.

    Ties are common: the gradient of an embedding row that no token of the batch used is exactly zero, and choosing by
    position would favour the low token ids.

    Args:
        scores: float32 or float64, without NaN, and above -inf at the candidates.
        candidates: bool, same shape.
        count: at most the number of candidates.
        generator: on the device of the scores; drawn from only if there are ties to break.
        key: what the scores are compared by, element by element. It is given pieces of them, so that its results take
            no memory of the tensor's size.

    Returns:
        Bool tensor of the same shape with exactly `count` true entries, all of them candidates.
    """
    available = count_true(candidates)
    assert 0 <= count <= available, (count, available)
    if count == 0:
        return torch.zeros_like(candidates)
    if count == available:
        return candidates.clone()
    flat = _Keys(scores.flatten(), candidates.flatten(), key)
    threshold = flat.kth_largest(count, available)
    chosen = flat.where(torch.ge, threshold)
    surplus = count_true(chosen) - count
    if surplus > 0:
        chosen.logical_xor_(random_subset(flat.where(torch.eq, threshold), surplus, generator))
    return chosen.view(candidates.shape)


def random_subset(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of `count` candidates, every subset of that size being equally likely.

    Args:
        candidates: bool tensor on the device of the generator.
        count: at most the number of candidates.
        generator: the source of randomness.

    Returns:
        Bool tensor of the same shape with exactly `count` true entries, all of them candidates.
    """
    available = count_true(candidates)
    keys = torch.rand(available, generator=generator, device=candidates.device)
    chosen = largest(keys, torch.ones_like(keys, dtype=torch.bool), count, generator)
    return torch.zeros_like(candidates).masked_scatter_(candidates, chosen)


@dataclass(frozen=True)
class _Keys:
    """Scores, which of them are candidates (both of one dimension), and the key that the scores are compared by."""

    scores: Tensor
    candidates: Tensor
    key: Callable[[Tensor], Tensor]

    def kth_largest(self, k: int, available: int) -> Tensor:
        """The k-th largest key among the candidates, of which there are `available`."""
        keys = torch.cat(
            [self._compress(scores, candidates) for scores, candidates in pieces(self.scores, self.candidates)]
        )
        if keys.device.type == "cpu":
            # Several times as fast on CPU as torch's kthvalue.
            keys.numpy().partition(available - k)
            return keys[available - k]
        return keys.sort().values[available - k]

    def where(self, comparison: Callable[..., Tensor], value: Tensor) -> Tensor:
        """Mask of the candidates whose key compares so with the value."""
        chosen = torch.empty_like(self.candidates)
        for scores, candidates, part in pieces(self.scores, self.candidates, chosen):
            comparison(self.key(scores), value, out=part).logical_and_(candidates)
        return chosen

    def _compress(self, scores: Tensor, candidates: Tensor) -> Tensor:
        """The keys of the candidates of a piece."""
        if scores.device.type == "cpu":
            # A quarter of the time of torch's masked_select on CPU.
            return self.key(torch.from_numpy(np.compress(candidates.numpy(), scores.numpy())))
        return self.key(scores[candidates])
