# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoding of one text as one call per token for all decoder layers of a compressed model.

One token takes a thousand small operations, each of which costs torch several microseconds: as much time in all as the
arithmetic. Here the whole stack (norms, rotary embedding, attention, key-value cache) is one parallel region.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..models.neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..models.neurotrails_llama.modeling_neurotrails_llama import NeuroTrailsModelOutputWithPast
from . import native
from .linear import SparseLinear


# What the kernels have room for.
LARGEST_HEAD = 512
_CACHE_TYPES = {torch.bfloat16: 0, torch.float32: 2}


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the beginning of larger buffers, so that a token costs no copy."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._hold(layer.keys, layer.values)

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens; others may have replaced keys and values since."""
        if length > self.capacity or self.keys.data_ptr() != self.buffers[0].data_ptr():
            self._hold(self.keys, self.values, max(length, 2 * self.keys.shape[2]))

    def extend(self, length: int) -> None:
        """Counts the first `length` tokens of the buffers as there."""
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[0] != self.keys.shape[0]:
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.get_seq_length()
        length = start + key_states.shape[2]
        self.reserve(length)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:length] = states
        self.extend(length)
        return self.keys, self.values

    @property
    def capacity(self) -> int:
        return self.buffers[0].shape[2]

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, capacity: int | None = None) -> None:
        batch, heads, length, size = keys.shape
        shape = (batch, heads, capacity or 2 * length, size)
        self.buffers = tuple(states.new_empty(shape) for states in (keys, values))
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, :length] = states
        self.extend(length)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, native.Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden",
                "intermediate",
                "attention_heads",
                "key_value_heads",
                "head_size",
                "backbone_depth",
                "heads",
                "head_depth",
            )
        ),
        ("layers", ctypes.POINTER(_Layer)),
        ("norms", ctypes.POINTER(ctypes.c_void_p)),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )


class Decoder:
    """Takes over `model.model.forward` for single tokens of a single text; everything else goes the usual way.

    Args:
        model: A compressed `NeuroTrailsLlamaForCausalLM`.
    """

    def __init__(self, model: NeuroTrailsLlamaForCausalLM) -> None:
        self.model = model.model
        self._usual_forward = self.model.forward
        self._plans: dict[tuple[bool, tuple[int, ...]], _Plan] = {}
        # What the plans point to.
        self._memory: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes plans of its own weights.
        return self.__dict__ | {"_plans": {}, "_memory": []}

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the kernels can run the decoder layers of `model`."""
        if not isinstance(model, NeuroTrailsLlamaForCausalLM) or not native.available():
            return False
        config: Any = model.config
        linear = [
            module
            for layer in _decoder_layers(model.model, range(config.num_ensemble_heads))
            for module in layer.modules()
            if isinstance(module, nn.Linear | SparseLinear)
        ]
        return (
            all(isinstance(module, SparseLinear) and module.bias is None for module in linear)
            and len({module.values.dtype for module in linear}) == 1
            and config.hidden_act == "silu"
            and config.head_dim % 16 == 0
            and config.head_dim <= LARGEST_HEAD
            and model.dtype in _CACHE_TYPES
        )

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Lets a compressed model decode by the kernels from now on, if they can run it."""
        if cls.supports(model):
            decoder = cls(cast(NeuroTrailsLlamaForCausalLM, model))
            decoder.model.forward = decoder.forward

    @staticmethod
    def of(model: NeuroTrailsLlamaForCausalLM) -> Decoder | None:
        """The decoder that is installed in a model."""
        owner = getattr(model.model.forward, "__self__", None)
        return owner if isinstance(owner, Decoder) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `NeuroTrailsLlamaModel.forward`."""
        config, heads = self.model.config, self.model.active_heads
        layers = self._cache_layers(config.num_backbone_layers + len(heads) * config.num_head_layers, args, kwargs)
        if layers is None:
            return self._usual_forward(*args, **kwargs)
        owners = [self.model] if config.num_backbone_layers > 0 else [cast(Any, self.model.heads[m]) for m in heads]
        stems = torch.cat([owner.embed_tokens(kwargs["input_ids"])[0] for owner in owners])
        rotary = self._rotary(stems.float(), kwargs.get("position_ids"), layers)
        hidden = self._run(True, tuple(heads), stems, rotary, layers)
        return NeuroTrailsModelOutputWithPast(
            last_hidden_state=hidden.mean(0), past_key_values=kwargs["past_key_values"], head_hidden_states=hidden
        )

    def run_backbone(self, **kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """As `NeuroTrailsLlamaModel.run_backbone`."""
        layers = self._cache_layers(self.model.config.num_backbone_layers, (), kwargs)
        if not layers:
            return self.model.run_backbone(**kwargs)
        embedding = self.model.embed_tokens(kwargs["input_ids"])[0]
        rotary = self._rotary(embedding, kwargs.get("position_ids"), layers)
        stem = self._run(True, (), embedding, rotary, layers)[0]
        return [stem] * len(self.model.active_heads), {
            "depth": self.model.config.num_head_layers,
            "attention_mask": None,
            "position_embeddings": rotary,
            "position_ids": kwargs.get("position_ids"),
            "past_key_values": kwargs["past_key_values"],
            "use_cache": True,
        }

    def run_head(self, m: int, stem: torch.Tensor, **head_kwargs: Any) -> torch.Tensor:
        """Head m on hidden states [batch, seq, hidden], the same shape; called as the head itself."""
        head, cache, depth = cast(Any, self.model.heads[m]), head_kwargs["past_key_values"], head_kwargs["depth"]
        layers = None
        if stem.shape[:2] == (1, 1) and head_kwargs["attention_mask"] is None and 0 < depth == len(head.layers):
            layers = _growing_layers(cache, head.layers[0].self_attn.layer_idx, depth)
        if layers is None:
            return cast(torch.Tensor, head(stem, **head_kwargs))
        return self._run(False, (m,), stem[0], head_kwargs["position_embeddings"], layers)[0]

    def _cache_layers(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[GrowingLayer] | None:
        """The cache's first layers, ready for one more token; None where this call has to go the usual way."""
        tokens, cache, mask = (kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        config = self.model.config
        simple = (
            not args
            and isinstance(tokens, torch.Tensor)
            and tokens.shape == (1, 1)
            and kwargs.get("inputs_embeds") is None
            and not torch.is_grad_enabled()
            and not any(
                kwargs.get(name, getattr(config, name)) for name in ("output_hidden_states", "output_attentions")
            )
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all())))
        )
        return _growing_layers(cache, 0, depth) if simple else None

    def _rotary(
        self, hidden: torch.Tensor, position_ids: torch.Tensor | None, layers: list[GrowingLayer]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if position_ids is None:
            position_ids = torch.tensor([[layers[0].get_seq_length()]])
        return cast(Any, self.model.rotary_emb)(hidden, position_ids)

    @torch.no_grad()
    def _run(
        self,
        backbone: bool,
        heads: tuple[int, ...],
        stems: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        layers: list[GrowingLayer],
    ) -> torch.Tensor:
        """One token through the backbone, some heads or both: [heads, 1, 1, hidden] in the model's dtype."""
        length = layers[0].get_seq_length()
        for layer in layers:
            layer.reserve(length + 1)
        stems = stems.float().contiguous()
        cosine, sine = (part.flatten().float() for part in rotary)
        plan = self._plan(backbone, heads)
        out = torch.empty(plan.heads, 1, 1, plan.hidden)
        pointers = ctypes.c_void_p * len(layers)
        native.kernels().nt_decode(
            ctypes.byref(plan),
            stems.data_ptr(),
            pointers(*(layer.buffers[0].data_ptr() for layer in layers)),
            pointers(*(layer.buffers[1].data_ptr() for layer in layers)),
            _CACHE_TYPES[layers[0].keys.dtype],
            layers[0].capacity,
            length,
            cosine.data_ptr(),
            sine.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        for layer in layers:
            layer.extend(length + 1)
        return out.to(self.model.dtype)

    def _plan(self, backbone: bool, heads: tuple[int, ...]) -> _Plan:
        if (backbone, heads) not in self._plans:
            self._plans[backbone, heads] = self._build_plan(backbone, heads)
        return self._plans[backbone, heads]

    def _build_plan(self, backbone: bool, heads: tuple[int, ...]) -> _Plan:
        config = self.model.config
        modules = _decoder_layers(self.model, heads)[0 if backbone else config.num_backbone_layers :]
        layers = [self._describe(layer) for layer in modules]
        # A backbone by itself is one stream without a final norm.
        norms: list[int | None] = [self._pointer(cast(Any, self.model.heads[m]).norm.weight) for m in heads]
        norms = norms or [None]
        return _Plan(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.num_backbone_layers if backbone else 0,
            len(norms),
            config.num_head_layers if heads else 0,
            (_Layer * len(layers))(*layers),
            (ctypes.c_void_p * len(norms))(*norms),
            config.rms_norm_eps,
            config.head_dim**-0.5,
        )

    def _describe(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        matrices = [module.kernel for module in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        self._memory += matrices
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        return _Layer(*(matrix.structure for matrix in matrices), *(self._pointer(norm.weight) for norm in norms))

    def _pointer(self, weight: torch.Tensor) -> int:
        """Where a float32 copy of the weight is."""
        self._memory.append(weight.detach().float().contiguous())
        return int(self._memory[-1].data_ptr())


def _decoder_layers(model: Any, heads: Any) -> list[nn.Module]:
    return [*model.layers, *(layer for m in heads for layer in model.heads[m].layers)]


def _growing_layers(cache: Cache | None, first: int, depth: int) -> list[GrowingLayer] | None:
    """`depth` layers of a filled dynamic cache, turned into growing ones; None for any other cache."""
    if not isinstance(cache, DynamicCache) or len(cache.layers) < first + depth:
        return None
    layers = cast(list[DynamicLayer], cache.layers[first : first + depth])
    for slot, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, GrowingLayer) or layer.get_seq_length() == 0:
            return None
        if not isinstance(layer, GrowingLayer):
            layers[slot] = cache.layers[first + slot] = GrowingLayer(layer)
    growing = cast(list[GrowingLayer], layers)
    same = all(layer.keys.shape[0] == 1 and layer.keys.dtype in _CACHE_TYPES for layer in growing)
    return growing if same else None
