# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Overlap of heads by hand and by chance, and the figures of a topology."""

import pytest
import torch
from torch import nn

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.analysis import mask_overlap, topology_figures, weight_masks
from nt_transformers.sparsity import Sparsifier, SparsityConfig


def test_overlap_by_hand() -> None:
    masks = {
        "model.layers.0.weight": torch.tensor([True, True]),
        "model.heads.0.layers.0.weight": torch.tensor([True, True, False]),
        "model.heads.1.layers.0.weight": torch.tensor([True, False, True]),
        "lm_heads.0.weight": torch.tensor([True, False]),
        "lm_heads.1.weight": torch.tensor([True, False]),
    }
    # Both have two of the four weights that one or the other has.
    torch.testing.assert_close(mask_overlap(masks), torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64))


def test_a_network_without_heads_has_no_overlap() -> None:
    assert mask_overlap(weight_masks(nn.Linear(2, 2))).shape == (0, 0)


@pytest.fixture
def sparsifier() -> Sparsifier:
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(
        NeuroTrailsLlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_ensemble_heads=3,
            num_head_layers=1,
        )
    )
    config = SparsityConfig(method="static", density=0.4, distribution="uniform")
    return Sparsifier(model, torch.optim.Adam(model.parameters()), config, total_steps=1)


def test_random_masks_overlap_as_chance_has_it(sparsifier: Sparsifier) -> None:
    figures = topology_figures(sparsifier)
    assert figures["mask_overlap"] == pytest.approx(0.4 / (2 - 0.4), abs=0.01)
    assert figures["density"] == figures["explored"] == pytest.approx(0.4, abs=1e-4)
    assert figures["layer_density"].keys() == sparsifier.masks.keys()
    assert all(density == pytest.approx(0.4, abs=1e-2) for density in figures["layer_density"].values())


def test_a_trained_network_shows_its_masks(sparsifier: Sparsifier) -> None:
    found = weight_masks(sparsifier.model)
    for name, mask in sparsifier.masks.items():
        # Embeddings hold a row of zeros for padding only where a padding token is set; here none is.
        assert torch.equal(found[name], mask), name
    torch.testing.assert_close(mask_overlap(found), mask_overlap(sparsifier.masks))
