# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""From a study's configuration to its runs: each a training configuration with a name and a known cost."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..analysis import ModelCost, language_model_cost
from ..data import load_tokenizer
from ..sparsity import planned_nonzeros
from ..training import TextTrainingConfig, build_config
from ..validation import check
from .config import StudyConfig


TUNING = "tuning"


@dataclass(frozen=True)
class RunSpec:
    """A point of a grid; None keeps the method's own value. `budget` is also `tuning`, with the rate that it tries."""

    method: str
    density: float | None = None
    num_head_layers: int | None = None
    num_ensemble_heads: int | None = None
    budget: str = "tokens"
    seed: int = 0
    learning_rate: float | None = None


@dataclass(frozen=True)
class Run:
    """A run that can be started: its point of the grid, configuration, cost per token, and folder.

    The name ends with a digest of everything that decides over the result: a run whose settings change is another run.
    """

    spec: RunSpec
    training: TextTrainingConfig
    cost: ModelCost
    name: str

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def training_flops_per_token(self) -> float:
        return self.cost.training(self.training.sparsity.dense_gradient_interval)

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole training."""
        tokens = self.training.global_batch_size * self.training.data.sequence_length
        return self.training_flops_per_token * self.training.max_steps * tokens


class StudyPlan:
    """Turns the points of the grids into runs.

    Raises:
        ValueError: the training fields of a method do not make a training run; it says which.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.training["data"]["tokenizer"])
        self._costs: dict[str, ModelCost] = {}
        steps = config.training.get("max_steps")
        check(isinstance(steps, int) and steps >= 1, "training.max_steps", steps, "give the steps of equal tokens")
        self.steps: int = config.training["max_steps"]
        self.reference_flops = self._flops_per_token(RunSpec(config.flops_reference))

    def specs(self) -> list[RunSpec]:
        """The points of all grids in order, each once."""
        return list(dict.fromkeys(itertools.chain.from_iterable(_points(grid) for grid in self.config.grids)))

    def tuning_runs(self) -> list[Run]:
        """Short runs of every method with every learning rate; none if there is nothing to choose."""
        if len(self.config.learning_rates) == 1:
            return []
        methods = dict.fromkeys(spec.method for spec in self.specs())
        pairs = itertools.product(methods, self.config.learning_rates)
        return [self.run(RunSpec(method, budget=TUNING, learning_rate=rate)) for method, rate in pairs]

    def main_runs(self, learning_rates: Mapping[str, float]) -> list[Run]:
        """The runs of the grids, given each method's learning rate; methods without one are left out."""
        specs = (spec for spec in self.specs() if spec.method in learning_rates)
        runs = [self.run(dataclasses.replace(spec, learning_rate=learning_rates[spec.method])) for spec in specs]
        # A point that names a method's own values is the point that leaves them out.
        return list({run.name: run for run in runs}.values())

    def run(self, spec: RunSpec) -> Run:
        """The run of one point."""
        training = self._training(spec, self._steps(spec))
        relevant = {"training": training.identity(), "test": self.config.test, "budget": spec.budget}
        digest = hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=4).hexdigest()
        model = training.model
        split = f"{model.num_ensemble_heads}x{model.num_head_layers or model.num_hidden_layers}"
        density = f"{training.sparsity.density:g}"
        name = "-".join([spec.method, density, split, spec.budget, f"seed{spec.seed}", digest])
        folder = Path(self.config.output_dir) / "runs" / name
        return Run(spec, dataclasses.replace(training, output_dir=str(folder)), self._cost(training), name)

    def _steps(self, spec: RunSpec) -> int:
        if spec.budget == TUNING:
            assert self.config.tuning_steps is not None
            return self.config.tuning_steps
        if spec.budget == "tokens":
            return self.steps
        sparsity = self._training(spec, self.steps).sparsity
        remedy = "its cost changes while it prunes; compare it at equal tokens only"
        check(sparsity.method != "gmp", f"methods.{spec.method}.sparsity.method", sparsity.method, remedy)
        return max(round(self.steps * self.reference_flops / self._flops_per_token(spec)), 1)

    def _flops_per_token(self, spec: RunSpec) -> float:
        training = self._training(spec, self.steps)
        return self._cost(training).training(training.sparsity.dense_gradient_interval)

    def _training(self, spec: RunSpec, steps: int) -> TextTrainingConfig:
        model = {"num_head_layers": spec.num_head_layers, "num_ensemble_heads": spec.num_ensemble_heads}
        point = {
            "model": {name: value for name, value in model.items() if value is not None},
            "sparsity": {} if spec.density is None else {"density": spec.density},
            "seed": spec.seed,
            "max_steps": steps,
            "learning_rate": spec.learning_rate or self.config.learning_rates[0],
            "output_dir": self.config.output_dir,
            "resume_from_checkpoint": "latest",
        }
        fields = _merged(_merged(self.config.training, self.config.methods[spec.method]), point)
        try:
            return build_config(TextTrainingConfig, fields)
        except ValueError as error:
            raise ValueError(f"methods.{spec.method}: {error}") from error

    def _cost(self, training: TextTrainingConfig) -> ModelCost:
        key = json.dumps(
            [dataclasses.asdict(part) for part in (training.model, training.sparsity, training.data)], sort_keys=True
        )
        if key not in self._costs:
            with torch.device("meta"):
                model = training.model.build(self.tokenizer)
            nonzeros = planned_nonzeros(model, training.sparsity)
            self._costs[key] = language_model_cost(model, training.data.sequence_length, nonzeros)
        return self._costs[key]


def plan_table(runs: Iterable[Run]) -> str:
    """The runs with what they cost, as text."""
    row = "{:<58}{:>12}{:>12}{:>12}{:>8}{:>12}".format
    lines = [row("run", "parameters", "active", "FLOPs/token", "steps", "FLOPs")]
    total = 0.0
    for run in runs:
        cost = run.cost
        flops = f"{run.training_flops_per_token:.3g}"
        lines.append(
            row(
                run.name,
                f"{cost.parameters:,}",
                f"{cost.active_parameters:,}",
                flops,
                run.training.max_steps,
                f"{run.total_flops:.3g}",
            )
        )
        total += run.total_flops
    return "\n".join([*lines, row("all", "", "", "", "", f"{total:.3g}")])


def _points(grid: Any) -> Iterator[RunSpec]:
    axes = {axis.name: getattr(grid, axis.name) for axis in dataclasses.fields(grid)}
    for values in itertools.product(*axes.values()):
        yield RunSpec(**dict(zip(axes, values, strict=True)))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, nested dicts field by field."""
    result = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _merged(result[name], value) if nested else value
    return result
