# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Wide ResNet with ensemble heads, registered with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import is_vision_available

from nt_transformers.models.neurotrails_wide_resnet.configuration_neurotrails_wide_resnet import (
    NeuroTrailsWideResNetConfig,
)
from nt_transformers.models.neurotrails_wide_resnet.modeling_neurotrails_wide_resnet import (
    NeuroTrailsWideResNetForImageClassification,
    NeuroTrailsWideResNetModel,
)


AutoConfig.register(NeuroTrailsWideResNetConfig.model_type, NeuroTrailsWideResNetConfig)
AutoModel.register(NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetModel)
AutoModelForImageClassification.register(NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetForImageClassification)
if is_vision_available():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    AutoImageProcessor.register(NeuroTrailsWideResNetConfig, image_processor_classes={"pil": ViTImageProcessorPil})

# Makes save_pretrained write the code beside the weights, for trust_remote_code.
NeuroTrailsWideResNetConfig.register_for_auto_class()
NeuroTrailsWideResNetModel.register_for_auto_class("AutoModel")
NeuroTrailsWideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "NeuroTrailsWideResNetConfig",
    "NeuroTrailsWideResNetForImageClassification",
    "NeuroTrailsWideResNetModel",
]
