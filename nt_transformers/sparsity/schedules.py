# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""When the topology changes, and how much: closed forms of the progress through training."""

from __future__ import annotations

import math

from .config import DensitySchedule, DropSchedule


def num_updates(total_steps: int, update_interval: int, stop_fraction: float) -> int:
    """How many topology updates a run has: one every `update_interval` steps, up to and including `stop_fraction`.

    The very last step has none, since nothing would train the weights that it grows.
    """
    return min(stop_step(total_steps, stop_fraction), total_steps - 1) // update_interval


def stop_step(total_steps: int, stop_fraction: float) -> int:
    """The optimizer step at which the schedules end."""
    return round(stop_fraction * total_steps)


def drop_fraction(schedule: DropSchedule, progress: float, initial: float, final: float) -> float:
    """Share of the active weights to drop, from `initial` at progress 0 to `final` at progress 1."""
    remaining = {"cosine": _cosine(progress), "linear": 1 - progress, "constant": 1.0}[schedule]
    return final + (initial - final) * remaining


def pruned_share(schedule: DensitySchedule, progress: float) -> float:
    """Share of the weights to be pruned in all that is pruned at this progress.

    `cubic` is equation 1 of "To prune, or not to prune" (Zhu and Gupta, 2017).
    """
    remaining = {"cubic": (1 - progress) ** 3, "linear": 1 - progress, "cosine": _cosine(progress)}[schedule]
    return 1 - remaining


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
