# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How much the heads of an ensemble differ in what they predict.

Everywhere M counts heads, N items (images or tokens) and C classes (or the vocabulary).
"""

import math

import torch
from torch import Tensor


def disagreement_counts(choices_MN: Tensor) -> Tensor:
    """[M, M] float64: on how many items two heads choose different classes."""
    return (choices_MN[:, None] != choices_MN[None]).sum(-1, dtype=torch.float64)


def cross_entropy_sums(log_probs_MNC: Tensor) -> Tensor:
    """[M, M] float64: the cross-entropy of head b under head a, `-sum_c p_a log p_b`, summed over items.

    The diagonal holds the entropies, and row minus diagonal is the Kullback-Leibler divergence `KL(a || b)`.
    """
    flat = log_probs_MNC.flatten(1)
    return -(flat.exp() @ flat.T).double()


def mean_of_pairs(matrix_MM: Tensor) -> Tensor:
    """Mean over ordered pairs of different heads; 0 for a single head."""
    heads = len(matrix_MM)
    return (matrix_MM.sum() - matrix_MM.diagonal().sum()) / max(heads * (heads - 1), 1)


def log_mean_probs(log_probs: Tensor) -> Tensor:
    """From [M, ...] to [...]: log of the mean probability, the vote of the heads."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mutual_information(log_probs_MNC: Tensor) -> Tensor:
    """[N] nats: between the prediction and the choice of the head, the epistemic part of the vote's uncertainty.

    Entropy of the mean prediction minus mean entropy of the predictions (Depeweg et al., 2018); 0 where all heads
    predict the same, at most log M.
    """
    vote_NC = log_mean_probs(log_probs_MNC)
    entropy_MN = -(log_probs_MNC.exp() * log_probs_MNC).sum(-1)
    return -(vote_NC.exp() * vote_NC).sum(-1) - entropy_MN.mean(0)
