# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Scores of every head and of both votes of a language model, weighted by token, in one pass."""

from collections.abc import Iterable
from typing import Any

import torch

from .scores import EnsembleScores


# Logits of this many tokens are alive at a time, over all heads together.
CHUNK_TOKENS = 1024


@torch.no_grad()
def score_language_model(
    model: Any, batches: Iterable[dict[str, torch.Tensor]], *, calibration: bool = True
) -> EnsembleScores:
    """Scores the active heads of a `NeuroTrailsLlamaForCausalLM` on held-out text.

    Args:
        model: In evaluation mode.
        batches: `input_ids` [batch, seq] and `labels` [batch, seq], -100 where nothing is to be predicted; labels are
            the inputs, the model shifts them.
        calibration: See `EnsembleScores.of`.
    """
    device = model.get_input_embeddings().weight.device
    lm_heads = [model.lm_heads[head] for head in model.active_heads]
    nothing = torch.zeros(len(lm_heads), 0, model.config.vocab_size, device=device)
    scores = EnsembleScores.of(nothing, torch.zeros(0, dtype=torch.long, device=device), calibration=calibration)
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        hidden_MBSH = model.model(input_ids=input_ids, use_cache=False).head_hidden_states[:, :, :-1]
        targets = labels[:, 1:]
        predicted = targets != -100
        hidden_MNH, targets_N = hidden_MBSH[:, predicted], targets[predicted]
        size = max(CHUNK_TOKENS // len(lm_heads), 1)
        for hidden_MTH, targets_T in zip(hidden_MNH.split(size, dim=1), targets_N.split(size), strict=True):
            logits_MTV = torch.stack([head(hidden_TH) for head, hidden_TH in zip(lm_heads, hidden_MTH, strict=True)])
            scores += EnsembleScores.of(logits_MTV, targets_T, calibration=calibration)
    return scores
