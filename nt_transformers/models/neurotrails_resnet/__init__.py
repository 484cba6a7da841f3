# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ResNet with ensemble heads, registered with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import is_vision_available

from nt_transformers.models.neurotrails_resnet.configuration_neurotrails_resnet import (
    NeuroTrailsResNetConfig,
)
from nt_transformers.models.neurotrails_resnet.modeling_neurotrails_resnet import (
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsResNetModel,
)


AutoConfig.register(NeuroTrailsResNetConfig.model_type, NeuroTrailsResNetConfig)
AutoModel.register(NeuroTrailsResNetConfig, NeuroTrailsResNetModel)
AutoModelForImageClassification.register(NeuroTrailsResNetConfig, NeuroTrailsResNetForImageClassification)
if is_vision_available():
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    AutoImageProcessor.register(NeuroTrailsResNetConfig, image_processor_classes={"pil": ConvNextImageProcessorPil})

# Makes save_pretrained write the code beside the weights, for trust_remote_code.
NeuroTrailsResNetConfig.register_for_auto_class()
NeuroTrailsResNetModel.register_for_auto_class("AutoModel")
NeuroTrailsResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "NeuroTrailsResNetConfig",
    "NeuroTrailsResNetForImageClassification",
    "NeuroTrailsResNetModel",
]
