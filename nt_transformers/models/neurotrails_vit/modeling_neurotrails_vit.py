# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ViT with ensemble heads: one backbone, M independent stacks of upper layers, one vote.

- The whole family by config: single network (M = 1), TreeNet, full ensemble (no backbone, M embeddings).
- Split at any layer; every head has its own final norm and classifier.
- The vote is returned as logits: a later softmax gives the mean probability.
- `from_dense` upcycles a stock ViT.
- A file that travels with a checkpoint: it imports torch, transformers and its configuration only.
"""

import copy
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
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_neurotrails_vit import NeuroTrailsViTConfig


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
_OWN_FIELDS |= {"num_ensemble_heads", "num_head_layers", "vote"}


def _shared_fields(config: ViTConfig) -> dict[str, Any]:
    """The fields that a ViT with ensemble heads and a stock one have in common."""
    return {name: value for name, value in config.to_dict().items() if name not in _OWN_FIELDS}


def _check_dense(dense: PreTrainedModel) -> None:
    if not isinstance(dense, ViTForImageClassification):
        raise ValueError(
            f"model_type={dense.config.model_type!r} ({type(dense).__name__}): only ViTForImageClassification can "
            "be upcycled."
        )
    if getattr(dense.config, "quantization_config", None) is not None:
        raise ValueError("quantization_config: a quantized model cannot be upcycled; load it without quantization.")


def _check_image_size(pixel_values: torch.Tensor, image_size: int | Sequence[int]) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if pixel_values.shape[2:] != (height, width):
        raise ValueError(
            f"pixel_values: images of {pixel_values.shape[2]} x {pixel_values.shape[3]}, but this model has "
            f"image_size={image_size}; resize them, or pass interpolate_pos_encoding=True."
        )


class NeuroTrailsViTStack(nn.Module):
    """Encoder layers `first` to `last` - 1 of the network: the backbone, or (`final`) a head with its norm.

    The embeddings belong to the first layer. Without layers the backbone passes its input on.
    """

    def __init__(self, config: NeuroTrailsViTConfig, first: int, last: int, *, final: bool) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config) if first == 0 < last else None
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(first, last))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if final else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        interpolate_pos_encoding: bool,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """To tokens [batch, seq, hidden], from images [batch, channels, height, width] if it has the embeddings."""
        if self.embeddings is not None:
            hidden_states = self.embeddings(hidden_states, interpolate_pos_encoding=interpolate_pos_encoding)
        if len(self.layers) > 0:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
            for layer in self.layers:
                hidden_states = layer(hidden_states, mask, **kwargs)
        return hidden_states if self.layernorm is None else self.layernorm(hidden_states)


class NeuroTrailsViTPreTrainedModel(ViTPreTrainedModel):
    """Names the configuration class to transformers."""

    config: NeuroTrailsViTConfig


class NeuroTrailsViTModel(NeuroTrailsViTPreTrainedModel):
    """ViT's encoder with its upper layers built once for each ensemble head; without ViT's pooler."""

    def __init__(self, config: NeuroTrailsViTConfig) -> None:
        super().__init__(config)
        split = config.num_backbone_layers
        self.backbone = NeuroTrailsViTStack(config, 0, split, final=False)
        self.heads = nn.ModuleList(
            NeuroTrailsViTStack(config, split, config.num_hidden_layers, final=True)
            for _ in range(config.num_ensemble_heads)
        )
        self.gradient_checkpointing = False
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

    def _embedding_owners(self) -> list[Any]:
        return [self.backbone] if self.config.num_backbone_layers > 0 else list(self.heads)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings; without a backbone those of the first head."""
        return self._embedding_owners()[0].embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the patch embeddings; without a backbone the first head takes `value`, the others copies."""
        for m, owner in enumerate(self._embedding_owners()):
            owner.embeddings.patch_embeddings = value if m == 0 else copy.deepcopy(value)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> NeuroTrailsVisionModelOutput:
        """As `ViTModel.forward` without pooler, for the backbone and every active head.

        Args:
            pixel_values: [batch, channels, height, width], of the configuration's `image_size`.
            interpolate_pos_encoding: take images of another size and interpolate the position embeddings.
            attention_mask: [batch, 1 + patches], 1 for tokens to attend to and 0 for others.

        Returns:
            `last_hidden_state` [batch, 1 + patches, hidden] after the final norm.

        Raises:
            ValueError: `pixel_values` are missing, have another number of channels, or another size without
                `interpolate_pos_encoding`.
        """
        _check_pixel_values(pixel_values, self.config.num_channels)
        assert pixel_values is not None
        if not interpolate_pos_encoding:
            _check_image_size(pixel_values, self.config.image_size)
        kwargs |= {"interpolate_pos_encoding": bool(interpolate_pos_encoding), "attention_mask": attention_mask}
        stem = self.backbone(pixel_values.to(self.dtype), **kwargs)
        outputs = [self.heads[m](stem, **kwargs) for m in self._active_heads]
        # A device map may place the heads on different devices.
        head_hidden_states = torch.stack([output.to(stem.device) for output in outputs])
        return NeuroTrailsVisionModelOutput(
            last_hidden_state=head_hidden_states.mean(0), head_hidden_states=head_hidden_states
        )


class NeuroTrailsViTForImageClassification(NeuroTrailsViTPreTrainedModel):
    """`NeuroTrailsViTModel` with a classifier for each head; predicts by vote.

    Raises:
        ValueError: the configuration's `num_labels` or `problem_type` is not that of classes which exclude each other.
    """

    def __init__(self, config: NeuroTrailsViTConfig) -> None:
        super().__init__(config)
        num_labels = _check_classes(config.num_labels, config.problem_type)
        self.vit = NeuroTrailsViTModel(config)
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, num_labels) for _ in range(config.num_ensemble_heads)
        )
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        dense: str | os.PathLike[str] | ViTForImageClassification,
        num_ensemble_heads: int,
        num_head_layers: int,
        *,
        vote: str = "probs",
        noise: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Upcycles a dense ViT: its lower layers become the backbone, its upper ones are copied into every head.

        Without noise the heads are equal and the vote is the dense model's prediction; masks that differ from head to
        head (the sparsifier's `random` or `soft_magnitude`) then set them apart. Dense model and result share no
        memory, and nothing else is held.

        Args:
            dense: the model, or the folder or hub id of one.
            num_ensemble_heads: see `NeuroTrailsViTConfig`, as for the next two.
            num_head_layers: B; with as many as `dense` has layers the heads share nothing, not even the embeddings.
            vote: how the heads are averaged.
            noise: standard deviation of Gaussian noise added to the heads' weights, as a share of the standard
                deviation of each weight tensor.
            seed: of the noise.
            kwargs: passed on to `from_pretrained` where `dense` names a checkpoint.

        Raises:
            ValueError: `dense` is not a `ViTForImageClassification` over 2 classes or more, it is quantized, or
                another argument is out of range.
        """
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise}: give 0 for none, or a share of each weight's standard deviation.")
        if not isinstance(dense, PreTrainedModel):
            dense = cast(ViTForImageClassification, AutoModelForImageClassification.from_pretrained(dense, **kwargs))
        elif kwargs:
            raise ValueError(f"{', '.join(kwargs)}: options of loading, but dense is a model that is loaded already.")
        _check_dense(dense)
        split: dict[str, Any] = {
            "num_ensemble_heads": num_ensemble_heads,
            "num_head_layers": num_head_layers,
            "vote": vote,
        }
        # Stock ViT draws its embeddings even where no weight is to be initialized.
        with no_init_weights(), torch.random.fork_rng(devices=[]):
            model = cls._from_config(
                NeuroTrailsViTConfig(**_shared_fields(dense.config), **split),
                dtype=dense.dtype,
                attn_implementation=dense.config._attn_implementation,
            )
        weights = dense.state_dict()
        model.to(dense.device).load_state_dict({name: weights[model._locate(name)[1]] for name in model.state_dict()})
        model._add_noise(noise, seed)
        return model.train(dense.training)

    def _locate(self, name: str) -> tuple[int | None, str]:
        """The head that a weight belongs to (None: the backbone), and the weight's name in stock ViT."""
        match = re.fullmatch(r"(classifiers|vit\.backbone|vit\.heads)\.(?:(\d+)\.)?(?:layers\.(\d+)\.)?(.+)", name)
        assert match is not None, name
        part, head, layer, rest = match.groups()
        if part == "classifiers":
            return int(head), f"classifier.{rest}"
        if layer is not None:
            first = 0 if head is None else self.config.num_backbone_layers
            rest = f"layers.{first + int(layer)}.{rest}"
        return None if head is None else int(head), f"vit.{rest}"

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
        """See `NeuroTrailsViTModel.active_heads`."""
        return self.vit.active_heads

    @active_heads.setter
    def active_heads(self, value: int | Sequence[int]) -> None:
        self.vit.active_heads = value

    def get_output_layers(self) -> list[nn.Module]:
        """The classifier of every head."""
        return list(self.classifiers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        output_head_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> NeuroTrailsImageClassifierOutput:
        """As `ViTForImageClassification.forward`, with the vote in `logits`.

        Args:
            pixel_values: [batch, channels, height, width], of the configuration's `image_size`.
            labels: class indices [batch] (-100 is left out), or probabilities [batch, classes] as mixup and label
                smoothing give them; the loss is the mean over active heads of each head's own cross-entropy.
            interpolate_pos_encoding: see `NeuroTrailsViTModel.forward`, as for the next.
            attention_mask: [batch, 1 + patches].
            output_head_logits: also return every active head's logits.
            num_items_in_batch: entries of `labels` that are not -100 in all batches of a step, as `Trainer` counts
                them: the loss is this batch's share of their mean. By default those of this batch.

        Raises:
            ValueError: see `NeuroTrailsViTModel.forward`; `labels` have another shape or, on the CPU, name a class
                that is not there.
        """
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "attention_mask": attention_mask}
        outputs = self.vit(pixel_values, **{**kwargs, "return_dict": True})
        class_tokens = outputs.head_hidden_states[:, :, 0]
        logits = [self.classifiers[m](features) for m, features in zip(self.active_heads, class_tokens, strict=True)]
        head_logits = torch.stack([each.to(class_tokens.device) for each in logits])
        head_losses = None
        if labels is not None:
            _check_labels(labels, head_logits)
            head_losses = _head_losses(head_logits, labels, num_items_in_batch)
        return NeuroTrailsImageClassifierOutput(
            loss=None if head_losses is None else head_losses.mean(),
            logits=_vote(head_logits, self.config.vote),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            head_logits=head_logits if output_head_logits else None,
        )


__all__ = [
    "NeuroTrailsImageClassifierOutput",
    "NeuroTrailsViTForImageClassification",
    "NeuroTrailsViTModel",
    "NeuroTrailsViTPreTrainedModel",
    "NeuroTrailsViTStack",
    "NeuroTrailsVisionModelOutput",
]
