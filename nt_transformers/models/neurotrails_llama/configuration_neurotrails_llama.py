# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of LLaMA with ensemble heads."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig


_LARGEST_SIZE = 2**31 - 1
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_ensemble_heads",
)


def _shown(value: object) -> str:
    try:
        return str(value)
    except ValueError:
        return "an integer of thousands of digits"


@strict
class NeuroTrailsLlamaConfig(LlamaConfig):
    """`LlamaConfig` plus the split into a backbone and ensemble heads.

    The first `num_hidden_layers - num_head_layers` decoder layers form the backbone, which runs once; the last
    `num_head_layers` are built once for each ensemble head, each with its own final norm and output layer.
    One head is the single network. `num_head_layers == num_hidden_layers` leaves no backbone: the heads then have
    embeddings of their own and form a full ensemble.

    Args:
        num_ensemble_heads: M, the number of heads, at least 1.
        num_head_layers: B, decoder layers in each head, 0 to `num_hidden_layers`. With 0 a head is its final norm
            and output layer.
        vote: how the heads become one prediction: "probs" averages their probabilities, "logits" their logits.

    Raises:
        ValueError: a size, a number of heads or layers, or the vote is out of its range.
        StrictDataclassError: another field of `LlamaConfig` is, or any field has the wrong type; it names the field
            and the value.
    """

    model_type = "neurotrails_llama"
    keys_to_ignore_at_inference = ["past_key_values", "head_losses", "head_logits"]
    # LLaMA's plans name modules that this model does not have.
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    num_ensemble_heads: int = 3
    num_head_layers: int = 8
    vote: str = "probs"

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving a model adds only its own class; a checkpoint of one class also has to load by the others.
        auto_map = {
            "AutoConfig": "configuration_neurotrails_llama.NeuroTrailsLlamaConfig",
            "AutoModel": "modeling_neurotrails_llama.NeuroTrailsLlamaModel",
            "AutoModelForCausalLM": "modeling_neurotrails_llama.NeuroTrailsLlamaForCausalLM",
        }
        # `strict` runs these again and wraps what they raise; users catch ValueError. LLaMA divides by some sizes.
        self.validate_sizes()
        self.validate_values()
        self.validate_ensemble()
        super().__post_init__(**{"auto_map": auto_map, **kwargs})

    @property
    def num_backbone_layers(self) -> int:
        """Decoder layers shared by all heads."""
        return self.num_hidden_layers - self.num_head_layers

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers that are built: the backbone's and those of every head."""
        return self.num_backbone_layers + self.num_ensemble_heads * self.num_head_layers

    @property
    def per_layer_config(self) -> list["NeuroTrailsLlamaConfig"]:
        """One entry for each decoder layer that is built; caches take their number of slots from its length."""
        return [self] * self.num_decoder_layers

    @per_layer_config.setter
    def per_layer_config(self, value: dict[int | str, dict[str, Any]] | None) -> None:
        if value is not None:
            raise ValueError(f"per_layer_config={value!r}: all layers of this model are alike; leave the field out.")

    @property
    def layer_types(self) -> list[str]:
        """The attention of each layer that is built; continuous batching sizes its cache by it."""
        return ["full_attention"] * self.num_decoder_layers

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` follows from the other fields, and is longer than `num_hidden_layers`."""

    def validate_sizes(self) -> None:
        """Layers of these sizes can be built; raises `ValueError` if not."""
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST_SIZE:
                raise ValueError(f"{name}={_shown(value)}: give a whole number from 1 to {_LARGEST_SIZE}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: make it a multiple of num_attention_heads="
                f"{self.num_attention_heads}."
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: choose a divisor of num_attention_heads="
                f"{self.num_attention_heads}."
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim}: rotary positions take an even number; head_dim is hidden_size / "
                "num_attention_heads unless given."
            )

    def validate_values(self) -> None:
        """Layers can be built and run with the other settings; raises `ValueError` if not."""
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={_shown(self.pad_token_id)}: choose a token below vocab_size={self.vocab_size}, or "
                "leave it out."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r}: choose one of {', '.join(sorted(ACT2FN))}.")
        for name in ("rms_norm_eps", "initializer_range", "attention_dropout"):
            value = getattr(self, name)
            if value is None or not 0 <= value <= 1:
                raise ValueError(f"{name}={_shown(value)}: give a number from 0 to 1.")
        dtype = getattr(torch, self.dtype, "") if isinstance(self.dtype, str) else self.dtype
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype={_shown(self.dtype)}: name a type of torch, such as 'float32' or 'bfloat16'.")
        rope: Any = self.rope_parameters or {}
        rope_type, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1)
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            choices = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
            raise ValueError(f"rope_parameters={_shown(rope)}: choose a rope_type from {choices}.")
        if not isinstance(theta, int | float) or not 0 < theta < 1e30:
            raise ValueError(f"rope_parameters={_shown(rope)}: give a positive number for rope_theta.")

    def validate_ensemble(self) -> None:
        """The heads, their depth and their vote make sense; raises `ValueError` if not."""
        if not 0 <= self.num_head_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_head_layers={_shown(self.num_head_layers)}: a head takes 0 to num_hidden_layers="
                f"{self.num_hidden_layers} of the decoder layers; lower it or raise num_hidden_layers."
            )
        if self.vote not in ("probs", "logits"):
            raise ValueError(
                f'vote={self.vote!r}: choose "probs" (mean of probabilities) or "logits" (mean of logits).'
            )


__all__ = ["NeuroTrailsLlamaConfig"]
