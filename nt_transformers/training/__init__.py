# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The Accelerate training loop, what the recipes need around it, and the callback for Trainer."""

from .arguments import build_config, parse_arguments
from .callback import SparsifierCallback
from .config import TrainingConfig
from .loop import Task, TrainingLoop
from .text import (
    ContinuedTextTrainingConfig,
    LlamaArguments,
    PretrainedArguments,
    TextTask,
    TextTrainingConfig,
    train_language_model,
)


__all__ = [
    "ContinuedTextTrainingConfig",
    "LlamaArguments",
    "PretrainedArguments",
    "SparsifierCallback",
    "Task",
    "TextTask",
    "TextTrainingConfig",
    "TrainingConfig",
    "TrainingLoop",
    "build_config",
    "parse_arguments",
    "train_language_model",
]
