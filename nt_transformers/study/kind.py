# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What tells a study on text from one on images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..analysis import ModelCost
from ..training import TrainingConfig
from .config import KindName, StudyConfig


@dataclass(frozen=True)
class Outline:
    """A network as far as a study is concerned.

    Args:
        cost: Per item (token, image).
        items_per_example: Items of one training example, padding included.
        shape: Columns of the results: `num_ensemble_heads`, `num_head_layers`, `num_hidden_layers` and others.
    """

    cost: ModelCost
    items_per_example: int
    shape: dict[str, Any]


class Kind(ABC):
    """The runs of a study: of which network, on which data, measured how."""

    # Class of the runs' configurations.
    config_class: ClassVar[type[TrainingConfig]]
    # Figures of an evaluation that make the curves of a report.
    curve: ClassVar[tuple[str, ...]]
    # Field of `model` that holds the length of the heads.
    head_length: ClassVar[str]
    # The figure on validation data by which learning rates are chosen: the loss of the vote, nats.
    loss: ClassVar[str]

    def split(self, heads: int | None, head_layers: int | None) -> dict[str, Any]:
        """Fields of `model` for so many heads of so many layers; those that are None are left out."""
        fields = {"num_ensemble_heads": heads, self.head_length: head_layers}
        return {name: value for name, value in fields.items() if value is not None}

    @abstractmethod
    def outline(self, training: Any) -> Outline:
        """Cost and shape of the network that `training` would train; nothing is computed."""

    @abstractmethod
    def prepare(self, config: StudyConfig) -> Any:
        """Makes ready what all runs share; returns what `test` has to know of the test data, as JSON can hold it.

        Raises:
            ValueError: the data do not serve the study.
        """

    @abstractmethod
    def train(self, training: Any, *, final: bool) -> dict[str, Any]:
        """Trains and returns the summary; touches test data only if the run is `final`, none that tunes."""

    @abstractmethod
    def test(self, folder: Path, training: Any, test: Any) -> dict[str, Any]:
        """Figures on test data of the network in `folder`, by names that begin with `test_`."""

    @abstractmethod
    def headline(self, row: Mapping[str, Any]) -> str:
        """How good a finished run is, in a few words."""


def kind_of(name: KindName) -> Kind:
    """The kind of that name; that of images needs torchvision."""
    if name == "text":
        from .text import TextKind

        return TextKind()
    from .vision import VisionKind

    return VisionKind()
