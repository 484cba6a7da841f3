# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Figures of classifiers against a slow reference."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from nt_transformers.analysis.classification import ClassifierScores


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
    scores = ClassifierScores(heads, 7)
    for part in np.array_split(np.arange(200), 3):
        scores.update(torch.from_numpy(logits[:, part]), torch.from_numpy(labels[part]))
    found = scores.figures(vote)

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


def test_certain_and_right_is_perfect_certain_and_wrong_is_worst() -> None:
    logits = torch.zeros(2, 50, 3)
    logits[:, :, 1] = 200.0
    for label, accuracy, ece, brier in ((1, 1.0, 0.0, 0.0), (2, 0.0, 1.0, 2.0)):
        scores = ClassifierScores(2, 3)
        scores.update(logits, torch.full((50,), label))
        figures = scores.figures("probs")
        assert (figures["accuracy"], figures["ece"], figures["brier"]) == pytest.approx((accuracy, ece, brier))
        assert figures["nll"] == pytest.approx(0 if accuracy else 200)
        assert figures["disagreement"] == 0


def test_probabilities_that_round_above_one_are_not_taken_for_logits() -> None:
    """torchmetrics puts anything above 1 through another softmax, which would halve the confidence."""
    logits = torch.tensor([[[40.0, 0.0]] * 64] * 3)
    logits[1] *= 0.9
    scores = ClassifierScores(3, 2)
    scores.update(logits, torch.zeros(64, dtype=torch.int64))
    assert scores.figures("probs")["ece"] == pytest.approx(0, abs=1e-6)


def score_share(rank: int, folder: Path) -> None:
    """What process `rank` of two does: figures of every second image."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    logits, labels = torch.load(folder / "images.pt")
    scores = ClassifierScores(2, 5)
    scores.update(logits[:, rank::2], labels[rank::2])
    (folder / f"{rank}.json").write_text(json.dumps(scores.figures("probs")))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_the_work_and_the_figures(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 31, 5, generator=generator), torch.randint(5, (31,), generator=generator)
    torch.save((logits, labels), tmp_path / "images.pt")
    multiprocessing.start_processes(score_share, (tmp_path,), nprocs=2, start_method="spawn")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    whole = ClassifierScores(2, 5)
    whole.update(logits, labels)
    expected = whole.figures("probs")
    assert one.keys() == expected.keys()
    for name, value in expected.items():
        assert one[name] == pytest.approx(value, abs=1e-6)
