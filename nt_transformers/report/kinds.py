# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""By which figures, and in which words, results on text and on images are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


Row = dict[str, Any]
# Heading, value of a run, format; means over seeds are shown with their standard deviation.
Column = tuple[str, Callable[[Row], float | None], str]


@dataclass(frozen=True)
class Kind:
    """What is said of one kind of network.

    Args:
        quality: The figure by which predictions are judged.
        loss: The figure that every evaluation on validation data has.
        value: Of a run, or of a point of its curve: the quality of the vote, as it is shown.
        gain: Of a run: how much the vote gains on its heads.
        higher_is_better: Whether the better network has the higher quality.
        columns: Of the tables.
        words: What the texts of page and plots leave open.
    """

    quality: str
    loss: str
    value: Callable[[Row], float]
    gain: Callable[[Row], float]
    higher_is_better: bool
    columns: Sequence[Column]
    words: Mapping[str, str]


def figure(row: Row, name: str) -> Any:
    """A figure on test data, or on validation data where test data were left alone; None if there is none."""
    return row.get(f"test_{name}", row.get(f"eval_{name}"))


def vote_perplexity_gain(row: Row) -> float:
    """By how much the vote's perplexity is below the mean of the heads', in percent of it."""
    return 100 * (1 - figure(row, "perplexity") / fmean(figure(row, "perplexity_heads")))


def vote_accuracy_gain(row: Row) -> float:
    """By how much the vote's accuracy is above the mean of the heads', in percentage points."""
    return 100 * (figure(row, "accuracy") - fmean(figure(row, "accuracy_heads")))


def _measured(heading: str, name: str, form: str, factor: float = 1.0) -> Column:
    def value(row: Row) -> float | None:
        found = figure(row, name)
        return None if found is None else factor * (fmean(found) if isinstance(found, list) else found)

    return heading, value, form


def _cost_columns(item: str) -> tuple[Column, ...]:
    return (
        ("parameters, M", lambda row: row["parameters"] / 1e6, ".3f"),
        ("active, M", lambda row: row["active_parameters"] / 1e6, ".3f"),
        (f"forward MFLOPs/{item}", lambda row: row[f"forward_flops_per_{item}"] / 1e6, ".3f"),
        ("training TFLOPs", lambda row: row["training_flops"] and row["training_flops"] / 1e12, ".2f"),
        (f"training {item}s, M", lambda row: row[f"{item}s"] / 1e6, ".2f"),
    )


TEXT = Kind(
    quality="perplexity",
    loss="eval_loss",
    value=lambda row: float(figure(row, "perplexity")),
    gain=vote_perplexity_gain,
    higher_is_better=False,
    columns=(
        _measured("perplexity", "perplexity", ".2f"),
        _measured("of the heads", "perplexity_heads", ".2f"),
        ("vote gain, %", vote_perplexity_gain, ".1f"),
        _measured("disagreement", "disagreement", ".3f"),
        _measured("calibration error", "ece", ".4f"),
        _measured("Brier score", "brier", ".4f"),
        *_cost_columns("token"),
    ),
    words={
        "vote": "perplexity of the vote",
        "gain": "vote's perplexity below the heads' (%)",
        "item": "token",
        "items": "tokens",
        "answers": "tokens",
        "data": "documents",
        "layers": "layers",
        "equal": "tokens",
    },
)
VISION = Kind(
    quality="accuracy",
    loss="eval_nll",
    value=lambda row: 100 * float(figure(row, "accuracy")),
    gain=vote_accuracy_gain,
    higher_is_better=True,
    columns=(
        _measured("accuracy, %", "accuracy", ".2f", 100),
        _measured("of the heads", "accuracy_heads", ".2f", 100),
        ("vote gain, points", vote_accuracy_gain, ".2f"),
        _measured("NLL", "nll", ".4f"),
        _measured("calibration error", "ece", ".4f"),
        _measured("Brier score", "brier", ".4f"),
        _measured("disagreement", "disagreement", ".3f"),
        _measured("corrupted: accuracy, %", "corrupted_accuracy", ".2f", 100),
        _measured("corrupted: NLL", "corrupted_nll", ".4f"),
        _measured("corrupted: calibration error", "corrupted_ece", ".4f"),
        _measured("corrupted: disagreement", "corrupted_disagreement", ".3f"),
        *_cost_columns("image"),
    ),
    words={
        "vote": "accuracy of the vote (%)",
        "gain": "vote's accuracy above the heads' (points)",
        "item": "image",
        "items": "images",
        "answers": "classes",
        "data": "images",
        "layers": "blocks",
        "equal": "epochs",
    },
)


def kind_of(row: Row) -> Kind:
    """The kind to which a finished run belongs."""
    return VISION if figure(row, TEXT.quality) is None else TEXT
