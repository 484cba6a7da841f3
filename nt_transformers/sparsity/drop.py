# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Drop rules: which of a tensor's active weights go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .config import Drop
from .selection import largest, pieces


DropRule = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


def drop_rule(name: Drop, temperature: float) -> DropRule:
    """The rule of that name, as a function of (weight, mask, count, generator)."""
    if name == "soft_magnitude":
        return partial(soft_magnitude, temperature=temperature)
    return magnitude


def magnitude(weight: Tensor, mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of the `count` active weights with the smallest magnitude; ties are broken at random."""
    return largest(weight, mask, count, generator, key=lambda weights: weights.abs().neg_())


def soft_magnitude(
    weight: Tensor, mask: Tensor, count: int, generator: torch.Generator, *, temperature: float
) -> Tensor:
    """Mask of `count` active weights to drop, the others being drawn with p proportional to |w| ** temperature.

    Drawing one by one, without replacement, equals keeping the smallest of the keys `E / |w| ** temperature`, with E
    exponentially distributed (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006). The keys
    are compared by their logarithm, which neither overflows nor underflows. Weights of exactly zero go first, at
    random among themselves.
    """
    keys = torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)
    for key, value, active in pieces(keys.view(-1), weight.reshape(-1), mask.reshape(-1)):
        torch.rand(key.shape, generator=generator, out=key).log_().neg_().log_()
        # Removed weights are no candidates; the logarithm of their zeros would take five times as long on CPU.
        key.sub_(value.abs().add_(~active).log_(), alpha=temperature)
    return largest(keys, mask, count, generator)
