# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Calibration and diversity equal their definitions, item by item, and keep their identities."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from nt_transformers.analysis import (
    EnsembleScores,
    expected_calibration_error,
    log_mean_probs,
    mutual_information,
    prediction_sums,
    reliability_diagram,
)


def random_heads(heads: int = 3, items: int = 200, classes: int = 11, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(heads, items, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (items,), generator=generator)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_figures_equal_their_definitions(vote: str) -> None:
    logits, targets = random_heads()
    figures = EnsembleScores.of(logits, targets).figures(vote)
    probs = logits.softmax(-1)
    own = probs.mean(0) if vote == "probs" else logits.mean(0).softmax(-1)
    rows = range(len(targets))
    pairs = list(permutations(range(3), 2))

    assert figures["eval_loss"] == pytest.approx(-sum(math.log(own[n, targets[n]]) for n in rows) / 200, rel=1e-6)
    assert figures["eval_accuracy"] == pytest.approx(sum(bool(own[n].argmax() == targets[n]) for n in rows) / 200)
    one_hot = torch.eye(11, dtype=torch.float64)[targets]
    assert figures["eval_brier"] == pytest.approx(float(((own - one_hot) ** 2).sum(-1).mean()), rel=1e-6)
    different = [float((probs[a].argmax(-1) != probs[b].argmax(-1)).double().mean()) for a, b in pairs]
    assert figures["eval_disagreement"] == pytest.approx(sum(different) / 6)
    kl = [sum(divergence(probs[a, n], probs[b, n]) for n in rows) / 200 for a, b in pairs]
    assert figures["eval_kl"] == pytest.approx(sum(kl) / 6, rel=1e-5)
    towards_vote = [divergence(probs[m, n], probs[:, n].mean(0)) for m in range(3) for n in rows]
    assert figures["eval_mutual_information"] == pytest.approx(sum(towards_vote) / 600, rel=1e-5)


def test_vote_loss_and_ambiguity_sum_to_the_mean_head_loss() -> None:
    logits, targets = random_heads()
    scores = EnsembleScores.of(logits, targets)
    log_probs = logits.log_softmax(-1)
    rows = torch.arange(len(targets))
    for vote in ("probs", "logits"):
        figures = scores.figures(vote)
        heads = sum(figures["eval_loss_heads"]) / 3
        assert figures["eval_loss"] + figures["eval_ambiguity"] == pytest.approx(heads, rel=1e-12)
        assert figures["eval_ambiguity"] > 0
    # Without a look at the loss: log of the arithmetic over the geometric mean of what the heads give the target ...
    right = log_probs[:, rows, targets]
    ambiguity = (log_mean_probs(log_probs)[rows, targets] - right.mean(0)).mean()
    assert scores.figures("probs")["eval_ambiguity"] == pytest.approx(float(ambiguity), rel=1e-5)
    # ... and for mean logits the mean divergence of the heads from the vote, whatever the targets (Heskes, 1998).
    vote_probs, probs = logits.mean(0).softmax(-1), log_probs.exp()
    distance = sum(divergence(vote_probs[n], probs[m, n]) for m in range(3) for n in rows) / 600
    assert scores.figures("logits")["eval_ambiguity"] == pytest.approx(distance, rel=1e-5)


def test_identical_heads_do_not_differ() -> None:
    logits, targets = random_heads(heads=1)
    figures = EnsembleScores.of(logits.expand(4, -1, -1), targets).figures("probs")
    assert figures["eval_disagreement"] == 0
    for name in ("eval_kl", "eval_ambiguity", "eval_mutual_information"):
        assert figures[name] == pytest.approx(0, abs=1e-5), name


def test_random_heads_disagree_as_chance_has_it() -> None:
    logits, targets = random_heads(items=20_000, classes=8)
    # Standard deviation of a share of 20,000 items: 0.0023.
    assert EnsembleScores.of(logits, targets).figures("probs")["eval_disagreement"] == pytest.approx(
        1 - 1 / 8, abs=0.01
    )


def test_mutual_information_of_an_item() -> None:
    # Two certain heads that contradict each other: one bit, all of it epistemic. Two that share their doubt: none.
    certain = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).clamp(min=1e-9).log()
    doubtful = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]]).log()
    found = mutual_information(torch.cat([certain, doubtful], dim=1))
    assert found.tolist() == pytest.approx([math.log(2), 0], abs=1e-6)


def test_mutual_information_sums_to_the_mean_over_items() -> None:
    logits, targets = random_heads()
    mean = EnsembleScores.of(logits, targets).figures("logits")["eval_mutual_information"]
    assert mean == pytest.approx(float(mutual_information(logits.log_softmax(-1)).mean()), rel=1e-5)


def test_calibration_error_equals_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, targets = random_heads(heads=1, items=1000)
    bins = prediction_sums(logits[0].log_softmax(-1), targets)["bins"]
    expected = functional.multiclass_calibration_error(logits[0].softmax(-1), targets, 11, n_bins=15, norm="l1")
    assert float(expected_calibration_error(bins)) == pytest.approx(float(expected), rel=1e-5)


def test_reliability_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.92, 0.08], [0.6, 0.4], [1.0, 0.0]])
    bins = prediction_sums(probs.clamp(min=1e-9).log(), torch.tensor([0, 1, 0, 0]))["bins"]
    # Bins are a fifteenth wide: 0.6 alone, 0.9 and 0.92 together, 1.0 in the last.
    expected = [(0.6, 1.0, 0.25), (0.91, 0.5, 0.5), (1.0, 1.0, 0.25)]
    for found, values in zip(reliability_diagram(bins), expected, strict=True):
        assert list(found.values()) == pytest.approx(values, rel=1e-6)
    assert float(expected_calibration_error(bins)) == pytest.approx((0.4 + 2 * 0.41) / 4, rel=1e-6)


def test_autocast_does_not_coarsen_the_figures() -> None:
    logits, targets = random_heads()
    expected = EnsembleScores.of(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EnsembleScores.of(logits, targets)
    torch.testing.assert_close(found.sums, expected.sums)


def test_perfect_predictions() -> None:
    logits = torch.full((2, 5, 3), -50.0)
    targets = torch.tensor([0, 1, 2, 0, 1])
    logits[:, torch.arange(5), targets] = 50.0
    figures = EnsembleScores.of(logits, targets).figures("probs")
    assert figures["eval_accuracy"] == 1
    for name in ("eval_loss", "eval_brier", "eval_ece", "eval_disagreement"):
        assert figures[name] == pytest.approx(0, abs=1e-6), name


def test_predictions_that_are_no_numbers_show_in_the_figures() -> None:
    log_probs = torch.full((2, 5), torch.nan)
    sums = prediction_sums(log_probs, torch.tensor([0, 3]))
    assert math.isnan(float(sums["nll"]))
    assert math.isnan(float(expected_calibration_error(sums["bins"])))


@pytest.mark.parametrize("heads", [1, 3])
def test_losses_alone_are_those_of_all_figures(heads: int) -> None:
    logits, targets = random_heads(heads=heads)
    everything, losses = (EnsembleScores.of(logits, targets, calibration=flag) for flag in (True, False))
    for vote in ("probs", "logits"):
        found, expected = losses.language_figures(vote), everything.language_figures(vote)
        assert found.keys() == {name for name in expected if name in found}
        assert len(found) == 9
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
