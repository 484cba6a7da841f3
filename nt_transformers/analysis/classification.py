# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How well an ensemble classifies and how well it knows it: every head and both votes, in one pass."""

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


VOTES = ("probs_vote", "logits_vote")


class ClassifierScores(nn.Module):
    """Collects the figures of each head, of the mean-probability vote and of the mean-logit vote over batches.

    - `accuracy`: share of images whose most likely class is theirs.
    - `nll`: mean negative log-likelihood of the true class, in nats.
    - `ece`: expected calibration error in 15 equal bins of confidence (Guo et al., 2017).
    - `brier`: mean over images of the squared distance between probabilities and the true class, summed over classes
      (0 to 2).
    - `disagreement`: share of images on which two heads differ in the most likely class, mean over pairs of heads.

    Processes that each saw a share of the images get the figures of all of them.

    Args:
        num_heads: Heads whose logits `update` gets.
        num_classes: Classes.
    """

    def __init__(self, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(_MemberScores(num_classes) for _ in range(num_heads + len(VOTES)))
        self.disagreement = MeanMetric()
        self.images = SumMetric()

    def update(self, head_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: logits `[heads, batch, classes]` and classes int64 `[batch]`."""
        self.images.update(len(labels))
        head_logits = head_logits.float()
        head_log_probs = head_logits.log_softmax(-1)
        probs_vote = head_log_probs.logsumexp(0) - math.log(len(head_logits))
        logits_vote = head_logits.mean(0).log_softmax(-1)
        for member, log_probs in zip(self.members, (*head_log_probs, probs_vote, logits_vote), strict=True):
            member.update(log_probs, labels)
        pairs = [(a != b).float() for a, b in combinations(head_logits.argmax(-1), 2)]
        self.disagreement.update(torch.stack(pairs).mean(0) if pairs else torch.zeros_like(labels, dtype=torch.float))

    def figures(self, vote: str) -> dict[str, Any]:
        """Every figure of the model's own vote ("probs" or "logits") by its name, of each vote with the suffix
        `_probs_vote` and `_logits_vote`, of the heads as a list with the suffix `_heads`; `disagreement`; `images`."""
        *heads, probs, logits = [member.figures() for member in self.members]
        result: dict[str, Any] = dict({"probs": probs, "logits": logits}[vote])
        for name in probs:
            result |= {f"{name}_probs_vote": probs[name], f"{name}_logits_vote": logits[name]}
            result[f"{name}_heads"] = [head[name] for head in heads]
        return result | {
            "disagreement": float(self.disagreement.compute()),
            "images": int(self.images.compute()),
        }


class _MemberScores(nn.Module):
    """The figures of one head or vote."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # The check of every batch costs as much as the figures; what it checks holds by construction.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.nll = MeanMetric()
        self.ece = MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False)
        self.brier = MeanMetric()

    def update(self, log_probs: torch.Tensor, labels: torch.Tensor) -> None:
        # Rounding can leave a probability a little above 1, which torchmetrics would take for a logit.
        probs = log_probs.exp().clamp(max=1)
        true_probs = probs.gather(1, labels[:, None]).squeeze(1)
        self.accuracy.update(probs, labels)
        self.nll.update(nn.functional.nll_loss(log_probs, labels, reduction="none"))
        self.ece.update(probs, labels)
        self.brier.update(probs.square().sum(1) - 2 * true_probs + 1)

    def figures(self) -> dict[str, float]:
        metrics = {"accuracy": self.accuracy, "nll": self.nll, "ece": self.ece, "brier": self.brier}
        return {name: float(metric.compute()) for name, metric in metrics.items()}


@torch.no_grad()
def score_classifier(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Figures of `ClassifierScores` of the active heads of an image classifier.

    Args:
        model: A NeuroTrails model for image classification, in evaluation mode.
        batches: `pixel_values` `[batch, channels, height, width]` and `labels` int64 `[batch]`.
    """
    parameter = next(model.parameters())
    scores = ClassifierScores(len(model.active_heads), model.config.num_labels).to(parameter.device)
    for batch in batches:
        pixel_values = batch["pixel_values"].to(parameter.device)
        output = model(pixel_values=pixel_values, output_head_logits=True)
        scores.update(output.head_logits, batch["labels"].to(parameter.device))
    return scores.figures(model.config.vote)
