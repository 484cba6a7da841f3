# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ResNet with ensemble heads: one backbone, M independent stacks of upper blocks, one vote.

- The whole family by config: single network (M = 1), TreeNet, full ensemble (no backbone, M stems).
- Split at any block; every head has its own batch norms, so that evaluation is right head by head.
- The vote is returned as logits: a later softmax gives the mean probability.
- `from_dense` upcycles a stock ResNet.
- A file that travels with a checkpoint: it imports torch, transformers and its configuration only.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.initialization import no_init_weights
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
    ResNetEmbeddings,
    ResNetForImageClassification,
    ResNetPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from .configuration_neurotrails_resnet import NeuroTrailsResNetConfig


@dataclass
class NeuroTrailsVisionModelOutput(BaseModelOutputWithPooling):
    """Output of the base model.

    `last_hidden_state` is the mean over active heads of `head_hidden_states` [active heads, batch, ...], each a head's
    own last feature map. `hidden_states` lists what the backbone yields, then what each active head yields.
    """

    head_hidden_states: torch.Tensor | None = None


@dataclass
class NeuroTrailsImageClassifierOutput(ImageClassifierOutput):
    """Output of the classifier.

    `loss` is the mean of `head_losses` [active heads], each a head's own cross-entropy in nats. `logits` [batch,
    classes] are the vote's, `head_logits` [active heads, batch, classes] the heads' own.
    """

    head_losses: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None


def _vote(head_logits: torch.Tensor, vote: str) -> torch.Tensor:
    """From [heads, batch, classes] to [batch, classes]: the log of the mean probability, or the mean logits."""
    if len(head_logits) == 1:
        return head_logits[0]
    if vote == "probs":
        log_probs = torch.log_softmax(head_logits, -1, dtype=torch.float32)
        return (log_probs.logsumexp(0) - math.log(len(head_logits))).to(head_logits.dtype)
    return head_logits.mean(0)


def _check_classes(num_labels: int | None, problem_type: str | None) -> int:
    if num_labels is None or num_labels < 2:
        raise ValueError(f"num_labels={num_labels}: the heads vote over classes; use 2 or more.")
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"problem_type={problem_type!r}: the heads vote over classes that exclude each other; leave it out or use "
            '"single_label_classification".'
        )
    return num_labels


def _check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    if pixel_values is None:
        raise ValueError("pixel_values=None: give the images, [batch, channels, height, width].")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values: shape {tuple(pixel_values.shape)}, but this model takes [batch, num_channels="
            f"{num_channels}, height, width]; convert the images or change num_channels."
        )


def _check_labels(labels: torch.Tensor, head_logits: torch.Tensor) -> None:
    _, batch_size, num_labels = head_logits.shape
    shape = (batch_size, num_labels) if labels.is_floating_point() else (batch_size,)
    if labels.shape != shape:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} of {labels.dtype}; give class indices [batch={batch_size}], or "
            f"probabilities [batch={batch_size}, num_labels={num_labels}]."
        )
    # Reading labels back from an accelerator would stall it at every step; there torch's own assertion has to do.
    if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
    if len(wrong):
        raise ValueError(
            f"labels: {wrong[0].item()} is not among num_labels={num_labels} classes; use 0 to {num_labels - 1} (-100 "
            "is left out of the loss) or raise num_labels."
        )


def _head_losses(
    head_logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross-entropy [heads] of [heads, batch, classes] with class indices or probabilities, in nats, float32."""
    labels = labels.to(head_logits.device)
    # It takes a plain number as well, whatever its annotation says.
    num_items: Any = num_items_in_batch
    if labels.is_floating_point():
        targets = labels.float()
        num_items = None if num_items is None else num_items / labels.shape[-1]
    else:
        targets = labels.long()
    return torch.stack([fixed_cross_entropy(logits.float(), targets, num_items) for logits in head_logits])


# What a configuration says about its own class, not about the shape of one member.
_OWN_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"}
_OWN_FIELDS |= {"num_ensemble_heads", "num_head_blocks", "vote", "stem_type"}


def _shared_fields(config: ResNetConfig) -> dict[str, Any]:
    """The fields that a ResNet with ensemble heads and a stock one have in common."""
    return {name: value for name, value in config.to_dict().items() if name not in _OWN_FIELDS}


def _check_dense(dense: PreTrainedModel) -> None:
    if not isinstance(dense, ResNetForImageClassification):
        raise ValueError(
            f"model_type={dense.config.model_type!r} ({type(dense).__name__}): only ResNetForImageClassification can "
            "be upcycled."
        )
    if getattr(dense.config, "quantization_config", None) is not None:
        raise ValueError("quantization_config: a quantized model cannot be upcycled; load it without quantization.")


def _build_stem(config: NeuroTrailsResNetConfig) -> nn.Module:
    if config.stem_type == "imagenet":
        return ResNetEmbeddings(config)
    return ResNetConvLayer(config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act)


def _build_block(config: NeuroTrailsResNetConfig, stage: int, position: int) -> nn.Module:
    """The stock block at `position` of `stage`; the first one changes the channels and may halve the resolution."""
    channels = [config.embedding_size, *config.hidden_sizes]
    in_channels = channels[stage] if position == 0 else channels[stage + 1]
    options: dict[str, Any] = {"stride": 1, "activation": config.hidden_act}
    if position == 0 and (stage > 0 or config.downsample_in_first_stage):
        options["stride"] = 2
    if config.layer_type == "basic":
        return ResNetBasicLayer(in_channels, channels[stage + 1], **options)
    options["downsample_in_bottleneck"] = config.downsample_in_bottleneck and position == 0
    return ResNetBottleNeckLayer(in_channels, channels[stage + 1], **options)


class NeuroTrailsResNetStack(nn.Module):
    """Blocks `first` to `last` - 1 of the network: the backbone, or a head.

    The stem belongs to the first block. Without blocks a stack passes its input on.
    """

    def __init__(self, config: NeuroTrailsResNetConfig, first: int, last: int) -> None:
        super().__init__()
        self.stem = _build_stem(config) if first == 0 < last else None
        places = config.block_places[first:last]
        self.blocks = nn.ModuleList(_build_block(config, stage, position) for stage, position in places)
        self.stage_ends = {i for i, (stage, position) in enumerate(places) if position == config.depths[stage] - 1}

    def forward(self, hidden_states: torch.Tensor, recorded: list[torch.Tensor] | None) -> torch.Tensor:
        """Feature maps to feature maps; adds the stem's and each completed stage's to `recorded`."""
        if self.stem is not None:
            hidden_states = self.stem(hidden_states)
            if recorded is not None:
                recorded.append(hidden_states)
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if recorded is not None and i in self.stage_ends:
                recorded.append(hidden_states)
        return hidden_states


class NeuroTrailsResNetPreTrainedModel(ResNetPreTrainedModel):
    """Names the configuration class to transformers."""

    config: NeuroTrailsResNetConfig
    _no_split_modules = ["ResNetEmbeddings", "ResNetBasicLayer", "ResNetBottleNeckLayer"]


class NeuroTrailsResNetModel(NeuroTrailsResNetPreTrainedModel):
    """ResNet's feature maps, its upper blocks built once for each ensemble head."""

    def __init__(self, config: NeuroTrailsResNetConfig) -> None:
        super().__init__(config)
        split = config.num_backbone_blocks
        self.backbone = NeuroTrailsResNetStack(config, 0, split)
        self.heads = nn.ModuleList(
            NeuroTrailsResNetStack(config, split, config.num_blocks) for _ in range(config.num_ensemble_heads)
        )
        self.active_heads = config.num_ensemble_heads
        self.post_init()

    @property
    def active_heads(self) -> list[int]:
        """Indices of the heads that run and vote; the others cost nothing.

        Set it to an int k for the first k heads, or to a list of indices.

        Raises:
            ValueError: when set to no head, to a head that does not exist, or to one head twice.
        """
        return list(self._active_heads)

    @active_heads.setter
    def active_heads(self, value: int | Sequence[int]) -> None:
        heads = list(range(value)) if isinstance(value, int) else list(value)
        if not heads or len(set(heads)) < len(heads) or not set(heads) <= set(range(len(self.heads))):
            raise ValueError(
                f"active_heads={value!r}: this model has {len(self.heads)} heads; give how many of them to use (1 to "
                f"{len(self.heads)}), or a list of different indices from 0 to {len(self.heads) - 1}."
            )
        self._active_heads = heads

    def get_input_embeddings(self) -> nn.Module:
        """The stem, which FSDP shards by itself; without a backbone that of the first head."""
        owner: Any = self.heads[0] if self.backbone.stem is None else self.backbone
        return owner.stem

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, output_hidden_states: bool | None = None, **_: Any
    ) -> NeuroTrailsVisionModelOutput:
        """Feature maps of the backbone and every active head.

        Args:
            pixel_values: [batch, channels, height, width], of any height and width.
            output_hidden_states: also return the feature maps of the stem and of each stage.

        Returns:
            `last_hidden_state` [batch, channels, height / 32, width / 32] (ImageNet stem), `pooler_output` [batch,
            channels, 1, 1] its global average.

        Raises:
            ValueError: `pixel_values` are missing or have another number of channels.
        """
        _check_pixel_values(pixel_values, self.config.num_channels)
        assert pixel_values is not None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        recorded: list[torch.Tensor] | None = [] if output_hidden_states else None
        stem = self.backbone(pixel_values.to(self.dtype), recorded)
        outputs = [self.heads[m](stem, recorded) for m in self._active_heads]
        # A device map may place the heads on different devices.
        head_hidden_states = torch.stack([output.to(stem.device) for output in outputs])
        last_hidden_state = head_hidden_states.mean(0)
        return NeuroTrailsVisionModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean((-2, -1), keepdim=True),
            hidden_states=None if recorded is None else tuple(recorded),
            head_hidden_states=head_hidden_states,
        )


class NeuroTrailsResNetForImageClassification(NeuroTrailsResNetPreTrainedModel):
    """`NeuroTrailsResNetModel` with a classifier for each head; predicts by vote.

    Raises:
        ValueError: the configuration's `num_labels` or `problem_type` is not that of classes which exclude each other.
    """

    def __init__(self, config: NeuroTrailsResNetConfig) -> None:
        super().__init__(config)
        num_labels = _check_classes(config.num_labels, config.problem_type)
        self.resnet = NeuroTrailsResNetModel(config)
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_sizes[-1], num_labels) for _ in range(config.num_ensemble_heads)
        )
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        dense: str | os.PathLike[str] | ResNetForImageClassification,
        num_ensemble_heads: int,
        num_head_blocks: int,
        *,
        vote: str = "probs",
        noise: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Upcycles a dense ResNet: its lower blocks become the backbone, its upper ones are copied into every head.

        Without noise the heads are equal and the vote is the dense model's prediction; masks that differ from head to
        head (the sparsifier's `random` or `soft_magnitude`) then set them apart. Dense model and result share no
        memory, and nothing else is held.

        Args:
            dense: the model, or the folder or hub id of one.
            num_ensemble_heads: see `NeuroTrailsResNetConfig`, as for the next two.
            num_head_blocks: B; with as many as `dense` has blocks the heads share nothing, not even the stem.
            vote: how the heads are averaged.
            noise: standard deviation of Gaussian noise added to the heads' weights, as a share of the standard
                deviation of each weight tensor.
            seed: of the noise.
            kwargs: passed on to `from_pretrained` where `dense` names a checkpoint.

        Raises:
            ValueError: `dense` is not a `ResNetForImageClassification` over 2 classes or more, it is quantized, or
                another argument is out of range.
        """
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise}: give 0 for none, or a share of each weight's standard deviation.")
        if not isinstance(dense, PreTrainedModel):
            dense = cast(
                ResNetForImageClassification, AutoModelForImageClassification.from_pretrained(dense, **kwargs)
            )
        elif kwargs:
            raise ValueError(f"{', '.join(kwargs)}: options of loading, but dense is a model that is loaded already.")
        _check_dense(dense)
        split: dict[str, Any] = {
            "num_ensemble_heads": num_ensemble_heads,
            "num_head_blocks": num_head_blocks,
            "vote": vote,
        }
        with no_init_weights():
            model = cls._from_config(
                NeuroTrailsResNetConfig(**_shared_fields(dense.config), **split), dtype=dense.dtype
            )
        weights = dense.state_dict()
        model.to(dense.device).load_state_dict({name: weights[model._locate(name)[1]] for name in model.state_dict()})
        model._add_noise(noise, seed)
        return model.train(dense.training)

    def _locate(self, name: str) -> tuple[int | None, str]:
        """The head that a weight belongs to (None: the backbone), and the weight's name in stock ResNet."""
        match = re.fullmatch(r"classifiers\.(\d+)\.(.+)", name)
        if match is not None:
            return int(match[1]), f"classifier.1.{match[2]}"
        match = re.fullmatch(r"resnet\.(?:backbone|heads\.(\d+))\.(?:stem|blocks\.(\d+))\.(.+)", name)
        assert match is not None, name
        head, block, rest = match.groups()
        if block is None:
            rest = f"embedder.{rest}"
        else:
            first = 0 if head is None else self.config.num_backbone_blocks
            stage, position = self.config.block_places[first + int(block)]
            rest = f"encoder.stages.{stage}.layers.{position}.{rest}"
        return None if head is None else int(head), f"resnet.{rest}"

    @torch.no_grad()
    def _add_noise(self, noise: float, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            # A single draw has no spread, and torch warns.
            if noise > 0 and self._locate(name)[0] is not None and weight.numel() > 1:
                draw = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
                weight.add_(draw.mul_(weight.std() * noise))

    @property
    def active_heads(self) -> list[int]:
        """See `NeuroTrailsResNetModel.active_heads`."""
        return self.resnet.active_heads

    @active_heads.setter
    def active_heads(self, value: int | Sequence[int]) -> None:
        self.resnet.active_heads = value

    def get_output_layers(self) -> list[nn.Module]:
        """The classifier of every head."""
        return list(self.classifiers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_head_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> NeuroTrailsImageClassifierOutput:
        """The vote over classes.

        Args:
            pixel_values: [batch, channels, height, width], of any height and width.
            labels: class indices [batch] (-100 is left out), or probabilities [batch, classes] as mixup and label
                smoothing give them; the loss is the mean over active heads of each head's own cross-entropy.
            output_hidden_states: see `NeuroTrailsResNetModel.forward`.
            output_head_logits: also return every active head's logits.
            num_items_in_batch: entries of `labels` that are not -100 in all batches of a step, as `Trainer` counts
                them: the loss is this batch's share of their mean. By default those of this batch.

        Raises:
            ValueError: `pixel_values` are missing or have another number of channels; `labels` have another shape or,
                on the CPU, name a class that is not there.
        """
        outputs = self.resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        pooled = outputs.head_hidden_states.mean((-2, -1))
        logits = [self.classifiers[m](features) for m, features in zip(self.active_heads, pooled, strict=True)]
        head_logits = torch.stack([each.to(pooled.device) for each in logits])
        head_losses = None
        if labels is not None:
            _check_labels(labels, head_logits)
            head_losses = _head_losses(head_logits, labels, num_items_in_batch)
        return NeuroTrailsImageClassifierOutput(
            loss=None if head_losses is None else head_losses.mean(),
            logits=_vote(head_logits, self.config.vote),
            hidden_states=outputs.hidden_states,
            head_losses=head_losses,
            head_logits=head_logits if output_head_logits else None,
        )


__all__ = [
    "NeuroTrailsImageClassifierOutput",
    "NeuroTrailsResNetForImageClassification",
    "NeuroTrailsResNetModel",
    "NeuroTrailsResNetPreTrainedModel",
    "NeuroTrailsResNetStack",
    "NeuroTrailsVisionModelOutput",
]
