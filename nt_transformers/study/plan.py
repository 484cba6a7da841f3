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

from ..training import build_config
from ..validation import check
from .config import StudyConfig
from .kind import Outline, kind_of


TUNING = "tuning"


@dataclass(frozen=True)
class RunSpec:
    """A point of a grid; None keeps the method's own value. `budget` is also `tuning`, with the rate that it tries."""

    method: str
    density: float | None = None
    num_head_layers: int | None = None
    num_ensemble_heads: int | None = None
    budget: str = "tokens"
    length: float = 1.0
    seed: int = 0
    learning_rate: float | None = None


@dataclass(frozen=True)
class Run:
    """A run that can be started: its point of the grid, configuration, network, and folder.

    The name ends with a digest of everything that decides over the result: a run whose settings change is another run.
    """

    spec: RunSpec
    training: Any
    outline: Outline
    name: str

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole training."""
        return self.training.max_steps * _flops_per_step(self.training, self.outline)


class StudyPlan:
    """Turns the points of the grids into runs.

    Raises:
        ValueError: the training fields of a method do not make a training run; it says which.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.kind = kind_of(config.kind)
        self._outlines: dict[str, Outline] = {}
        steps = config.training.get("max_steps")
        remedy = "give the steps of all runs but those of equal FLOPs"
        check(isinstance(steps, int) and steps >= 1, "training.max_steps", steps, remedy)
        self.steps: int = config.training["max_steps"]
        self.reference_flops = self._flops_per_step(RunSpec(config.flops_reference))

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
        test = dataclasses.asdict(self.config)["test"]
        relevant = {"training": training.identity(), "test": test, "budget": spec.budget}
        digest = hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=4).hexdigest()
        outline = self._outline(training)
        split = f"{outline.shape['num_ensemble_heads']}x{outline.shape['num_head_layers']}"
        density = f"{training.sparsity.density:g}"
        budget = spec.budget if spec.length == 1 else f"{spec.length:g}x{spec.budget}"
        name = "-".join([spec.method, density, split, budget, f"seed{spec.seed}", digest])
        folder = Path(self.config.output_dir) / "runs" / name
        return Run(spec, dataclasses.replace(training, output_dir=str(folder)), outline, name)

    def _steps(self, spec: RunSpec) -> int:
        if spec.budget == TUNING:
            assert self.config.tuning_steps is not None
            return self.config.tuning_steps
        if spec.budget != "flops":
            return max(round(self.steps * spec.length), 1)
        sparsity = self._training(spec, self.steps).sparsity
        remedy = "its cost changes while it prunes; leave it out of the budget flops"
        check(sparsity.method != "gmp", f"methods.{spec.method}.sparsity.method", sparsity.method, remedy)
        return max(round(self.steps * spec.length * self.reference_flops / self._flops_per_step(spec)), 1)

    def _flops_per_step(self, spec: RunSpec) -> float:
        training = self._training(spec, self.steps)
        return _flops_per_step(training, self._outline(training))

    def _training(self, spec: RunSpec, steps: int) -> Any:
        point = {
            "model": self.kind.split(spec.num_ensemble_heads, spec.num_head_layers),
            "sparsity": {} if spec.density is None else {"density": spec.density},
            "seed": spec.seed,
            "max_steps": steps,
            "learning_rate": spec.learning_rate or self.config.learning_rates[0],
            "output_dir": self.config.output_dir,
            "resume_from_checkpoint": "latest",
        }
        fields = _merged(_merged(self.config.training, self.config.methods[spec.method]), point)
        try:
            return build_config(self.kind.config_class, fields)
        except ValueError as error:
            raise ValueError(f"methods.{spec.method}: {error}") from error

    def _outline(self, training: Any) -> Outline:
        key = json.dumps(
            [dataclasses.asdict(part) for part in (training.model, training.sparsity, training.data)], sort_keys=True
        )
        if key not in self._outlines:
            self._outlines[key] = self.kind.outline(training)
        return self._outlines[key]


def _flops_per_step(training: Any, outline: Outline) -> float:
    """FLOPs of an optimizer step, padding included."""
    per_item = outline.cost.training(training.sparsity.dense_gradient_interval)
    return per_item * outline.items_per_example * training.global_batch_size


def plan_table(runs: Iterable[Run]) -> str:
    """The runs with what they cost, as text."""
    row = "{:<58}{:>12}{:>12}{:>12}{:>8}{:>12}".format
    lines = [row("run", "parameters", "active", "FLOPs/step", "steps", "FLOPs")]
    total = 0.0
    for run in runs:
        cost = run.outline.cost
        lines.append(
            row(
                run.name,
                f"{cost.parameters:,}",
                f"{cost.active_parameters:,}",
                f"{run.total_flops / run.training.max_steps:.3g}",
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
