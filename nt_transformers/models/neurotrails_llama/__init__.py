# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""LLaMA with ensemble heads, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nt_transformers.models.neurotrails_llama.configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from nt_transformers.models.neurotrails_llama.modeling_neurotrails_llama import (
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
)


AutoConfig.register(NeuroTrailsLlamaConfig.model_type, NeuroTrailsLlamaConfig)
AutoModel.register(NeuroTrailsLlamaConfig, NeuroTrailsLlamaModel)
AutoModelForCausalLM.register(NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM)

# Makes save_pretrained write the code beside the weights, for trust_remote_code.
NeuroTrailsLlamaConfig.register_for_auto_class()
NeuroTrailsLlamaModel.register_for_auto_class("AutoModel")
NeuroTrailsLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["NeuroTrailsLlamaConfig", "NeuroTrailsLlamaForCausalLM", "NeuroTrailsLlamaModel"]
