# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of ViT with ensemble heads."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.vit.configuration_vit import ViTConfig


@strict
class NeuroTrailsViTConfig(ViTConfig):
    """`ViTConfig` plus the split into a backbone and ensemble heads.

    The first `num_hidden_layers - num_head_layers` encoder layers form the backbone, which runs once; the last
    `num_head_layers` are built once for each ensemble head, each with its own final norm and classifier. One head is
    the single network. `num_head_layers == num_hidden_layers` leaves no backbone: the heads then have embeddings of
    their own and form a full ensemble. The sizes of DeiT are 12 layers with (hidden_size, intermediate_size,
    num_attention_heads) of (192, 768, 3) for Ti, (384, 1536, 6) for S and, the default, (768, 3072, 12) for B.

    Args:
        num_ensemble_heads: M, the number of heads, at least 1.
        num_head_layers: B, encoder layers in each head, 0 to `num_hidden_layers`. With 0 a head is its final norm and
            classifier.
        vote: how the heads become one prediction: "probs" averages their probabilities, "logits" their logits.

    Raises:
        StrictDataclassError: a field is out of its range; it wraps the ValueError that names the remedy.
    """

    model_type = "neurotrails_vit"
    keys_to_ignore_at_inference = ["head_losses", "head_logits"]

    num_ensemble_heads: int = 3
    num_head_layers: int = 8
    vote: str = "probs"

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving a model adds only its own class; a checkpoint of one class also has to load by the others.
        auto_map = {
            "AutoConfig": "configuration_neurotrails_vit.NeuroTrailsViTConfig",
            "AutoModel": "modeling_neurotrails_vit.NeuroTrailsViTModel",
            "AutoModelForImageClassification": "modeling_neurotrails_vit.NeuroTrailsViTForImageClassification",
        }
        super().__post_init__(**{"auto_map": auto_map, **kwargs})
        # `strict` runs this again and wraps what it raises; users catch ValueError.
        self.validate_ensemble()

    @property
    def num_backbone_layers(self) -> int:
        """Encoder layers shared by all heads."""
        return self.num_hidden_layers - self.num_head_layers

    def validate_ensemble(self) -> None:
        """The heads, their depth, their vote and the patches make sense; raises `ValueError` if not."""
        if self.num_ensemble_heads < 1:
            raise ValueError(f"num_ensemble_heads={self.num_ensemble_heads}: use 1 head (the single network) or more.")
        if not 0 <= self.num_head_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_head_layers={self.num_head_layers}: a head takes 0 to num_hidden_layers="
                f"{self.num_hidden_layers} of the encoder layers; lower it or raise num_hidden_layers."
            )
        sides = [[size] * 2 if isinstance(size, int) else size for size in (self.image_size, self.patch_size)]
        if any(image < patch for image, patch in zip(*sides, strict=True)):
            raise ValueError(
                f"image_size={self.image_size}: smaller than patch_size={self.patch_size}, so that nothing is seen "
                "of an image; lower patch_size or use larger images."
            )
        if self.vote not in ("probs", "logits"):
            raise ValueError(
                f'vote={self.vote!r}: choose "probs" (mean of probabilities) or "logits" (mean of logits).'
            )


__all__ = ["NeuroTrailsViTConfig"]
