# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Scores of every head and of both votes of an image classifier, in one pass."""

from collections.abc import Iterable
from typing import Any

import torch

from .scores import EnsembleScores


@torch.no_grad()
def score_classifier(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> EnsembleScores:
    """Scores the active heads of a NeuroTrails model for image classification.

    Args:
        model: Put into evaluation mode meanwhile.
        batches: `pixel_values` [batch, channels, height, width] and `labels` int64 [batch].
    """
    device = next(model.parameters()).device
    nothing = torch.zeros(len(model.active_heads), 0, model.config.num_labels, device=device)
    scores = EnsembleScores.of(nothing, torch.zeros(0, dtype=torch.long, device=device))
    training = model.training
    model.eval()
    for batch in batches:
        output = model(pixel_values=batch["pixel_values"].to(device), output_head_logits=True)
        scores += EnsembleScores.of(output.head_logits, batch["labels"].to(device))
    model.train(training)
    return scores
