# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The settings of a sparse training run; each `method` is a row of preset values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..validation import check, check_types


Method = Literal["rigl", "set", "static", "dense", "gmp", "neurotrails_llm", "neurotrails_vision"]
Distribution = Literal["uniform", "erk"]
MaskInit = Literal["random", "magnitude", "soft_magnitude"]
Drop = Literal["magnitude", "soft_magnitude"]
Growth = Literal["gradient", "random", "momentum"]
DropSchedule = Literal["cosine", "linear", "constant"]
DensitySchedule = Literal["cubic", "linear", "cosine"]
GrowInit = Literal["zero", "keep"]
OptimizerState = Literal["reset", "keep"]

_RIGL: dict[str, Any] = {
    "density": 0.9,
    "distribution": "erk",
    "drop": "magnitude",
    "growth": "gradient",
    "update_interval": 100,
    "stop_fraction": 0.75,
    "drop_fraction": 0.5,
    "final_drop_fraction": 0.005,
    "drop_schedule": "cosine",
    "temperature": 3.0,
    "allow_regrow": False,
    "grow_init": "zero",
    "optimizer_state": "reset",
    "density_schedule": "cubic",
}
_NEUROTRAILS = _RIGL | {"stop_fraction": 1.0, "allow_regrow": True, "grow_init": "keep", "optimizer_state": "keep"}

PRESETS: dict[str, dict[str, Any]] = {
    "rigl": _RIGL,
    "set": _RIGL | {"growth": "random"},
    "static": _RIGL,
    "dense": _RIGL,
    "gmp": _RIGL,
    "neurotrails_llm": _NEUROTRAILS | {"drop": "soft_magnitude", "update_interval": 50},
    "neurotrails_vision": _NEUROTRAILS | {"density": 0.2, "update_interval": 1000},
}

# What a method is by definition, whatever is given: a run becomes its own baseline by changing `method` alone.
FIXED: dict[str, dict[str, Any]] = {"static": {"stop_fraction": 0.0}, "dense": {"density": 1.0, "stop_fraction": 0.0}}

# Typed Any, so that the fields keep the type which they have once `__post_init__` has filled them in.
_PRESET: Any = None


@dataclass
class SparsityConfig:
    """Which weights exist, and how that changes during training.

    A field that is not given takes the value of its method; a field that is given overrides it. After construction
    every field holds the value that is in effect.

    Args:
        method: The preset. `rigl`: random masks, the smallest weights make way for those of largest gradient (Evci et
            al., 2020). `set`: the same with random growth (Mocanu et al., 2018). `static`: random masks that never
            change. `dense`: no masks. `gmp`: starts dense and prunes by magnitude to the density (Zhu and Gupta,
            2017). `neurotrails_llm`, `neurotrails_vision`: the published NeuroTrails settings.
        density: Share of weights kept, over all masked tensors together, in (0, 1]. Default 0.9; `dense` 1.0;
            `neurotrails_vision` 0.2.
        distribution: How the density is spread over the tensors. `erk`: proportional to sum(shape) / prod(shape), at
            most 1. `uniform`: the same everywhere. Default `erk`.
        mask_init: Which weights exist at first. `random`: any, for a network that is new. `magnitude`: the largest.
            `soft_magnitude`: drawn without replacement, with probability proportional to |weight| ** temperature,
            another draw for each tensor, so that equal heads get different masks. The last two remove zeros before
            anything else: a sparse checkpoint keeps all of its weights at its own density and distribution. Not used
            by `gmp`. Default `random`; recipes that start from a checkpoint choose by magnitude.
        drop: Which active weights go. `magnitude`: the smallest. `soft_magnitude`: those that stay are drawn without
            replacement, with probability proportional to |weight| ** temperature. Default `magnitude`;
            `neurotrails_llm` `soft_magnitude`.
        growth: Which weights come. `gradient`: those of largest gradient. `momentum`: those of largest momentum in the
            optimizer. `random`: any. Not used by `gmp`. Default `gradient`; `set` `random`.
        update_interval: Optimizer steps from one topology update to the next. Default 100; `neurotrails_llm` 50;
            `neurotrails_vision` 1000.
        stop_fraction: Share of training after which the topology stays, in [0, 1]. Default 0.75; the two NeuroTrails
            methods 1.0; `static` and `dense` 0.
        drop_fraction: Share of a tensor's active weights dropped at the start of training, in (0, 1]. Default 0.5.
        final_drop_fraction: The same at `stop_fraction`, where the schedule ends. Not used by the constant schedule.
            Default 0.005.
        drop_schedule: How the one becomes the other. `constant` stays at `drop_fraction`. Default `cosine`.
        temperature: Exponent of `soft_magnitude`, above 0; the larger, the closer to `magnitude`. Default 3.
        allow_regrow: Whether a weight may grow in the very update that dropped it. Default false; the two NeuroTrails
            methods true.
        grow_init: Value of a weight that is dropped and grown by one update. `keep`: as it was. `zero`: like every
            other grown weight. Default `zero`; the two NeuroTrails methods `keep`.
        optimizer_state: What an update does to the optimizer's state of dropped and grown weights. `reset`: zeroes it.
            `keep`: leaves it, except that SGD's momentum of weights that were inactive starts at zero. Default
            `reset`; the two NeuroTrails methods `keep`.
        density_schedule: How `gmp` comes from 1 to the density. Default `cubic`.
        exclude: Shell patterns (`fnmatch`) of parameter names that stay dense, such as `*.classifier.*`; each has to
            match a parameter.
        dense_embeddings: Whether the weights of embeddings and of the model's output layers stay dense.
        seed: Key of all random choices; they depend on nothing else. Default 0; in the recipes the seed of the run.

    Raises:
        ValueError: A value is unknown, out of range or at odds with the method.
    """

    method: Method = "rigl"
    density: float = _PRESET
    distribution: Distribution = _PRESET
    mask_init: MaskInit | None = None
    drop: Drop = _PRESET
    growth: Growth = _PRESET
    update_interval: int = _PRESET
    stop_fraction: float = _PRESET
    drop_fraction: float = _PRESET
    final_drop_fraction: float = _PRESET
    drop_schedule: DropSchedule = _PRESET
    temperature: float = _PRESET
    allow_regrow: bool = _PRESET
    grow_init: GrowInit = _PRESET
    optimizer_state: OptimizerState = _PRESET
    density_schedule: DensitySchedule = _PRESET
    exclude: Sequence[str] = field(default_factory=list)
    dense_embeddings: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.method, str) and self.method in PRESETS
        self._check(known, "method", f"set it to one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_types(self, "sparsity.")
        self.exclude = list(self.exclude)
        self._check_ranges()
        for name, value in FIXED.get(self.method, {}).items():
            setattr(self, name, value)

    @property
    def dense_gradient_interval(self) -> float | None:
        """Steps for each time that the gradients of removed weights are needed, over the whole run; None for never."""
        grows = self.growth == "gradient" and self.method != "gmp" and self.stop_fraction > 0
        return self.update_interval / self.stop_fraction if grows else None

    def _check_ranges(self) -> None:
        for name in ("density", "drop_fraction"):
            self._check(0 < getattr(self, name) <= 1, name, "set it above 0 and at most 1")
        for name in ("stop_fraction", "final_drop_fraction"):
            self._check(0 <= getattr(self, name) <= 1, name, "set it between 0 and 1")
        self._check(self.temperature > 0, "temperature", "set it above 0")
        self._check(self.update_interval >= 1, "update_interval", "set it to at least 1")

    def _check(self, valid: bool, name: str, remedy: str) -> None:
        check(valid, f"sparsity.{name}", getattr(self, name), remedy)
