# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Token-weighted perplexity of every head and of both votes, in one pass."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import torch


# Logits of this many tokens are alive at a time, of one head.
CHUNK_TOKENS = 1024


@dataclass
class EnsembleScores:
    """Sums over predicted tokens, which add up over batches and processes.

    Args:
        sums: [heads + 3] float64: negative log-likelihood (nats) of each head, of the mean-probability vote and of the
            mean-logit vote, and disagreement: the share of pairs of heads whose most likely tokens differ.
        tokens: How many tokens were predicted.
    """

    sums: torch.Tensor
    tokens: int

    def __add__(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums, self.tokens + other.tokens)

    def figures(self, vote: str) -> dict[str, Any]:
        """Means and perplexities by name. `vote` ("probs", "logits") says which vote is the model's own."""
        assert self.tokens > 0
        *heads, probs, logits, disagreement = (self.sums / self.tokens).tolist()
        return {
            "eval_loss": {"probs": probs, "logits": logits}[vote],
            "eval_perplexity": math.exp({"probs": probs, "logits": logits}[vote]),
            "eval_perplexity_probs_vote": math.exp(probs),
            "eval_perplexity_logits_vote": math.exp(logits),
            "eval_perplexity_heads": [math.exp(nll) for nll in heads],
            "eval_disagreement": disagreement,
            "eval_tokens": self.tokens,
        }


@torch.no_grad()
def score_language_model(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> EnsembleScores:
    """Scores the active heads of a `NeuroTrailsLlamaForCausalLM` on held-out text.

    Args:
        model: In evaluation mode.
        batches: `input_ids` [batch, seq] and `labels` [batch, seq], -100 where nothing is to be predicted; labels are
            the inputs, the model shifts them.
    """
    device = model.get_input_embeddings().weight.device
    scores = EnsembleScores(torch.zeros(len(model.active_heads) + 3, dtype=torch.float64, device=device), 0)
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        hidden = model.model(input_ids=input_ids, use_cache=False).head_hidden_states[:, :, :-1]
        targets = labels[:, 1:]
        predicted = targets != -100
        hidden, targets = hidden[:, predicted], targets[predicted]
        for start in range(0, len(targets), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            scores += _score_chunk(model, hidden[:, chunk], targets[chunk])
    return scores


def _score_chunk(model: Any, hidden_MTH: torch.Tensor, targets_T: torch.Tensor) -> EnsembleScores:
    heads = len(hidden_MTH)
    columns = targets_T[:, None]
    nlls, choices = [], []
    for head, hidden_TH in zip(model.active_heads, hidden_MTH, strict=True):
        logits_TV = model.lm_heads[head](hidden_TH).float()
        log_probs_TV = logits_TV.log_softmax(-1)
        nlls.append(-log_probs_TV.gather(1, columns).sum(dtype=torch.float64))
        choices.append(logits_TV.argmax(-1))
        if head == model.active_heads[0]:
            sum_probs_TV, sum_logits_TV = log_probs_TV, logits_TV
        else:
            sum_probs_TV = torch.logaddexp(sum_probs_TV, log_probs_TV)
            sum_logits_TV = sum_logits_TV + logits_TV
    # The sum of probabilities is `heads` times their mean.
    probs_vote = (math.log(heads) - sum_probs_TV.gather(1, columns)).sum(dtype=torch.float64)
    logits_vote = -(sum_logits_TV / heads).log_softmax(-1).gather(1, columns).sum(dtype=torch.float64)
    pairs = [(a != b).sum(dtype=torch.float64) for a, b in combinations(choices, 2)]
    disagreement = torch.stack(pairs).mean() if pairs else torch.zeros_like(probs_vote)
    return EnsembleScores(torch.stack([*nlls, probs_vote, logits_vote, disagreement]), len(targets_T))
