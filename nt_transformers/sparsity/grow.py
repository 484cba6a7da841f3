# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Growth rules: which of a tensor's inactive weights come."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import largest, random_subset


def by_score(score: Tensor, candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of the `count` candidates with the largest |score| (gradient or momentum); ties are broken at random."""
    return largest(score, candidates, count, generator, key=torch.abs)


def at_random(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of `count` candidates, all equally likely (SET, Mocanu et al., 2018)."""
    return random_subset(candidates, count, generator)
