# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Quality, calibration and diversity of an ensemble on held-out data, as sums over items."""

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
        sums: float64 by name. `items`; `nll`, and with calibration all else that `prediction_sums` returns, for each
            of the M heads, the mean-probability vote and the mean-logit vote, [M + 2, ...]; between heads, [M, M],
            `disagreement` and, with calibration, `cross_entropy`.
    """

    sums: dict[str, Tensor]

    @classmethod
    def of(cls, head_logits_MNC: Tensor, targets_N: Tensor, *, calibration: bool = True) -> Self:
        """The scores of some items, which are all in memory at once; computed in float32 even under autocast.

        Args:
            head_logits_MNC: Logits of each head.
            targets_N: The right classes.
            calibration: Also what takes all probabilities of all predictors, several times the work of the losses.
        """
        with torch.autocast(head_logits_MNC.device.type, enabled=False):
            logits_MNC = head_logits_MNC.float()
            return cls(
                {
                    "items": torch.tensor(len(targets_N), dtype=torch.float64, device=targets_N.device),
                    "disagreement": disagreement_counts(logits_MNC.argmax(-1)),
                    **(_all_sums if calibration else _loss_sums)(logits_MNC, targets_N),
                }
            )

    def __add__(self, other: Self) -> Self:
        return type(self)({name: value + other.sums[name] for name, value in self.sums.items()})

    @property
    def items(self) -> int:
        """How many items were predicted."""
        return int(self.sums["items"])

    def members(self) -> dict[str, Tensor]:
        """What is known of each head and of both votes, float64 [M + 2]: `nll` in nats, and with calibration
        `accuracy`, `ece` (expected calibration error) and `brier` (0 to 2), all means over items."""
        assert self.items > 0
        members = {"nll": self.sums["nll"] / self.items}
        if "bins" in self.sums:
            members |= {
                "accuracy": self.sums["correct"] / self.items,
                "ece": expected_calibration_error(self.sums["bins"]),
                "brier": self.sums["brier"] / self.items,
            }
        return members

    @property
    def disagreement(self) -> float:
        """Share of items on which two heads choose different classes, mean over all pairs."""
        return float(mean_of_pairs(self.sums["disagreement"])) / self.items

    def figures(self, vote: str) -> dict[str, Any]:
        """Means by name; lists hold one number per head. `vote` ("probs", "logits") is the model's own.

        The loss of the vote is the mean loss of the heads minus `eval_ambiguity` (Krogh and Vedelsby, 1995; for
        cross-entropy Heskes, 1998). With calibration, `eval_mutual_information` is that of `mutual_information`,
        `eval_kl` the mean Kullback-Leibler divergence between two heads, over all pairs.
        """
        own = _place(vote)
        result: dict[str, Any] = {}
        for name, values in self.members().items():
            name = {"nll": "loss"}.get(name, name)
            result |= {f"eval_{name}": float(values[own]), f"eval_{name}_heads": values[_HEADS].tolist()}
        return result | {f"eval_{name}": value for name, value in self._differences(own).items()}

    def _differences(self, own: int) -> dict[str, Any]:
        """How the heads differ and, with calibration, what the vote's confidence is worth; `own` is the vote."""
        losses = self.members()["nll"]
        result = {
            "disagreement": self.disagreement,
            "ambiguity": float(losses[_HEADS].mean() - losses[own]),
        }
        if "bins" not in self.sums:
            return result
        cross_entropies, entropies = self.sums["cross_entropy"] / self.items, self.sums["entropy"] / self.items
        return result | {
            "kl": float(mean_of_pairs(cross_entropies - cross_entropies.diagonal()[:, None])),
            "mutual_information": float(entropies[_place("probs")] - entropies[_HEADS].mean()),
            "reliability": reliability_diagram(self.sums["bins"][own]),
        }

    def language_figures(self, vote: str) -> dict[str, Any]:
        """`figures`, and the perplexities of the heads, of both votes and of the model's own."""
        perplexities = self.members()["nll"].exp()
        return {
            "eval_perplexity": float(perplexities[_place(vote)]),
            **{f"eval_perplexity_{name}_vote": float(perplexities[_place(name)]) for name in VOTES},
            "eval_perplexity_heads": perplexities[_HEADS].tolist(),
            **self.figures(vote),
            "eval_tokens": self.items,
        }

    def classifier_figures(self, vote: str) -> dict[str, Any]:
        """`accuracy`, `nll`, `ece` and `brier` of the model's own vote ("probs" or "logits") by their names, of each
        vote with the suffix `_probs_vote` and `_logits_vote`, of the heads as a list with the suffix `_heads`;
        `disagreement`, `ambiguity`, `kl`, `mutual_information` and `reliability` as in `figures`; `images`.

        Raises:
            ValueError: there are no images.
        """
        if not self.items:
            raise ValueError("data: no image could be read, so there is nothing to score: repair the images.")
        result: dict[str, Any] = {}
        for name, values in self.members().items():
            result |= {name: float(values[_place(vote)])}
            result |= {f"{name}_{other}_vote": float(values[_place(other)]) for other in VOTES}
            result[f"{name}_heads"] = values[_HEADS].tolist()
        return result | self._differences(_place(vote)) | {"images": self.items}


# Of the M + 2 predictors.
_HEADS = slice(0, -len(VOTES))


def _place(vote: str) -> int:
    return VOTES.index(vote) - len(VOTES)


def _loss_sums(logits_MNC: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """`nll` [M + 2] without the probabilities of other classes than the right one."""

    def log_probs(logits: Tensor) -> Tensor:
        index = targets_N.expand(logits.shape[:-1])[..., None]
        return logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)

    right_MN = log_probs(logits_MNC)
    votes = log_mean_probs(right_MN), log_probs(logits_MNC.mean(0))
    return {"nll": -torch.stack([*right_MN, *votes]).sum(-1, dtype=torch.float64)}


def _all_sums(logits_MNC: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """`prediction_sums` of each predictor, stacked, and the cross-entropies of the heads."""
    log_probs_MNC = logits_MNC.log_softmax(-1)
    votes = (log_mean_probs(log_probs_MNC), logits_MNC.mean(0).log_softmax(-1))
    predictors = [prediction_sums(log_probs_NC, targets_N) for log_probs_NC in (*log_probs_MNC, *votes)]
    return {
        **{name: torch.stack([sums[name] for sums in predictors]) for name in predictors[0]},
        "cross_entropy": cross_entropy_sums(log_probs_MNC),
    }
