# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of ResNet with ensemble heads."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.resnet.configuration_resnet import ResNetConfig


@strict
class NeuroTrailsResNetConfig(ResNetConfig):
    """`ResNetConfig` plus the split into a backbone and ensemble heads.

    The network has `num_blocks = sum(depths)` residual blocks. The first `num_blocks - num_head_blocks` form the
    backbone, which runs once; the last `num_head_blocks` are built once for each ensemble head, each with its own
    batch norms and classifier. The split may lie within a stage. One head is the single network.
    `num_head_blocks == num_blocks` leaves no backbone: the heads then have stems of their own and form a full
    ensemble. The defaults are ResNet-50 with the published split.

    Args:
        stem_type: "imagenet" for a 7x7 convolution of stride 2 and max-pooling, as in `ResNetConfig`; "cifar" for a
            3x3 convolution of stride 1, for small images.
        num_ensemble_heads: M, the number of heads, at least 1.
        num_head_blocks: B, blocks in each head, 0 to `num_blocks`. With 0 a head is its classifier.
        vote: how the heads become one prediction: "probs" averages their probabilities, "logits" their logits.

    Raises:
        StrictDataclassError: a field is out of its range; it wraps the ValueError that names the remedy.
    """

    model_type = "neurotrails_resnet"
    keys_to_ignore_at_inference = ["head_losses", "head_logits"]

    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    stem_type: str = "imagenet"
    num_ensemble_heads: int = 3
    num_head_blocks: int = 10
    vote: str = "probs"

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving a model adds only its own class; a checkpoint of one class also has to load by the others.
        auto_map = {
            "AutoConfig": "configuration_neurotrails_resnet.NeuroTrailsResNetConfig",
            "AutoModel": "modeling_neurotrails_resnet.NeuroTrailsResNetModel",
            "AutoModelForImageClassification": "modeling_neurotrails_resnet.NeuroTrailsResNetForImageClassification",
        }
        super().__post_init__(**{"auto_map": auto_map, **kwargs})
        # `strict` runs these again and wraps what they raise; users catch ValueError.
        self.validate_shape()
        self.validate_ensemble()

    @property
    def block_places(self) -> list[tuple[int, int]]:
        """The stage of each residual block and its position there, from input to output."""
        return [(stage, position) for stage, depth in enumerate(self.depths) for position in range(depth)]

    @property
    def num_blocks(self) -> int:
        """Residual blocks from input to output, L."""
        return sum(self.depths)

    @property
    def num_backbone_blocks(self) -> int:
        """Blocks shared by all heads."""
        return self.num_blocks - self.num_head_blocks

    def validate_shape(self) -> None:
        """The stages and the stem make sense; raises `ValueError` if not."""
        if len(self.depths) != len(self.hidden_sizes) or min(self.depths, default=0) < 1:
            raise ValueError(
                f"depths={self.depths}: give the blocks, at least 1, of as many stages as hidden_sizes="
                f"{self.hidden_sizes} has."
            )
        if self.stem_type not in ("imagenet", "cifar"):
            raise ValueError(
                f'stem_type={self.stem_type!r}: choose "imagenet" (7x7 and max-pooling) or "cifar" (3x3).'
            )

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


__all__ = ["NeuroTrailsResNetConfig"]
