# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The Accelerate training loop and what the recipes need around it."""

from .arguments import parse_arguments
from .config import TrainingConfig
from .loop import Task, TrainingLoop
from .text import LlamaArguments, TextTask, TextTrainingConfig, train_language_model


__all__ = [
    "LlamaArguments",
    "Task",
    "TextTask",
    "TextTrainingConfig",
    "TrainingConfig",
    "TrainingLoop",
    "parse_arguments",
    "train_language_model",
]
