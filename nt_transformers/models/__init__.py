# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Model classes; each folder is self-contained, so that its code can travel with a checkpoint."""

from nt_transformers.models.neurotrails_llama import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
)
from nt_transformers.models.neurotrails_wide_resnet import (
    NeuroTrailsWideResNetConfig,
    NeuroTrailsWideResNetForImageClassification,
    NeuroTrailsWideResNetModel,
)


__all__ = [
    "NeuroTrailsLlamaConfig",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaModel",
    "NeuroTrailsWideResNetConfig",
    "NeuroTrailsWideResNetForImageClassification",
    "NeuroTrailsWideResNetModel",
]
