# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Wide ResNet with ensemble heads."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class NeuroTrailsWideResNetConfig(PreTrainedConfig):
    """Wide ResNet (Zagoruyko and Komodakis, 2016, arXiv:1605.07146) split into a backbone and ensemble heads.

    The network has `num_blocks = (depth - 4) / 2` residual blocks. The first `num_blocks - num_head_blocks` form the
    backbone, which runs once; the last `num_head_blocks` are built once for each ensemble head, each with its own
    batch norms and classifier. The split may lie within a stage. One head is the single network.
    `num_head_blocks == num_blocks` leaves no backbone: the heads then have stems of their own and form a full
    ensemble.

    Args:
        num_channels: of the images.
        depth: 6n + 4 for n blocks in each of the three stages.
        widen_factor: k; the stages have 16k, 32k and 64k channels.
        num_ensemble_heads: M, the number of heads, at least 1.
        num_head_blocks: B, blocks in each head, 0 to `num_blocks`. With 0 a head is its final norm and classifier.
        vote: how the heads become one prediction: "probs" averages their probabilities, "logits" their logits.

    Raises:
        StrictDataclassError: a field is out of its range; it wraps the ValueError that names the remedy.
    """

    model_type = "neurotrails_wide_resnet"
    keys_to_ignore_at_inference = ["head_losses", "head_logits"]

    num_channels: int = 3
    depth: int = 28
    widen_factor: int = 10
    num_ensemble_heads: int = 3
    num_head_blocks: int = 8
    vote: str = "probs"

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving a model adds only its own class; a checkpoint of one class also has to load by the others.
        auto_map = {
            "AutoConfig": "configuration_neurotrails_wide_resnet.NeuroTrailsWideResNetConfig",
            "AutoModel": "modeling_neurotrails_wide_resnet.NeuroTrailsWideResNetModel",
            "AutoModelForImageClassification": (
                "modeling_neurotrails_wide_resnet.NeuroTrailsWideResNetForImageClassification"
            ),
        }
        super().__post_init__(**{"auto_map": auto_map, **kwargs})
        # `strict` runs these again and wraps what they raise; users catch ValueError.
        self.validate_shape()
        self.validate_ensemble()

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the three stages."""
        return [16 * self.widen_factor, 32 * self.widen_factor, 64 * self.widen_factor]

    @property
    def num_blocks(self) -> int:
        """Residual blocks from input to output, L."""
        return (self.depth - 4) // 2

    @property
    def num_backbone_blocks(self) -> int:
        """Blocks shared by all heads."""
        return self.num_blocks - self.num_head_blocks

    def validate_shape(self) -> None:
        """Depth and widths are those of a Wide ResNet; raises `ValueError` if not."""
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth}: use 6n + 4, such as 10, 16, 22, 28 or 40.")
        for name in ("num_channels", "widen_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use 1 or more.")

    def validate_ensemble(self) -> None:
        """The heads, their depth and their vote make sense; raises `ValueError` if not."""
        if self.num_ensemble_heads < 1:
            raise ValueError(f"num_ensemble_heads={self.num_ensemble_heads}: use 1 head (the single network) or more.")
        if not 0 <= self.num_head_blocks <= self.num_blocks:
            raise ValueError(
                f"num_head_blocks={self.num_head_blocks}: a head takes 0 to num_blocks={self.num_blocks} of the "
                "residual blocks; lower it or make the network deeper."
            )
        if self.vote not in ("probs", "logits"):
            raise ValueError(
                f'vote={self.vote!r}: choose "probs" (mean of probabilities) or "logits" (mean of logits).'
            )


__all__ = ["NeuroTrailsWideResNetConfig"]
