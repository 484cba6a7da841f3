# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Quality, calibration and diversity of an ensemble on held-out data, as sums over items."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .calibration import expected_calibration_error, prediction_sums, reliability_diagram
from .diversity import cross_entropy_sums, disagreement_counts, log_mean_probs, mean_of_pairs


VOTES = ("probs", "logits")


@dataclass
class EnsembleScores:
    """Sums over predicted items (images, tokens), which add up over batches and processes.

    Args:
        sums: float64 by name. `items`; what `prediction_sums` returns for each of the M heads, the mean-probability
            vote and the mean-logit vote, [M + 2, ...]; between heads, [M, M], `disagreement` and `cross_entropy`.
    """

    sums: dict[str, Tensor]

    @classmethod
    def of(cls, head_logits_MNC: Tensor, targets_N: Tensor) -> Self:
        """The scores of some items, which are all in memory at once; computed in float32 even under autocast."""
        with torch.autocast(head_logits_MNC.device.type, enabled=False):
            return cls._of(head_logits_MNC, targets_N)

    @classmethod
    def _of(cls, head_logits_MNC: Tensor, targets_N: Tensor) -> Self:
        logits_MNC = head_logits_MNC.float()
        log_probs_MNC = logits_MNC.log_softmax(-1)
        votes = (log_mean_probs(log_probs_MNC), logits_MNC.mean(0).log_softmax(-1))
        predictors = [prediction_sums(log_probs_NC, targets_N) for log_probs_NC in (*log_probs_MNC, *votes)]
        return cls(
            {
                "items": torch.tensor(len(targets_N), dtype=torch.float64, device=targets_N.device),
                **{name: torch.stack([sums[name] for sums in predictors]) for name in predictors[0]},
                "disagreement": disagreement_counts(logits_MNC.argmax(-1)),
                "cross_entropy": cross_entropy_sums(log_probs_MNC),
            }
        )

    def __add__(self, other: Self) -> Self:
        return type(self)({name: value + other.sums[name] for name, value in self.sums.items()})

    @property
    def items(self) -> int:
        """How many items were predicted."""
        return int(self.sums["items"])

    def figures(self, vote: str) -> dict[str, Any]:
        """Means by name; lists hold one number per head. `vote` ("probs", "logits") is the model's own.

        The loss of the vote is the mean loss of the heads minus `eval_ambiguity` (Krogh and Vedelsby, 1995; for
        cross-entropy Heskes, 1998). `eval_mutual_information` is that of `mutual_information`, `eval_kl` the mean
        Kullback-Leibler divergence between two heads, `eval_disagreement` the share of items on which two heads
        choose different classes, both over all pairs.
        """
        assert self.items > 0
        means = {name: value / self.items for name, value in self.sums.items() if name != "bins"}
        errors = expected_calibration_error(self.sums["bins"])
        heads = slice(0, -len(VOTES))
        own = VOTES.index(vote) - len(VOTES)
        probs = VOTES.index("probs") - len(VOTES)
        entropies = means["cross_entropy"].diagonal()
        return {
            "eval_loss": float(means["nll"][own]),
            "eval_loss_heads": means["nll"][heads].tolist(),
            "eval_accuracy": float(means["correct"][own]),
            "eval_accuracy_heads": means["correct"][heads].tolist(),
            "eval_ece": float(errors[own]),
            "eval_ece_heads": errors[heads].tolist(),
            "eval_brier": float(means["brier"][own]),
            "eval_brier_heads": means["brier"][heads].tolist(),
            "eval_disagreement": float(mean_of_pairs(means["disagreement"])),
            "eval_kl": float(mean_of_pairs(means["cross_entropy"] - entropies[:, None])),
            "eval_ambiguity": float(means["nll"][heads].mean() - means["nll"][own]),
            "eval_mutual_information": float(means["entropy"][probs] - means["entropy"][heads].mean()),
            "eval_reliability": reliability_diagram(self.sums["bins"][own]),
        }

    def language_figures(self, vote: str) -> dict[str, Any]:
        """`figures`, and the perplexities of the heads, of both votes and of the model's own."""
        means = (self.sums["nll"] / self.items).tolist()
        votes = dict(zip(VOTES, means[-len(VOTES) :], strict=True))
        return {
            "eval_perplexity": math.exp(votes[vote]),
            **{f"eval_perplexity_{name}_vote": math.exp(nll) for name, nll in votes.items()},
            "eval_perplexity_heads": [math.exp(nll) for nll in means[: -len(VOTES)]],
            **self.figures(vote),
            "eval_tokens": self.items,
        }
