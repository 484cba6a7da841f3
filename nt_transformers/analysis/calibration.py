# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How good and how honest the probabilities of one predictor are, as sums that add up over batches and processes.

Predictions of classes and of next tokens are treated alike: an item is an image or a token.
torchmetrics keeps every confidence for its calibration error and takes one predictor at a time; here M heads and two
votes are measured on millions of tokens in one pass. The tests compare the figures with its.
"""

import torch
from torch import Tensor


# Equal-width bins of confidence, as Guo et al. (2017) use.
BINS = 15


def prediction_sums(log_probs_NC: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """Sums over items, float64.

    Args:
        log_probs_NC: Log-probabilities, float32 or better.
        targets_N: The right classes.

    Returns:
        `nll`: negative log-likelihood in nats. `brier`: squared distance between probabilities and the one-hot target.
        `entropy`: of the predictions, in nats. `correct`: items whose most likely class is right. `bins` [BINS, 3]:
        by confidence, the items, their summed confidence and how many of them are right.
    """
    probs_NC = log_probs_NC.exp()
    right_N = log_probs_NC.gather(1, targets_N[:, None]).squeeze(1).double()
    confidence_N, choices_N = probs_NC.max(-1)
    correct_N = (choices_N == targets_N).double()
    squares = torch.linalg.vector_norm(probs_NC, dim=-1).double().square()
    return {
        "nll": -right_N.sum(),
        "brier": (squares - 2 * right_N.exp() + 1).sum(),
        "entropy": -torch.einsum("nc,nc->n", probs_NC, log_probs_NC).sum(dtype=torch.float64),
        "correct": correct_N.sum(),
        "bins": _bin(confidence_N.double(), correct_N),
    }


def expected_calibration_error(bins: Tensor) -> Tensor:
    """Mean gap between confidence and accuracy, weighted by the items of each bin (Naeini et al., 2015).

    Args:
        bins: [..., BINS, 3] as from `prediction_sums`.

    Returns:
        [...], between 0 and 1.
    """
    count, confidence, correct = bins.unbind(-1)
    return (confidence - correct).abs().sum(-1) / count.sum(-1)


def reliability_diagram(bins: Tensor) -> list[dict[str, float]]:
    """Mean confidence, accuracy and share of the items of each bin [BINS, 3] that holds any."""
    total = bins[:, 0].sum()
    return [
        {
            "confidence": float(confidence / count),
            "accuracy": float(correct / count),
            "share": float(count / total),
        }
        for count, confidence, correct in bins
        if count > 0
    ]


def _bin(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    # A confidence that is not a number makes the sums of its bin show it.
    index = (confidence_N.nan_to_num() * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([torch.ones_like(confidence_N), confidence_N, correct_N], dim=1)
    return values.new_zeros(BINS, 3).index_add_(0, index, values)
