# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How a classifier holds up when images are not as in training: corrupted, or of another domain."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, load_corrupted
from ..data.image_batches import EvaluationBatches, evaluation_loader
from ..data.images import ImageDataConfig, LabelledImages
from .classification import score_classifier


Figures = dict[str, Any]


class RobustnessTest:
    """Measures one classifier on clean, corrupted and shifted images.

    Args:
        model: A NeuroTrails model for image classification, in evaluation mode.
        preparation: How its images are prepared.
        batch_size: Images at a time.
        num_workers: Background processes that prepare images.
    """

    def __init__(self, model: Any, preparation: ImageDataConfig, batch_size: int = 128, num_workers: int = 0) -> None:
        self.model = model
        self.preparation = preparation
        self.batch_size = batch_size
        self.num_workers = num_workers

    def on(self, images: LabelledImages) -> Figures:
        """`EnsembleScores.classifier_figures`; for images of another domain as well (folders as ImageNet-Sketch's)."""
        return self._score(images, self.preparation)

    def on_corrupted(
        self,
        images: LabelledImages | Path,
        corruptions: Sequence[str] = CORRUPTIONS,
        severities: Sequence[int] = SEVERITIES,
    ) -> dict[str, Any]:
        """Figures under corruption of clean `images`, or of those in a folder of CIFAR-C's or ImageNet-C's form.

        Returns:
            `mean` over corruptions and severities (its accuracy, NLL and ECE are known as cAcc, cNLL and cECE),
            `by_severity` `{severity: mean over corruptions}`, and `by_corruption` `{name: {severity: figures}}`.

        Raises:
            ValueError: a corruption or severity does not exist.
        """
        pairs = list(itertools.product(corruptions, severities))
        if not pairs:
            raise ValueError(f"corruptions={list(corruptions)}, severities={list(severities)}: name one of each.")
        # All of them are looked up before any is measured: a mistake shows before hours of work.
        if isinstance(images, Path):
            class_names = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]
            read = [load_corrupted(images, name, severity, class_names) for name, severity in pairs]
            # They were brought to the network's size before they were corrupted.
            whole = replace(self.preparation, crop="none")
            figures = [self._score(each, whole) for each in read]
        else:
            made = [Corruption(name, severity) for name, severity in pairs]
            figures = [self._score(images, self.preparation, corruption) for corruption in made]
        scores = dict(zip(pairs, figures, strict=True))
        found = {name: {severity: scores[name, severity] for severity in severities} for name in corruptions}
        return {
            "mean": mean_figures(figures for each in found.values() for figures in each.values()),
            "by_severity": {
                severity: mean_figures(each[severity] for each in found.values()) for severity in severities
            },
            "by_corruption": found,
        }

    def _score(
        self, images: LabelledImages, preparation: ImageDataConfig, corruption: Corruption | None = None
    ) -> Figures:
        batches = EvaluationBatches(images, preparation, batch_size=self.batch_size, corruption=corruption)
        scores = score_classifier(self.model, evaluation_loader(batches, self.num_workers))
        return scores.classifier_figures(self.model.config.vote)


def mean_figures(figures: Iterable[Figures]) -> Figures:
    """The mean of each figure, that of lists head by head; `images` and `reliability` are left out."""
    listed = list(figures)
    means: Figures = {}
    for name, first in listed[0].items():
        values = [entry[name] for entry in listed]
        if name in ("images", "reliability"):
            continue
        if isinstance(first, list):
            means[name] = [sum(heads) / len(listed) for heads in zip(*values, strict=True)]
        else:
            means[name] = sum(values) / len(listed)
    return means


def check_plot(path: Path) -> None:
    """Raises a `ValueError` unless `plot_severity` could write this file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots are drawn by matplotlib ({error}): pip install nt_transformers[plots]") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"{str(path)!r}: name a file that ends in one of {', '.join(sorted(kinds))}.")


def plot_severity(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy over severity (0 is clean): a line for the vote of each model, thin ones for its heads.

    Args:
        results: By name of the model: `clean` as `RobustnessTest.on` and `corrupted` as `RobustnessTest.on_corrupted`
            return them.
        path: Image file, of any kind that matplotlib writes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="severity of corruption", ylabel="accuracy")
    for number, (name, result) in enumerate(results.items()):
        points = {0: result["clean"], **result["corrupted"]["by_severity"]}
        color = f"C{number}"
        axes.plot(list(points), [entry["accuracy"] for entry in points.values()], "o-", color=color, label=name)
        for head in zip(*(entry["accuracy_heads"] for entry in points.values()), strict=True):
            axes.plot(list(points), head, color=color, linewidth=0.7, alpha=0.5)
    axes.set_xticks(sorted({0, *(s for result in results.values() for s in result["corrupted"]["by_severity"])}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
