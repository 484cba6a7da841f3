# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Adaptive voting: one head decodes, and the others are asked only for the tokens of which it is not sure.

The backbone and the first active head run on every token. What the others have missed, the backbone's outputs, is kept
in the key-value cache; when they are asked they process it in one go. So a position's prediction is the full vote's
or the first head's, whichever the first head's certainty says, as if all heads had run on every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from ..models.neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..models.neurotrails_llama.modeling_neurotrails_llama import (
    NeuroTrailsCausalLMOutputWithPast,
    close_vote,
    count_vote,
)
from .decoding import Decoder, GrowingLayer


Measure = Literal["margin", "entropy"]

# Logits of this many tokens are alive at a time, over all heads together.
CHUNK_TOKENS = 1024
# A threshold above any certainty.
ALWAYS = 2.0


def certainty(logits: Tensor, measure: Measure) -> Tensor:
    """How sure a prediction [..., vocab] is, [...] from 0 to 1 in float32.

    `margin`: the difference of the two largest probabilities. `entropy`: one minus the share that the entropy has of
    the largest possible one.
    """
    if measure == "margin":
        first, second = logits.softmax(-1, dtype=torch.float32).topk(2).values.unbind(-1)
        return first - second
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return (1 - entropy / math.log(logits.shape[-1])).clamp(min=0)


class Backlog(DynamicLayer):
    """The last layer of a cache: what heads start from, for those that have not seen all of it yet.

    `keys` [batch, stems, seq, hidden] are the backbone's outputs (without a backbone, one embedding for each active
    head), `values` [batch, 1, seq, 2 * head_dim] the cosines and sines of their positions. As a layer of the cache
    they are reordered, repeated and cropped with it.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, cache: Cache, depth: int) -> Self:
        """The backlog of a cache for `depth` decoder layers, made now if the cache has none."""
        if not (cache.layers and isinstance(cache.layers[-1], cls)):
            # Some caches make their layers as they are used.
            cache.layers += [DynamicLayer() for _ in range(depth - len(cache.layers))]
            cache.layers.append(cls())
        return cast(Self, cache.layers[-1])

    def add(self, stems: list[Tensor], cosine: Tensor, sine: Tensor) -> None:
        """Keeps the hidden states [batch, seq, hidden] and the rotary embedding [batch or 1, seq, head_dim]."""
        positions = torch.cat([cosine, sine], -1).expand(len(stems[0]), -1, -1)
        self.update(torch.stack(stems, 1), positions[:, None])

    def since(self, start: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Stems and rotary embedding from position `start` on."""
        cosine, sine = self.values[:, 0, start:].chunk(2, -1)
        return list(self.keys[:, :, start:].unbind(1)), (cosine, sine)


class AdaptiveVoting:
    """Within `with AdaptiveVoting(model, threshold):` a model consults all its heads only where the first is unsure.

    This holds for `model(...)`, for `generate` (sampling, beams, batches with padding, assisted decoding) and for what
    is built on them, for models as they were trained and compressed ones. A key-value cache belongs to the voting that
    filled it.

    Args:
        model: The first of its `active_heads` decodes, the others are consulted.
        threshold: The others are consulted where the first head's certainty is below it: 0 never asks, 2 always.
        measure: Of certainty, see `certainty`.

    Raises:
        ValueError: a model that is not a `NeuroTrailsLlamaForCausalLM`, an unknown `measure`, or a `threshold` that is
            not a number.
    """

    def __init__(self, model: NeuroTrailsLlamaForCausalLM, threshold: float, measure: Measure = "margin") -> None:
        _check_model(model)
        _check_measure(measure)
        if isinstance(threshold, str) or math.isnan(threshold):
            raise ValueError(
                f"threshold={threshold!r}: give a certainty, 0 to never ask the other heads, 2 to always."
            )
        self.model, self.config = model, model.config
        self.threshold, self.measure = float(threshold), measure
        self.predictions = self.consultations = 0

    @property
    def share(self) -> float:
        """Of all predictions so far, those that needed the other heads; 0 before the first."""
        return self.consultations / max(self.predictions, 1)

    def __enter__(self) -> Self:
        if "forward" in vars(self.model):
            raise ValueError(
                "model.forward has been replaced already: leave the other `with` block before; models on several "
                "devices cannot vote adaptively."
            )
        cast(Any, self.model).forward = self.forward
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.forward

    @can_return_tuple
    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> NeuroTrailsCausalLMOutputWithPast:
        """As `NeuroTrailsLlamaForCausalLM.forward`, for logits and a dynamic cache.

        Raises:
            ValueError: there is one active head only, another output or kind of cache is asked for, the cache was
                filled by another voting, or the attention mask is not [batch, past + seq].
        """
        _check_call(self.model, attention_mask, past_key_values, kwargs)
        first, *others = self.model.active_heads
        base, vote = self.model.model, self.config.vote
        use_cache = self.config.use_cache if use_cache is None else use_cache
        decoder = Decoder.of(self.model)
        runner: Any = base if decoder is None else decoder
        stems, head_kwargs = runner.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        length, cache = stems[0].shape[1], head_kwargs["past_key_values"]
        self._remember(stems, head_kwargs)

        def hidden_states(m: int, stem: Tensor) -> Tensor:
            """Of head m, [batch, kept, hidden]; it may have had to process earlier positions as well."""
            hidden = None if decoder is None else decoder.run_head(m, attention_mask, stem, **head_kwargs)
            if hidden is None:
                # The kernels rotate in float32, whatever the model's type.
                positions = tuple(part.to(stem.dtype) for part in head_kwargs["position_embeddings"])
                hidden = cast(Any, base.heads[m])(stem, **{**head_kwargs, "position_embeddings": positions})
            return slice_logits_to_keep(hidden[:, -length:], logits_to_keep)

        logits = self.model.lm_heads[first](hidden_states(first, stems[0]))
        unsure = certainty(logits, self.measure) < self.threshold
        self.predictions += unsure.numel()
        if unsure.any():
            self.consultations += int(unsure.sum())
            stems, head_kwargs = self._catch_up(stems, head_kwargs, attention_mask)
            tally = count_vote(None, logits[unsure], vote)
            for m, stem in zip(others, stems[1:], strict=True):
                tally = count_vote(tally, self.model.lm_heads[m](hidden_states(m, stem)[unsure]), vote)
            logits[unsure] = close_vote(tally, 1 + len(others), vote).to(logits.dtype)
        return NeuroTrailsCausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _remember(self, stems: list[Tensor], head_kwargs: dict[str, Any]) -> None:
        """Keeps what the other heads start from, if they may have to be asked about it later."""
        if self._heads_have_a_cache(head_kwargs):
            distinct = stems[:1] if self.config.num_backbone_layers > 0 else stems
            depth = self.config.num_backbone_layers + len(stems) * self.config.num_head_layers
            Backlog.of(head_kwargs["past_key_values"], depth).add(distinct, *head_kwargs["position_embeddings"])

    def _catch_up(
        self, stems: list[Tensor], head_kwargs: dict[str, Any], attention_mask: Tensor | None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Stems of all heads from the first position on that those behind the first have not seen, and the arguments
        to process them with."""
        if not self._heads_have_a_cache(head_kwargs):
            return stems, head_kwargs
        layers = head_kwargs["past_key_values"].layers
        second_head = self.config.num_backbone_layers + self.config.num_head_layers
        lagging = DynamicCache()
        lagging.layers = layers[second_head : second_head + 1]
        distinct, position_embeddings = layers[-1].since(lagging.get_seq_length())
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=distinct[0],
            attention_mask=attention_mask,
            past_key_values=lagging,
            position_ids=None,
        )
        changes = {"attention_mask": mask, "position_embeddings": position_embeddings, "position_ids": None}
        return distinct * (len(stems) // len(distinct)), {**head_kwargs, **changes}

    def _heads_have_a_cache(self, head_kwargs: dict[str, Any]) -> bool:
        return head_kwargs["past_key_values"] is not None and self.config.num_head_layers > 0


@dataclass(frozen=True)
class AdaptiveScores:
    """What adaptive voting would do on held-out text, for every threshold at once.

    Args:
        certainty: [tokens], of the first head.
        first_nll: [tokens], negative log-likelihood of the first head in nats.
        vote_nll: [tokens], of the full vote.
    """

    certainty: Tensor
    first_nll: Tensor
    vote_nll: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: NeuroTrailsLlamaForCausalLM,
        batches: Iterable[dict[str, Tensor]],
        measure: Measure = "margin",
    ) -> Self:
        """Scores the active heads of a model in evaluation mode.

        Args:
            model: As for `AdaptiveVoting`.
            batches: `input_ids` [batch, seq] and `labels` [batch, seq], -100 where nothing is to be predicted; labels
                are the inputs. With padding also `attention_mask` [batch, seq].
            measure: Of certainty.

        Raises:
            ValueError: as for `AdaptiveVoting`, or there is nothing to predict.
        """
        _check_model(model)
        _check_measure(measure)
        _check_heads(model)
        lm_heads = [model.lm_heads[m] for m in model.active_heads]
        chunks = []
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
            labels = batch["labels"].to(model.device)
            hidden_MBSH = model.model(**inputs, use_cache=False).head_hidden_states[:, :, :-1]
            predicted = labels[:, 1:] != -100
            if "attention_mask" in inputs:
                # What padding predicts means nothing.
                predicted &= inputs["attention_mask"][:, :-1].bool()
            hidden_MNH, targets_N = hidden_MBSH[:, predicted], labels[:, 1:][predicted]
            size = max(CHUNK_TOKENS // len(lm_heads), 1)
            for hidden_MTH, targets_T in zip(hidden_MNH.split(size, 1), targets_N.split(size), strict=True):
                logits = [head(hidden_TH) for head, hidden_TH in zip(lm_heads, hidden_MTH, strict=True)]
                tally = None
                for head_logits in logits:
                    tally = count_vote(tally, head_logits, model.config.vote)
                assert tally is not None
                vote = close_vote(tally, len(logits), model.config.vote)
                nll = (cross_entropy(x.float(), targets_T, reduction="none") for x in (logits[0], vote))
                chunks.append((certainty(logits[0], measure), *nll))
        if not sum(len(chunk[0]) for chunk in chunks):
            raise ValueError("batches: there is no token to predict; give text of two tokens or more.")
        return cls(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def share(self, threshold: float) -> float:
        """Of the tokens, those for which the other heads are consulted."""
        return float((self.certainty < threshold).double().mean())

    def perplexity(self, threshold: float) -> float:
        """Of adaptive voting; of the first head alone at 0, of the full vote at 2."""
        nll = torch.where(self.certainty < threshold, self.vote_nll, self.first_nll)
        return float(nll.double().mean().exp())

    def choose_threshold(self, tolerance: float = 0.005) -> float:
        """The threshold of the fewest consultations whose perplexity is within `tolerance` of the full vote's.

        Raises:
            ValueError: `tolerance` is negative.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}: give the share by which perplexity may rise, such as 0.005.")
        certainty, order = self.certainty.sort()
        gains = (self.first_nll - self.vote_nll)[order].double()
        # Mean loss with the k least certain tokens consulted, k = 0 ... N; and the threshold that consults them.
        losses = self.first_nll.double().mean() - pad(gains.cumsum(0), (1, 0)) / len(gains)
        thresholds = torch.cat([certainty, certainty.new_tensor([ALWAYS])])
        enough = losses <= self.vote_nll.double().mean() + math.log1p(tolerance)
        enough[1:-1] &= certainty[1:] > certainty[:-1]
        enough[-1] = True
        fewest = int(enough.nonzero()[0])
        return float(thresholds[fewest]) if fewest > 0 else 0.0


def _check_model(model: object) -> None:
    if not isinstance(model, NeuroTrailsLlamaForCausalLM):
        raise ValueError(f"model: {type(model).__name__} has no heads to vote; give a NeuroTrailsLlamaForCausalLM.")


def _check_measure(measure: str) -> None:
    if measure not in get_args(Measure):
        raise ValueError(f"measure={measure!r}: choose from {', '.join(get_args(Measure))}.")


def _check_heads(model: NeuroTrailsLlamaForCausalLM) -> None:
    if len(model.active_heads) < 2:
        raise ValueError(
            f"active_heads={model.active_heads}: there is no other head to consult; activate two or more."
        )


def _check_call(
    model: NeuroTrailsLlamaForCausalLM, attention_mask: object, cache: Cache | None, others: dict[str, Any]
) -> None:
    """Raises `ValueError` for what adaptive voting cannot do."""
    _check_heads(model)
    if asked := [name for name, value in others.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(asked)}: adaptive voting returns logits only; leave the `with` block for more.")
    layers = [] if cache is None else cache.layers
    if any(type(layer) not in (DynamicLayer, GrowingLayer, Backlog) for layer in layers):
        raise ValueError("past_key_values: adaptive voting takes a DynamicCache; drop cache_implementation.")
    filled = cache is not None and cache.get_seq_length() > 0
    if filled and model.config.num_head_layers > 0 and not isinstance(layers[-1], Backlog):
        raise ValueError("past_key_values: this cache was filled by another voting; start a new one.")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise ValueError("attention_mask: adaptive voting takes one of the shape [batch, past + seq].")
