# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Figures of classifiers against a slow reference and against torchmetrics."""

import itertools

import numpy as np
import pytest
import torch

from nt_transformers.analysis import EnsembleScores


def reference(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL, ECE and Brier by their definitions, from float64 `[images, classes]`."""
    confidence, choice = probs.max(1), probs.argmax(1)
    ece = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs((choice == labels)[inside].mean() - confidence[inside].mean())
    true = probs[np.arange(len(labels)), labels]
    one_hot = np.eye(probs.shape[1])[labels]
    return {
        "accuracy": float((choice == labels).mean()),
        "nll": float(-np.log(true).mean()),
        "ece": float(ece),
        "brier": float(((probs - one_hot) ** 2).sum(1).mean()),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_figures_equal_the_reference(heads: int, vote: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.standard_normal((heads, 200, 7)), rng.integers(0, 7, 200)
    logits[:, np.arange(200), labels] += 1
    parts = np.array_split(np.arange(200), 3)
    first, *others = (EnsembleScores.of(torch.from_numpy(logits[:, p]), torch.from_numpy(labels[p])) for p in parts)
    found = sum(others, first).classifier_figures(vote)

    probs = softmax(logits)
    votes = {"probs": reference(probs.mean(0), labels), "logits": reference(softmax(logits.mean(0)), labels)}
    alone = [reference(head, labels) for head in probs]
    for name in ("accuracy", "nll", "ece", "brier"):
        assert found[name] == pytest.approx(votes[vote][name], abs=1e-5)
        assert found[f"{name}_probs_vote"] == pytest.approx(votes["probs"][name], abs=1e-5)
        assert found[f"{name}_logits_vote"] == pytest.approx(votes["logits"][name], abs=1e-5)
        assert found[f"{name}_heads"] == pytest.approx([head[name] for head in alone], abs=1e-5)
    pairs = list(itertools.combinations(probs.argmax(-1), 2))
    assert found["disagreement"] == pytest.approx(np.mean([(a != b).mean() for a, b in pairs]) if pairs else 0)
    assert found["images"] == 200
    assert found["ambiguity"] == pytest.approx(np.mean(found["nll_heads"]) - found["nll"], abs=1e-9)
    assert sum(bin["share"] for bin in found["reliability"]) == pytest.approx(1)
    accuracy = sum(bin["share"] * bin["accuracy"] for bin in found["reliability"])
    assert accuracy == pytest.approx(found["accuracy"])


def test_certain_and_right_is_perfect_certain_and_wrong_is_worst() -> None:
    logits = torch.zeros(2, 50, 3)
    logits[:, :, 1] = 200.0
    for label, accuracy, ece, brier in ((1, 1.0, 0.0, 0.0), (2, 0.0, 1.0, 2.0)):
        figures = EnsembleScores.of(logits, torch.full((50,), label)).classifier_figures("probs")
        assert (figures["accuracy"], figures["ece"], figures["brier"]) == pytest.approx((accuracy, ece, brier))
        assert figures["nll"] == pytest.approx(0 if accuracy else 200)
        assert figures["disagreement"] == 0


def test_probabilities_that_round_above_one() -> None:
    logits = torch.tensor([[[40.0, 0.0]] * 64] * 3)
    logits[1] *= 0.9
    figures = EnsembleScores.of(logits, torch.zeros(64, dtype=torch.int64)).classifier_figures("probs")
    assert figures["ece"] == pytest.approx(0, abs=1e-6)


def test_figures_equal_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(2, 300, 7, generator=generator), torch.randint(7, (300,), generator=generator)
    figures = EnsembleScores.of(logits, labels).classifier_figures("probs")
    vote = logits.softmax(-1).mean(0)
    for name, probs in {"_probs_vote": vote, "_logits_vote": logits.mean(0).softmax(-1)}.items():
        accuracy = classification.multiclass_accuracy(probs, labels, 7, average="micro")
        ece = classification.multiclass_calibration_error(probs, labels, 7, n_bins=15)
        assert figures[f"accuracy{name}"] == pytest.approx(float(accuracy))
        assert figures[f"ece{name}"] == pytest.approx(float(ece), rel=1e-5)
