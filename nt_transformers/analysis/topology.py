# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Where the weights of sparse heads are: overlap between heads, densities of layers, explored share."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity import Sparsifier
from ..sparsity.sharding import own_part, total
from .diversity import mean_of_pairs


# `model.heads.1.layers.0.mlp.up_proj.weight`, `lm_heads.1.weight`: a list of heads, the head, the place in it.
_IN_A_HEAD = re.compile(r"(?P<owner>(?:.*\.)?(?:\w*heads|classifiers))\.(?P<head>\d+)\.(?P<rest>.+)")


def weight_masks(model: nn.Module) -> dict[str, Tensor]:
    """Which weights of the matrices and kernels are not zero: the masks of a trained network."""
    return {name: parameter != 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}


def mask_overlap(masks: Mapping[str, Tensor]) -> Tensor:
    """[heads, heads] float64: of the weights that one or the other of two heads has, the share that both have.

    This is the Jaccard index of their masks; tensors that are not masked in every head are left out. Masks of density
    d that were drawn independently overlap by d / (2 - d).
    """
    places: dict[tuple[str, str], list[Tensor]] = {}
    for name, mask in masks.items():
        if found := _IN_A_HEAD.fullmatch(name):
            places.setdefault((found["owner"], found["rest"]), []).append(mask)
    if not places:
        return torch.zeros(0, 0, dtype=torch.float64)
    most = max(map(len, places.values()))
    both = sum(_shared_counts(heads) for heads in places.values() if len(heads) == most)
    assert isinstance(both, Tensor)
    own = both.diagonal()
    return both / (own[:, None] + own - both)


def _shared_counts(masks: list[Tensor]) -> Tensor:
    counts = [[total(int((own_part(a) & own_part(b)).count_nonzero()), a) for b in masks] for a in masks]
    return torch.tensor(counts, dtype=torch.float64)


def topology_figures(sparsifier: Sparsifier) -> dict[str, Any]:
    """The state of a topology for a line of metrics: densities and explored share, overlap of heads where there are
    several.
    """
    summary = sparsifier.summary()
    figures = {
        "density": summary.density,
        "explored": summary.explored,
        "layer_density": {name: tensor.density for name, tensor in summary.tensors.items()},
        "layer_explored": {name: tensor.explored for name, tensor in summary.tensors.items()},
    }
    overlap = mask_overlap(sparsifier.masks)
    if len(overlap) > 1:
        figures["mask_overlap"] = float(mean_of_pairs(overlap))
    return figures
