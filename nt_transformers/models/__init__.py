# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Model classes; each folder is self-contained, so that its code can travel with a checkpoint."""

from nt_transformers.models.neurotrails_llama import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
)
from nt_transformers.models.neurotrails_resnet import (
    NeuroTrailsResNetConfig,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsResNetModel,
)
from nt_transformers.models.neurotrails_vit import (
    NeuroTrailsViTConfig,
    NeuroTrailsViTForImageClassification,
    NeuroTrailsViTModel,
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
    "NeuroTrailsResNetConfig",
    "NeuroTrailsResNetForImageClassification",
    "NeuroTrailsResNetModel",
    "NeuroTrailsViTConfig",
    "NeuroTrailsViTForImageClassification",
    "NeuroTrailsViTModel",
    "NeuroTrailsWideResNetConfig",
    "NeuroTrailsWideResNetForImageClassification",
    "NeuroTrailsWideResNetModel",
]
