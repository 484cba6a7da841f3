# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a study is told."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..validation import check


KindName = Literal["text", "vision"]
Budget = Literal["tokens", "epochs", "flops"]
# What it is called that all methods see the same data equally often.
EQUAL_DATA: dict[KindName, Budget] = {"text": "tokens", "vision": "epochs"}


@dataclass(kw_only=True)
class Grid:
    """Runs for every combination of the values given; what is null keeps the method's own value.

    Args:
        method: Names out of the study's `methods`.
        density: Share of weights kept.
        num_head_layers: Layers (of a convolutional network: blocks) of each ensemble head, B.
        num_ensemble_heads: Ensemble heads, M.
        budget: `tokens` (text) or `epochs` (vision): the study's `max_steps`, the default. `flops`: as many steps as
            cost what those of the study's `flops_reference` cost.
        length: Steps as multiples of what the budget gives: sparse networks gain from more of them.
        seed: Seeds.
    """

    method: list[str]
    density: list[float | None] = field(default_factory=lambda: [None])
    num_head_layers: list[int | None] = field(default_factory=lambda: [None])
    num_ensemble_heads: list[int | None] = field(default_factory=lambda: [None])
    budget: list[Budget] = field(default_factory=list)
    length: list[float] = field(default_factory=lambda: [1.0])
    seed: list[int] = field(default_factory=lambda: [0])


@dataclass(kw_only=True)
class ImageTest:
    """How finished classifiers are measured: on all test images as they are, and on some of them corrupted.

    Args:
        corruptions: Which ones; null for the 15 standard ones, none for clean images only.
        severities: Which ones of 1 to 5.
        images: How many of the test images are corrupted, drawn once; null for all.
    """

    corruptions: list[str] | None = None
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    images: int | None = None

    def __post_init__(self) -> None:
        from ..data.corruptions import CORRUPTIONS, SEVERITIES  # which need torchvision, as all of vision

        for name in self.corruptions or []:
            check(name in CORRUPTIONS, "test.corruptions", name, f"choose from {', '.join(CORRUPTIONS)}")
        known = bool(self.severities) and set(self.severities) <= set(SEVERITIES)
        check(known, "test.severities", self.severities, "choose from 1 to 5")
        check(self.images is None or self.images >= 1, "test.images", self.images, "give at least 1, or null for all")


@dataclass(kw_only=True)
class StudyConfig:
    """A study.

    Args:
        kind: What the networks work on: `text` (`recipes/train_c4.py`) or `vision` (`recipes/train_vision.py`).
        output_dir: Folder of the study: one folder for each run, and `results.jsonl`.
        setting: What the reader of the report should know about data, size and budget.
        training: Fields of a training run that all runs share, nested as in the recipes' files.
        methods: For each method, by name, the fields in which its runs differ from `training`.
        learning_rates: Peak learning rates. If there are several, each method tries them in short runs and takes what
            gives the lowest loss on validation data.
        tuning_steps: Optimizer steps of such a short run.
        flops_reference: The method whose training cost is the budget `flops`.
        grids: What is run, in this order; a run that two grids ask for is done once.
        test: Of text: the documents on which every finished run is measured once. Of vision: how it is measured on
            the test images of `training.data`. Nothing is chosen by them.
        processes: Runs at a time, 1 or 2; they share the processor's cores.
        dry_run: Only show the runs with their costs.
    """

    kind: KindName = "text"
    output_dir: str
    training: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    learning_rates: list[float]
    grids: list[Grid]
    test: str | ImageTest
    flops_reference: str
    setting: str = ""
    tuning_steps: int | None = None
    processes: int = 2
    dry_run: bool = False

    def __post_init__(self) -> None:
        check(bool(self.grids), "grids", self.grids, "give at least one")
        known = f"choose from the study's methods, {', '.join(self.methods)}"
        check(self.flops_reference in self.methods, "flops_reference", self.flops_reference, known)
        equal = EQUAL_DATA[self.kind]
        for index, grid in enumerate(self.grids):
            for method in grid.method:
                check(method in self.methods, f"grids[{index}].method", method, known)
            grid.budget = grid.budget or [equal]
            for budget in grid.budget:
                check(budget in (equal, "flops"), f"grids[{index}].budget", budget, f"choose {equal} or flops")
            for length in grid.length:
                check(length > 0, f"grids[{index}].length", length, "give a multiple of the budget's steps, above 0")
        remedies = {"text": "name the test documents", "vision": "give its fields, such as severities: [1, 3, 5]"}
        check(isinstance(self.test, str) == (self.kind == "text"), "test", self.test, remedies[self.kind])
        own = ("output_dir", "seed", "learning_rate", "resume_from_checkpoint")
        for name in own:
            check(name not in self.training, f"training.{name}", self.training.get(name), "leave it to the study")
        for method, fields in self.methods.items():
            for name in (*own, "max_steps"):
                remedy = "leave it out: the budget decides, and the learning rate is tuned"
                check(name not in fields, f"methods.{method}.{name}", fields.get(name), remedy)
        check(bool(self.learning_rates), "learning_rates", self.learning_rates, "give at least one")
        if len(self.learning_rates) > 1:
            remedy = "give the length of the runs that choose among learning_rates, at least 1"
            check(self.tuning_steps is not None and self.tuning_steps >= 1, "tuning_steps", self.tuning_steps, remedy)
        check(self.processes in (1, 2), "processes", self.processes, "choose 1 or 2")
