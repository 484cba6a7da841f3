# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers under the sparsifier."""

import pytest
import torch
from vision_models import LABELS, MIDDLE, make_classifier, make_images

from nt_transformers.sparsity import Sparsifier, SparsityConfig


@pytest.mark.parametrize(("family", "head_depth"), MIDDLE)
def test_sparse_training_keeps_the_exact_counts_and_learns(family, head_depth):
    model = make_classifier(family, head_depth).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    config = SparsityConfig(method="neurotrails_vision", density=0.3, update_interval=2)
    sparsifier = Sparsifier(model, optimizer, config, total_steps=10)
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim in (2, 4)}
    assert sparsifier.masks.keys() == weights.keys()
    assert any(weight.ndim == 4 for weight in weights.values())
    total = sum(weight.numel() for weight in weights.values())
    counts = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    assert sum(counts.values()) == pytest.approx(0.3 * total, abs=1)

    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    losses = []
    for _ in range(10):
        loss = model(make_images(), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for name, mask in sparsifier.masks.items():
            assert int(mask.sum()) == counts[name], name
            assert not weights[name][~mask].any(), name
    assert losses[-1] < losses[0]
    assert any(not torch.equal(mask, first[name]) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize(("family", "head_depth"), MIDDLE)
def test_dense_embeddings_spares_the_classifier_of_every_head(family, head_depth):
    model = make_classifier(family, head_depth)
    model.active_heads = [1]
    config = SparsityConfig(density=0.3, dense_embeddings=True)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters()), config, total_steps=1000)
    matrices = {name for name, weight in model.named_parameters() if weight.ndim in (2, 4)}
    assert matrices - sparsifier.masks.keys() == {f"classifiers.{m}.weight" for m in range(3)}
