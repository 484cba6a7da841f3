# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ViT with ensemble heads, registered with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import is_vision_available

from nt_transformers.models.neurotrails_vit.configuration_neurotrails_vit import (
    NeuroTrailsViTConfig,
)
from nt_transformers.models.neurotrails_vit.modeling_neurotrails_vit import (
    NeuroTrailsViTForImageClassification,
    NeuroTrailsViTModel,
)


AutoConfig.register(NeuroTrailsViTConfig.model_type, NeuroTrailsViTConfig)
AutoModel.register(NeuroTrailsViTConfig, NeuroTrailsViTModel)
AutoModelForImageClassification.register(NeuroTrailsViTConfig, NeuroTrailsViTForImageClassification)
if is_vision_available():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    AutoImageProcessor.register(NeuroTrailsViTConfig, image_processor_classes={"pil": ViTImageProcessorPil})

# Makes save_pretrained write the code beside the weights, for trust_remote_code.
NeuroTrailsViTConfig.register_for_auto_class()
NeuroTrailsViTModel.register_for_auto_class("AutoModel")
NeuroTrailsViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "NeuroTrailsViTConfig",
    "NeuroTrailsViTForImageClassification",
    "NeuroTrailsViTModel",
]
