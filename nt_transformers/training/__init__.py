# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The Accelerate training loop, what the recipes need around it, and the callback for Trainer."""

from .arguments import build_config, parse_arguments, run_recipe
from .callback import SparsifierCallback
from .checkpoint import CheckpointError
from .config import TrainingConfig
from .interruption import Interrupted
from .loop import Task, TrainingLoop
from .nonfinite import NonFiniteError
from .text import (
    ContinuedTextTrainingConfig,
    LlamaArguments,
    PretrainedArguments,
    TextTask,
    TextTrainingConfig,
    train_language_model,
)


__all__ = [
    "CheckpointError",
    "ContinuedTextTrainingConfig",
    "Interrupted",
    "LlamaArguments",
    "NonFiniteError",
    "PretrainedArguments",
    "SparsifierCallback",
    "Task",
    "TextTask",
    "TextTrainingConfig",
    "TrainingConfig",
    "TrainingLoop",
    "build_config",
    "parse_arguments",
    "run_recipe",
    "train_language_model",
]
