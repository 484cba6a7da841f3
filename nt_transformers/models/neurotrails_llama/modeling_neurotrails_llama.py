# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""LLaMA with ensemble heads: one backbone, M independent stacks of upper layers, one vote.

- The whole family by config: single network (M = 1), TreeNet, full ensemble (no backbone, M embeddings).
- The vote is returned as logits: a later softmax gives the mean probability, so generation needs no change.
- `from_dense` upcycles a stock LLaMA, `extract_head` goes back.
- `skip_logits=True` trains without ever holding [batch, seq, vocab]: output layer and cross-entropy are fused;
  `headwise_backward=True` holds the activations of the backbone and one head at a time.
- A file that travels with a checkpoint: it imports torch, transformers and its configuration only.
"""

import copy
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, Unpack, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .loss_neurotrails_llama import NeuroTrailsLlamaOutputLayer, fused_causal_lm_losses, headwise_loss


@dataclass
class NeuroTrailsModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the base model.

    `last_hidden_state` [batch, seq, hidden] is the mean over active heads; `head_hidden_states` [active heads, batch,
    seq, hidden] are the heads' own, after their final norms. `hidden_states` and `attentions` list the backbone's
    layers, then those of each active head; as in LLaMA the last of `hidden_states` is `last_hidden_state`.
    """

    head_hidden_states: torch.Tensor | None = None


@dataclass
class NeuroTrailsCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of the language model.

    `loss` is the mean of `head_losses` [active heads], each a head's own cross-entropy in nats. `logits` [batch, seq,
    vocab] are the vote's, `head_logits` [active heads, batch, seq, vocab] the heads' own. The fields beyond LLaMA's
    come last, so that tuples begin as LLaMA's do.
    """

    head_losses: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None


def count_vote(tally: torch.Tensor | None, logits: torch.Tensor, vote: str) -> torch.Tensor:
    """The running vote, in float32, with one more head's logits [..., vocab]; heads need not be alive together."""
    if vote == "probs":
        log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
        return log_probs if tally is None else torch.logaddexp(tally, log_probs)
    return logits.float() if tally is None else tally + logits


def close_vote(tally: torch.Tensor, num_votes: int, vote: str) -> torch.Tensor:
    """The log of the mean probability, or the mean logits, [..., vocab]."""
    return tally - math.log(num_votes) if vote == "probs" else tally / num_votes


# What a configuration says about its own class, not about the shape of one member.
_OWN_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"}
_OWN_FIELDS |= {"num_ensemble_heads", "num_head_layers", "vote"}


def _shared_fields(config: LlamaConfig) -> dict[str, Any]:
    """The fields that a LLaMA with ensemble heads and a stock one have in common."""
    return {name: value for name, value in config.to_dict().items() if name not in _OWN_FIELDS}


def _check_dense(dense: PreTrainedModel) -> None:
    if not isinstance(dense, LlamaForCausalLM):
        raise ValueError(
            f"model_type={dense.config.model_type!r} ({type(dense).__name__}): only LlamaForCausalLM can be upcycled."
        )
    if getattr(dense.config, "quantization_config", None) is not None:
        raise ValueError("quantization_config: a quantized model cannot be upcycled; load it without quantization.")


def _run_layers(layers: nn.ModuleList, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, **kwargs)
    return hidden_states


class NeuroTrailsLlamaHead(nn.Module):
    """The upper decoder layers and final norm of one ensemble head; its own embeddings where there is no backbone."""

    embed_tokens: nn.Embedding

    def __init__(self, config: NeuroTrailsLlamaConfig) -> None:
        super().__init__()
        if config.num_backbone_layers == 0:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        # The model numbers the layers when it chooses the active heads.
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, layer_idx=0) for _ in range(config.num_head_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, depth: int, **kwargs: Any) -> torch.Tensor:
        """[batch, seq, hidden] to the same shape: the first `depth` layers and the norm."""
        return self.norm(_run_layers(self.layers[:depth], hidden_states, **kwargs))


class NeuroTrailsLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Tells transformers the configuration class and how many layers there are to record."""

    config: NeuroTrailsLlamaConfig
    # What engines keep on one device or shard as one unit.
    _no_split_modules = ["LlamaDecoderLayer", "NeuroTrailsLlamaOutputLayer"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(LlamaDecoderLayer, num_hidden_layers_key="num_decoder_layers"),
        "attentions": LlamaAttention,
    }


class NeuroTrailsLlamaModel(NeuroTrailsLlamaPreTrainedModel):
    """LLaMA's decoder with its upper layers built once for each ensemble head."""

    embed_tokens: nn.Embedding

    def __init__(self, config: NeuroTrailsLlamaConfig) -> None:
        super().__init__(config)
        if config.num_backbone_layers > 0:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_backbone_layers))
        self.heads = nn.ModuleList(NeuroTrailsLlamaHead(config) for _ in range(config.num_ensemble_heads))
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.active_heads = config.num_ensemble_heads
        self.post_init()

    @property
    def active_heads(self) -> list[int]:
        """Indices of the heads that run and vote; the others cost nothing.

        Set it to an int k for the first k heads, or to a list of indices. A key-value cache belongs to the heads that
        filled it: start a new one after a change.

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
        # Cache slots are packed in the order of the active heads: a cache reads its length from its first slot.
        active_layers = (layer for head in self._running_heads() for layer in head.layers)
        for slot, layer in enumerate(active_layers, start=self.config.num_backbone_layers):
            cast(LlamaDecoderLayer, layer).self_attn.layer_idx = slot

    def _running_heads(self) -> list[NeuroTrailsLlamaHead]:
        return [cast(NeuroTrailsLlamaHead, self.heads[m]) for m in self._active_heads]

    def _embedding_owners(self) -> list[Any]:
        return [self] if len(self.layers) > 0 else list(self.heads)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings; without a backbone those of the first head."""
        return self._embedding_owners()[0].embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings; without a backbone the first head takes `value`, the others copies."""
        for m, owner in enumerate(self._embedding_owners()):
            owner.embed_tokens = value if m == 0 else copy.deepcopy(value)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        for owner in self._embedding_owners():
            old = owner.embed_tokens
            new = self._get_resized_embeddings(old, new_num_tokens, pad_to_multiple_of, mean_resizing)
            owner.embed_tokens = new.requires_grad_(old.weight.requires_grad)
        return self.get_input_embeddings()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # position_ids, also named in TransformersKwargs
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NeuroTrailsModelOutputWithPast:
        """As `LlamaModel.forward`, for the backbone and every active head.

        Args:
            input_ids: [batch, seq], or `inputs_embeds` [batch, seq, hidden] instead (then for all heads alike).
            attention_mask: [batch, past + seq], 1 for tokens and 0 for padding.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        stems, head_kwargs = self.run_backbone(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        outputs = [head(stem, **head_kwargs) for head, stem in zip(self._running_heads(), stems, strict=True)]
        # A device map may place the heads on different devices.
        head_hidden_states = torch.stack([output.to(stems[0].device) for output in outputs])
        return NeuroTrailsModelOutputWithPast(
            last_hidden_state=head_hidden_states.mean(0),
            past_key_values=head_kwargs["past_key_values"],
            head_hidden_states=head_hidden_states,
        )

    def run_backbone(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Everything before the heads; arguments as for `forward`.

        Returns:
            The hidden states [batch, seq, hidden] that each active head starts from, the same where there is a
            backbone, and what every head is called with besides.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give exactly one of the two.")
        heads = self._running_heads()
        if inputs_embeds is not None:
            embeds = [inputs_embeds]
        elif len(self.layers) > 0:
            embeds = [self.embed_tokens(input_ids)]
        else:
            embeds = [head.embed_tokens(input_ids) for head in heads]

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(embeds[0].shape[1], device=embeds[0].device) + past_length
            position_ids = cast(torch.LongTensor, positions.unsqueeze(0))
        if isinstance(attention_mask, dict):
            # Compiled generation makes a mask for each kind of layer, and here is one kind.
            (attention_mask,) = attention_mask.values()
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds[0],
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        layer_kwargs = {
            "attention_mask": causal_mask,
            "position_embeddings": self.rotary_emb(embeds[0], position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        # Fewer layers than were built while assisted generation drafts by early exit.
        depth = self.config.num_hidden_layers
        # One stem for all heads, or one for each where nothing is shared.
        stems = [_run_layers(self.layers[:depth], embed, **layer_kwargs) for embed in embeds]
        stems *= len(heads) // len(stems)
        return stems, {"depth": max(depth - len(self.layers), 0), **layer_kwargs}


class NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaPreTrainedModel, GenerationMixin):
    """`NeuroTrailsLlamaModel` with an output layer for each head; predicts by vote."""

    _tied_weights_keys = {r"lm_heads\.\d+\.weight": r"model\.(heads\.\d+\.)?embed_tokens\.weight"}

    def __init__(self, config: NeuroTrailsLlamaConfig) -> None:
        super().__init__(config)
        self.model = NeuroTrailsLlamaModel(config)
        self.lm_heads = nn.ModuleList(
            NeuroTrailsLlamaOutputLayer(config.hidden_size, config.vocab_size, bias=False)
            for _ in range(config.num_ensemble_heads)
        )
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        dense: str | os.PathLike[str] | LlamaForCausalLM,
        num_ensemble_heads: int,
        num_head_layers: int,
        *,
        vote: str = "probs",
        noise: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Upcycles a dense LLaMA: its lower layers become the backbone, its upper ones are copied into every head.

        Without noise the heads are equal and the vote is the dense model's prediction; masks that differ from head to
        head (the sparsifier's `random` or `soft_magnitude`) then set them apart. Dense model and result share no
        memory, and nothing else is held.

        Args:
            dense: the model, or the folder or hub id of one.
            num_ensemble_heads: see `NeuroTrailsLlamaConfig`, as for the next two.
            num_head_layers: B; with as many as `dense` has layers the heads share nothing, not even the embeddings.
            vote: how the heads are averaged.
            noise: standard deviation of Gaussian noise added to the heads' weights, as a share of the standard
                deviation of each weight tensor.
            seed: of the noise.
            kwargs: passed on to `from_pretrained` where `dense` names a checkpoint.

        Raises:
            ValueError: `dense` is not a `LlamaForCausalLM`, it is quantized, or another argument is out of range.
        """
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise}: give 0 for none, or a share of each weight's standard deviation.")
        if not isinstance(dense, PreTrainedModel):
            dense = cast(LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(dense, **kwargs))
        elif kwargs:
            raise ValueError(f"{', '.join(kwargs)}: options of loading, but dense is a model that is loaded already.")
        _check_dense(dense)
        split: dict[str, Any] = {
            "num_ensemble_heads": num_ensemble_heads,
            "num_head_layers": num_head_layers,
            "vote": vote,
        }
        with no_init_weights():
            model = cls._from_config(
                NeuroTrailsLlamaConfig(**_shared_fields(dense.config), **split),
                dtype=dense.dtype,
                attn_implementation=dense.config._attn_implementation,
            )
        weights = dense.state_dict()
        model.to(dense.device).load_state_dict({name: weights[model._locate(name)[1]] for name in model.state_dict()})
        model._add_noise(noise, seed)
        model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)

    def extract_head(self, m: int) -> LlamaForCausalLM:
        """Stock LLaMA made of the backbone and head `m`; its weights are copies.

        Raises:
            ValueError: there is no head `m`, or the model is compressed.
        """
        if not 0 <= m < len(self.lm_heads):
            raise ValueError(f"m={m}: this model has the heads 0 to {len(self.lm_heads) - 1}.")
        self._check_not_quantized()
        with no_init_weights():
            dense = LlamaForCausalLM._from_config(
                LlamaConfig(**_shared_fields(self.config)),
                dtype=self.dtype,
                attn_implementation=self.config._attn_implementation,
            )
        located = ((*self._locate(name), weight) for name, weight in self.state_dict().items())
        weights = {name: weight for head, name, weight in located if head in (None, m)}
        dense.to(self.device).load_state_dict(weights)
        dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)

    def _check_not_quantized(self) -> None:
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError("the model is compressed or quantized: go on with model.dequantize().")

    def _locate(self, name: str) -> tuple[int | None, str]:
        """The head that a weight belongs to (None: the backbone), and the weight's name in stock LLaMA."""
        match = re.fullmatch(r"(?:model\.heads|lm_heads)\.(\d+)\.(?:layers\.(\d+)\.)?(.+)", name)
        if match is None:
            return None, name
        head, layer, rest = match.groups()
        if name.startswith("lm_heads."):
            return int(head), f"lm_head.{rest}"
        if layer is not None:
            rest = f"layers.{self.config.num_backbone_layers + int(layer)}.{rest}"
        return int(head), f"model.{rest}"

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
        """See `NeuroTrailsLlamaModel.active_heads`."""
        return self.model.active_heads

    @active_heads.setter
    def active_heads(self, value: int | Sequence[int]) -> None:
        self.model.active_heads = value

    def activation_checkpointing_enable(self, *args: Any, heads_only: bool = False, **kwargs: Any) -> None:
        """As in transformers, for all decoder layers or, with `heads_only`, for those of the heads."""
        super().activation_checkpointing_enable(*args, **kwargs)
        if heads_only:
            for layer in self.model.layers:
                cast(LlamaDecoderLayer, layer).gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Embedding:
        """See `NeuroTrailsLlamaModel.get_input_embeddings`."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """See `NeuroTrailsLlamaModel.set_input_embeddings`."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer of the first head."""
        return self.lm_heads[0]

    def get_output_layers(self) -> list[nn.Module]:
        """The output layer of every head."""
        return list(self.lm_heads)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces every head's output layer: the first head takes the module itself, the others copies."""
        for m in range(len(self.lm_heads)):
            self.lm_heads[m] = new_embeddings if m == 0 else copy.deepcopy(new_embeddings)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        self._check_not_quantized()
        embeddings = self.model._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.lm_heads:
            lm_head = cast(nn.Linear, module)
            new = self._get_resized_lm_head(lm_head, embeddings.num_embeddings, mean_resizing=mean_resizing)
            lm_head.weight = new.weight.requires_grad_(lm_head.weight.requires_grad)
            lm_head.out_features = new.out_features
        return embeddings

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids, also named in TransformersKwargs
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_head_logits: bool = False,
        skip_logits: bool = False,
        headwise_backward: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NeuroTrailsCausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, with the vote in `logits`.

        Args:
            labels: [batch, seq]; the loss is the mean over active heads of each head's own cross-entropy.
            output_head_logits: also return every active head's logits.
            skip_logits: return losses but no logits, which saves time and memory in training.
            headwise_backward: with `skip_logits`, compute each head's gradients right after its own forward pass, so
                that no two heads' activations are alive together; `loss.backward()` computes the backbone's, once, and
                delivers all of them. Not for sharded weights (FSDP).

        Raises:
            ValueError: `skip_logits` without `labels`, or with an option that asks for logits; `headwise_backward`
                without `skip_logits`.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True: without logits only the loss is left, so give labels too.")
        if skip_logits and (output_head_logits or not isinstance(logits_to_keep, int) or logits_to_keep):
            raise ValueError("skip_logits=True: drop output_head_logits and logits_to_keep, they ask for logits.")
        if headwise_backward and not skip_logits:
            raise ValueError("headwise_backward=True: the heads' logits are not kept, so give skip_logits=True too.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        if headwise_backward:
            assert labels is not None
            losses = self._headwise_losses(inputs, labels, **kwargs)
            return NeuroTrailsCausalLMOutputWithPast(loss=losses.mean(), head_losses=losses)
        outputs = self.model(**inputs)
        lm_heads = [cast(nn.Linear, self.lm_heads[m]) for m in self.active_heads]
        logits = head_logits = head_losses = None
        if skip_logits:
            assert labels is not None
            head_losses = fused_causal_lm_losses(outputs.head_hidden_states, lm_heads, labels, **kwargs)
        else:
            hidden_states = [slice_logits_to_keep(hidden, logits_to_keep) for hidden in outputs.head_hidden_states]
            logits, head_logits, head_losses = self._vote(
                lm_heads, hidden_states, labels, output_head_logits, **kwargs
            )
        return NeuroTrailsCausalLMOutputWithPast(
            loss=None if head_losses is None else head_losses.mean(),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_losses=head_losses,
            head_logits=head_logits,
        )

    def _headwise_losses(self, inputs: dict[str, Any], labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[active heads] losses, each head being differentiated before the next one runs."""
        stems, head_kwargs = self.model.run_backbone(**inputs)
        losses = []
        for m, stem in zip(self.active_heads, stems, strict=True):
            head, lm_head = self.model.heads[m], self.lm_heads[m]

            def head_loss(
                hidden_states: torch.Tensor, head: nn.Module = head, lm_head: nn.Module = lm_head
            ) -> torch.Tensor:
                hidden_states = head(hidden_states, **head_kwargs)
                return fused_causal_lm_losses([hidden_states], [lm_head], labels, **kwargs)[0]

            losses.append(headwise_loss(head_loss, stem, [*head.parameters(), *lm_head.parameters()]))
        return torch.stack(losses)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, QuantizedCache):
            # Of all caches this one counts num_hidden_layers.
            missing = self.config.num_decoder_layers - len(cache.layers)
            cache.layers.extend(copy.deepcopy(cache.layers[0]) for _ in range(missing))

    def _vote(
        self,
        lm_heads: list[nn.Linear],
        hidden_states: list[torch.Tensor],
        labels: torch.Tensor | None,
        keep_head_logits: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The vote's logits, the heads' logits if they are to be kept, the heads' losses if there are labels."""
        head_logits, losses = [], []
        tally = None
        for lm_head, hidden in zip(lm_heads, hidden_states, strict=True):
            logits = lm_head(hidden).to(hidden.device)
            if keep_head_logits:
                head_logits.append(logits)
            if labels is not None:
                losses.append(
                    self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
                )
            if len(lm_heads) > 1:
                tally = count_vote(tally, logits, self.config.vote)
        if tally is not None:
            logits = close_vote(tally, len(lm_heads), self.config.vote).to(logits.dtype)
        return logits, torch.stack(head_logits) if head_logits else None, torch.stack(losses) if losses else None


__all__ = [
    "NeuroTrailsCausalLMOutputWithPast",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaHead",
    "NeuroTrailsLlamaModel",
    "NeuroTrailsLlamaPreTrainedModel",
    "NeuroTrailsModelOutputWithPast",
    "close_vote",
    "count_vote",
]
