# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a model that ignores context would score."""

from collections.abc import Iterable

import torch


def unigram_perplexity(
    training: Iterable[dict[str, torch.Tensor]], held_out: Iterable[dict[str, torch.Tensor]], vocab_size: int
) -> float:
    """Perplexity on `held_out` of token frequencies counted on `training`, with one added to every count (Laplace).

    Both are batches with `labels` [batch, seq], -100 where nothing is predicted; the tokens predicted are the same as
    those of a causal language model, all but the first of a sequence.
    """
    counts = token_counts(training, vocab_size) + 1
    log_probs = (counts / counts.sum()).log()
    observed = token_counts(held_out, vocab_size)
    return float(torch.exp(-(observed * log_probs).sum() / observed.sum()))


def token_counts(batches: Iterable[dict[str, torch.Tensor]], vocab_size: int) -> torch.Tensor:
    """How often each token is to be predicted: float64 [vocab_size]."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        targets = batch["labels"][:, 1:]
        counts += torch.bincount(targets[targets != -100], minlength=vocab_size)
    return counts
