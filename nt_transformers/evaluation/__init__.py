# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot evaluation by EleutherAI's lm-eval; needs the extra `eval`."""

from importlib.util import find_spec


if find_spec("lm_eval") is None:
    raise ImportError('nt_transformers.evaluation needs lm-eval: pip install "nt_transformers[eval]"')

from .language_model import EnsembleAnswer, NeuroTrailsLM
from .members import EnsembleMember, PerHeadTaskManager
from .zero_shot import SUITES, evaluate_zero_shot


__all__ = [
    "SUITES",
    "EnsembleAnswer",
    "EnsembleMember",
    "NeuroTrailsLM",
    "PerHeadTaskManager",
    "evaluate_zero_shot",
]
