# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Sparse multi-head ensembles (NeuroTrails) for Hugging Face transformers; importing registers the Auto classes."""

import nt_transformers.inference  # noqa: F401 (registers the format of compressed checkpoints)
from nt_transformers.models import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
    NeuroTrailsResNetConfig,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsResNetModel,
    NeuroTrailsViTConfig,
    NeuroTrailsViTForImageClassification,
    NeuroTrailsViTModel,
    NeuroTrailsWideResNetConfig,
    NeuroTrailsWideResNetForImageClassification,
    NeuroTrailsWideResNetModel,
)


__version__ = "0.1.0"

__all__ = [
    "NeuroTrailsLlamaConfig",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaModel",
    "NeuroTrailsResNetConfig",
    "NeuroTrailsResNetForImageClassification",
    "NeuroTrailsResNetModel",
    "NeuroTrailsViTConfig",
    "NeuroTrailsViTForImageClassification",
    "NeuroTrailsViTModel",
    "NeuroTrailsWideResNetConfig",
    "NeuroTrailsWideResNetForImageClassification",
    "NeuroTrailsWideResNetModel",
    "__version__",
]
