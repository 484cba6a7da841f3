# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of LLaMA with ensemble heads."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


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
        StrictDataclassError: a field is out of its range; it wraps the ValueError that names the remedy.
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
        super().__post_init__(**{"auto_map": auto_map, **kwargs})
        # `strict` runs this again and wraps what it raises; users catch ValueError.
        self.validate_ensemble()

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

    @property
    def layer_types(self) -> list[str]:
        """The attention of each layer that is built; continuous batching sizes its cache by it."""
        return ["full_attention"] * self.num_decoder_layers

    @per_layer_config.setter
    def per_layer_config(self, value: dict[int | str, dict[str, Any]] | None) -> None:
        if value is not None:
            raise ValueError(f"per_layer_config={value!r}: all layers of this model are alike; leave the field out.")

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` follows from the other fields, and is longer than `num_hidden_layers`."""

    def validate_ensemble(self) -> None:
        """The heads, their depth and their vote make sense; raises `ValueError` if not."""
        if self.num_ensemble_heads < 1:
            raise ValueError(f"num_ensemble_heads={self.num_ensemble_heads}: use 1 head (the single network) or more.")
        if not 0 <= self.num_head_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_head_layers={self.num_head_layers}: a head takes 0 to num_hidden_layers="
                f"{self.num_hidden_layers} of the decoder layers; lower it or raise num_hidden_layers."
            )
        if self.vote not in ("probs", "logits"):
            raise ValueError(
                f'vote={self.vote!r}: choose "probs" (mean of probabilities) or "logits" (mean of logits).'
            )


__all__ = ["NeuroTrailsLlamaConfig"]
