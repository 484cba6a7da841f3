# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Grids of training runs that compare methods at equal budgets, and survive being stopped."""

from .config import StudyConfig
from .plan import Run, RunSpec, StudyPlan
from .runner import run_study


__all__ = ["Run", "RunSpec", "StudyConfig", "StudyPlan", "run_study"]
