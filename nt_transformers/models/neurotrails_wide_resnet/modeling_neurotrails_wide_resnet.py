# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Wide ResNet with ensemble heads: one backbone, M independent stacks of upper blocks, one vote.

- The whole family by config: single network (M = 1), TreeNet, full ensemble (no backbone, M stems).
- Split at any block; every head has its own batch norms, so that evaluation is right head by head.
- The vote is returned as logits: a later softmax gives the mean probability.
- A file that travels with a checkpoint: it imports torch, transformers and its configuration only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.resnet.modeling_resnet import ResNetPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_neurotrails_wide_resnet import NeuroTrailsWideResNetConfig


# Channels of the stem, whatever the widen factor.
_STEM_CHANNELS = 16


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


class NeuroTrailsWideResNetBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions.

    A block that changes the number of channels projects its activated input (a 1x1 convolution) instead of passing
    the input on.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, in channels, height, width] to [batch, out channels, height / stride, width / stride]."""
        activated = nn.functional.relu(self.norm1(hidden_states), inplace=True)
        residual = hidden_states if self.shortcut is None else self.shortcut(activated)
        hidden_states = self.conv1(activated)
        hidden_states = self.conv2(nn.functional.relu(self.norm2(hidden_states), inplace=True))
        return hidden_states + residual


class NeuroTrailsWideResNetStack(nn.Module):
    """Blocks `first` to `last` - 1 of the network: the backbone, or (`final`) a head with its norm.

    The stem belongs to the first block. Without blocks the backbone passes its input on.
    """

    def __init__(self, config: NeuroTrailsWideResNetConfig, first: int, last: int, *, final: bool) -> None:
        super().__init__()
        depth = config.num_blocks // 3
        channels = [_STEM_CHANNELS, *config.hidden_sizes]
        self.stem = None
        if first == 0 < last:
            self.stem = nn.Conv2d(config.num_channels, _STEM_CHANNELS, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for stage, position in (divmod(i, depth) for i in range(first, last)):
            in_channels = channels[stage] if position == 0 else channels[stage + 1]
            stride = 2 if position == 0 and stage > 0 else 1
            self.blocks.append(NeuroTrailsWideResNetBlock(in_channels, channels[stage + 1], stride))
        self.norm = nn.BatchNorm2d(channels[-1]) if final else None
        self.stage_ends = {i - first for i in range(first, last) if i % depth == depth - 1}

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
        if self.norm is not None:
            hidden_states = nn.functional.relu(self.norm(hidden_states), inplace=True)
        return hidden_states


class NeuroTrailsWideResNetPreTrainedModel(ResNetPreTrainedModel):
    """Names the configuration class to transformers; weights start as those of ResNet."""

    config: NeuroTrailsWideResNetConfig  # type: ignore[assignment]
    base_model_prefix = "wide_resnet"
    _no_split_modules = ["NeuroTrailsWideResNetBlock"]


class NeuroTrailsWideResNetModel(NeuroTrailsWideResNetPreTrainedModel):
    """Wide ResNet's feature maps, its upper blocks built once for each ensemble head."""

    def __init__(self, config: NeuroTrailsWideResNetConfig) -> None:
        super().__init__(config)
        split = config.num_backbone_blocks
        self.backbone = NeuroTrailsWideResNetStack(config, 0, split, final=False)
        self.heads = nn.ModuleList(
            NeuroTrailsWideResNetStack(config, split, config.num_blocks, final=True)
            for _ in range(config.num_ensemble_heads)
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
            `last_hidden_state` [batch, channels, height / 4, width / 4] after the final norm and ReLU, `pooler_output`
            [batch, channels, 1, 1] its global average.

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


class NeuroTrailsWideResNetForImageClassification(NeuroTrailsWideResNetPreTrainedModel):
    """`NeuroTrailsWideResNetModel` with a classifier for each head; predicts by vote.

    Raises:
        ValueError: the configuration's `num_labels` or `problem_type` is not that of classes which exclude each other.
    """

    def __init__(self, config: NeuroTrailsWideResNetConfig) -> None:
        super().__init__(config)
        num_labels = _check_classes(config.num_labels, config.problem_type)
        self.wide_resnet = NeuroTrailsWideResNetModel(config)
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_sizes[-1], num_labels) for _ in range(config.num_ensemble_heads)
        )
        self.post_init()

    @property
    def active_heads(self) -> list[int]:
        """See `NeuroTrailsWideResNetModel.active_heads`."""
        return self.wide_resnet.active_heads

    @active_heads.setter
    def active_heads(self, value: int | Sequence[int]) -> None:
        self.wide_resnet.active_heads = value

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
            output_hidden_states: see `NeuroTrailsWideResNetModel.forward`.
            output_head_logits: also return every active head's logits.
            num_items_in_batch: entries of `labels` that are not -100 in all batches of a step, as `Trainer` counts
                them: the loss is this batch's share of their mean. By default those of this batch.

        Raises:
            ValueError: `pixel_values` are missing or have another number of channels; `labels` have another shape or,
                on the CPU, name a class that is not there.
        """
        outputs = self.wide_resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
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
    "NeuroTrailsVisionModelOutput",
    "NeuroTrailsWideResNetBlock",
    "NeuroTrailsWideResNetForImageClassification",
    "NeuroTrailsWideResNetModel",
    "NeuroTrailsWideResNetPreTrainedModel",
    "NeuroTrailsWideResNetStack",
]
