# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoding, and reading of prompts, as one call for all decoder layers of a compressed model.

A token takes a thousand small operations, each of which costs torch several microseconds: as much time in all as the
arithmetic. Here the whole stack (norms, rotary embedding, attention, key-value cache) is one parallel region.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..models.neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..models.neurotrails_llama.modeling_neurotrails_llama import NeuroTrailsModelOutputWithPast
from . import native, products
from .linear import SparseLinear, check_stays_on_cpu


# What the kernels take without tiles: tokens of all texts together.
FEW_TOKENS = 16
# Those of a model that the decoder knows; `inputs_embeds` it does not.
ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the beginning of larger buffers, so that a token costs no copy."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.resize(2 * self.keys.shape[2])

    @classmethod
    def empty(cls, batch: int, heads: int, size: int, dtype: torch.dtype) -> GrowingLayer:
        """Without a token yet, for keys and values [batch, heads, tokens, size]."""
        layer = DynamicLayer()
        layer.keys, layer.values = torch.empty(2, batch, heads, 0, size, dtype=dtype)
        return cls(layer)

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens; others may have replaced keys and values since."""
        moved = self.keys.data_ptr() != self.buffers[0].data_ptr()
        frozen = self.buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if length > self.capacity or moved or frozen:
            self.resize(max(length, 2 * self.keys.shape[2]))

    def resize(self, capacity: int) -> None:
        """Moves keys and values to buffers for `capacity` tokens."""
        batch, heads, length, size = self.keys.shape
        states = self.keys, self.values
        self.buffers = tuple(part.new_empty(batch, heads, capacity, size) for part in states)
        for buffer, part in zip(self.buffers, states, strict=True):
            buffer[:, :, :length] = part
        self.extend(length)

    def extend(self, length: int) -> None:
        """Counts the first `length` tokens of the buffers as there."""
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized or key_states.shape[0] != self.keys.shape[0]:
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
        ("rounds", ctypes.c_int32),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("texts", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("filled", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("type", ctypes.c_int32),
    )


class _Sources:
    """All tensors of some modules, of which a plan is made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        owners: list[dict[str, Any]] = [tensors for each in modules for tensors in (each._parameters, each._buffers)]
        self._names = [(owner, name) for owner in owners for name, tensor in owner.items() if tensor is not None]
        tensors = self._tensors()
        # Kept, so that those which replace them come to lie elsewhere.
        self._kept = [tensor.detach() for tensor in tensors]
        self._state = native.state_of(tensors)

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for owner, name in self._names if (tensor := owner.get(name)) is not None]

    @property
    def have_changed(self) -> bool:
        """Whether one of the tensors has changed, or been replaced, since."""
        return native.state_of(self._tensors()) != self._state


@dataclass(frozen=True)
class _Made:
    """A plan, the memory that it points to, and what it was made of."""

    plan: _Plan
    memory: list[Any]
    sources: _Sources


class Decoder:
    """Takes over `model.model.forward` wherever the kernels can do it and are as quick; the rest goes the usual way.

    Hooks on decoder layers and what is in them do not run where the kernels do.

    Args:
        model: A compressed `NeuroTrailsLlamaForCausalLM`.
    """

    def __init__(self, model: NeuroTrailsLlamaForCausalLM) -> None:
        self.model = model.model
        self._usual_forward = self.model.forward
        # Assisted generation by early exit lowers the number in the configuration for a while.
        self._depth = self.model.config.num_hidden_layers
        self._plans: dict[tuple[bool, tuple[int, ...], bool], _Made] = {}
        self._quicker: dict[tuple[bool, tuple[int, ...], int, torch.dtype, int], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes plans of its own weights.
        return self.__dict__ | {"_plans": {}, "_quicker": {}}

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
        )

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Lets a compressed model decode by the kernels from now on, if they can run it."""
        if cls.supports(model):
            decoder = cls(cast(NeuroTrailsLlamaForCausalLM, model))
            decoder.model.forward = decoder.forward
            cast(Any, decoder.model)._apply = decoder.apply_to_weights

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Undoes `install`."""
        if isinstance(model, NeuroTrailsLlamaForCausalLM) and cls.of(model) is not None:
            del cast(Any, model.model).forward
            del cast(Any, model.model)._apply

    @staticmethod
    def of(model: NeuroTrailsLlamaForCausalLM) -> Decoder | None:
        """The decoder that is installed in a model."""
        owner = getattr(model.model.forward, "__self__", None)
        return owner if isinstance(owner, Decoder) else None

    def apply_to_weights(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As `nn.Module._apply`, which `.to()` and its like go through."""
        check_stays_on_cpu(fn)
        return type(self.model)._apply(self.model, fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `NeuroTrailsLlamaModel.forward`."""
        config, heads = self.model.config, self.model.active_heads
        cache = self._cache(kwargs)
        cached = self._cached(cache, config.num_backbone_layers + len(heads) * config.num_head_layers, args, kwargs)
        if cached is None:
            return self._usual_forward(*args, **kwargs)
        owners = [self.model] if config.num_backbone_layers > 0 else [cast(Any, self.model.heads[m]) for m in heads]
        stems = torch.stack([owner.embed_tokens(kwargs["input_ids"]) for owner in owners])
        rotary = self._rotary(stems[0], kwargs.get("position_ids"), cached)
        hidden = self._run(True, heads, stems, rotary, cached)
        return NeuroTrailsModelOutputWithPast(
            last_hidden_state=hidden.mean(0), past_key_values=cache, head_hidden_states=hidden
        )

    def run_backbone(self, **kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """As `NeuroTrailsLlamaModel.run_backbone`; heads on its result are to be run by `run_head`."""
        cache = self._cache(kwargs)
        cached = self._cached(cache, self.model.config.num_backbone_layers, (), kwargs)
        if cached is None or not cached.layers:
            return self.model.run_backbone(**kwargs)
        embedding = self.model.embed_tokens(kwargs["input_ids"])
        rotary = self._rotary(embedding, kwargs.get("position_ids"), cached)
        stem = self._run(True, [], embedding, rotary, cached)[0]
        return [stem] * len(self.model.active_heads), {
            "depth": self.model.config.num_head_layers,
            "position_embeddings": rotary,
            "position_ids": kwargs.get("position_ids"),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def run_head(
        self, m: int, padding_mask: torch.Tensor | None, stem: torch.Tensor, **head_kwargs: Any
    ) -> torch.Tensor | None:
        """Head m on hidden states [batch, seq, hidden], the same shape, or None where only the head itself can do it.

        Args:
            m: The head.
            padding_mask: As a model takes it, [batch, past + seq] or None.
            stem: [batch, seq, hidden].
            head_kwargs: What the head would be called with.
        """
        head, depth = cast(Any, self.model.heads[m]), head_kwargs["depth"]
        if not 0 < depth == len(head.layers):
            return None
        first, cache = head.layers[0].self_attn.layer_idx, head_kwargs["past_key_values"]
        if not self._is_quicker(False, [m], stem.shape[:2].numel()):
            return None
        cached = _Cached.of(cache, first, depth, stem.shape[:2], padding_mask, self._empty_layer)
        if cached is None:
            return None
        return self._run(False, [m], stem, head_kwargs["position_embeddings"], cached)[0]

    def _cache(self, kwargs: dict[str, Any]) -> Cache | None:
        """The one that a call fills: given, new or none."""
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        use_cache = self.model.config.use_cache if use_cache is None else use_cache
        return DynamicCache() if cache is None and use_cache else cache

    def _cached(
        self, cache: Cache | None, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Cached | None:
        """The cache's first layers, ready for more tokens; None where this call has to go the usual way."""
        tokens = kwargs.get("input_ids")
        if args or not isinstance(tokens, torch.Tensor) or not self._is_usual(kwargs):
            return None
        if not self._is_quicker(True, self.model.active_heads, tokens.numel()):
            return None
        return _Cached.of(cache, 0, depth, tokens.shape, kwargs.get("attention_mask"), self._empty_layer)

    def _is_usual(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call asks for nothing but hidden states of whole texts, and all decoder layers take part."""
        config: Any = self.model.config
        options = {"is_causal": True, "return_dict": True, "output_hidden_states": False, "output_attentions": False}
        given = {name: value for name, value in kwargs.items() if value is not None}
        chosen = {name: given.get(name, getattr(config, name, default)) for name, default in options.items()}
        # Without a mask, positions that start again tell where another text begins.
        positions = None if "attention_mask" in given else given.get("position_ids")
        return (
            given.keys() <= ARGUMENTS | options.keys()
            and chosen == options
            and (positions is None or bool((positions.diff() == 1).all()))
            and config.num_hidden_layers == self._depth
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
        )

    def _empty_layer(self, batch: int) -> GrowingLayer:
        config = self.model.config
        return GrowingLayer.empty(batch, config.num_key_value_heads, config.head_dim, self.model.dtype)

    def _is_quicker(self, backbone: bool, heads: Sequence[int], tokens: int) -> bool:
        """Whether the kernels multiply so many tokens in all of these layers at least as quickly as torch."""
        if self.model.dtype not in native.ACTIVATIONS:
            return False
        key = backbone, tuple(heads), tokens, self.model.dtype, torch.get_num_threads()
        if key not in self._quicker:
            layers = (layer for module in self._modules(backbone, heads) for layer in module.modules())
            self._quicker[key] = tokens > 0 and not any(
                products.quicker_dense(layer.kernel, tokens, self.model.dtype) is not None
                for layer in layers
                if isinstance(layer, SparseLinear)
            )
        return self._quicker[key]

    def _modules(self, backbone: bool, heads: Sequence[int]) -> list[nn.Module]:
        return _decoder_layers(self.model, heads)[0 if backbone else self.model.config.num_backbone_layers :]

    def _rotary(
        self, hidden: torch.Tensor, position_ids: torch.Tensor | None, cached: _Cached
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if position_ids is None:
            position_ids = torch.arange(cached.filled, cached.filled + hidden.shape[1])[None]
        return cast(Any, self.model.rotary_emb)(hidden.float(), position_ids)

    @torch.no_grad()
    def _run(
        self,
        backbone: bool,
        heads: Sequence[int],
        stems: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cached: _Cached,
    ) -> torch.Tensor:
        """Tokens through the backbone, some heads or both: [heads, batch, seq, hidden] in the model's dtype."""
        stems = stems.float().contiguous()
        batch, length = stems.shape[-3:-1]
        cosine, sine = (part.expand(batch, length, -1).float().contiguous() for part in rotary)
        # Held until the kernels are done: another thread may make another one.
        made = self._plan(backbone, heads, batch * length <= products.FEW_TOKENS)
        plan = made.plan
        out = torch.empty(plan.heads, batch, length, plan.hidden, dtype=torch.float32)
        layers = cached.layers
        for layer in layers:
            layer.reserve(cached.filled + length)
        capacity = max(layer.capacity for layer in layers)
        for layer in layers:
            if layer.capacity < capacity:
                layer.resize(capacity)
        pointers = ctypes.c_void_p * len(layers)
        tokens = _Tokens(
            batch,
            length,
            ctypes.cast(pointers(*(layer.buffers[0].data_ptr() for layer in layers)), ctypes.c_void_p),
            ctypes.cast(pointers(*(layer.buffers[1].data_ptr() for layer in layers)), ctypes.c_void_p),
            capacity,
            cached.filled,
            cached.starts.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            native.ACTIVATIONS[layers[0].keys.dtype],
        )
        native.kernels().nt_decode(
            ctypes.byref(plan), ctypes.byref(tokens), stems.data_ptr(), out.data_ptr(), torch.get_num_threads()
        )
        for layer in layers:
            layer.extend(cached.filled + length)
        return out.to(self.model.dtype)

    def _plan(self, backbone: bool, heads: Sequence[int], few: bool) -> _Made:
        """The plan of these layers, for one or two tokens or for more."""
        key = backbone, tuple(heads), few
        made = self._plans.get(key)
        if made is not None and made.sources.have_changed:
            # Others hold the weights as they were.
            self._plans, self._quicker, made = {}, {}, None
        if made is None:
            made = self._plans[key] = self._make_plan(backbone, heads, few)
        return made

    def _make_plan(self, backbone: bool, heads: Sequence[int], few: bool) -> _Made:
        config = self.model.config
        layers: list[Any] = self._modules(backbone, heads)
        # A backbone by itself is one stream without a final norm.
        final = [cast(Any, self.model.heads[m]).norm for m in heads]
        # Before anything is computed of them.
        sources = _Sources([*(module for layer in layers for module in layer.modules()), *final])
        matrices = [_matrices(layer) for layer in layers]
        if few:
            for names, own in itertools.product(_SAME_INPUT, matrices):
                products.arrange([own[name] for name in names], self.model.dtype)
        norms = [(_float_copy(layer.input_layernorm), _float_copy(layer.post_attention_layernorm)) for layer in layers]
        final_norms = [_float_copy(norm) for norm in final]
        plan = _Plan(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.num_backbone_layers if backbone else 0,
            max(len(final), 1),
            config.num_head_layers if heads else 0,
            (_Layer * len(layers))(*(_describe(*each) for each in zip(matrices, norms, strict=True))),
            (ctypes.c_void_p * max(len(final), 1))(*(norm.data_ptr() for norm in final_norms)),
            config.rms_norm_eps,
            config.head_dim**-0.5,
            self.model.dtype == torch.bfloat16,
        )
        return _Made(plan, [matrices, norms, final_norms], sources)


# The matrices of a layer that multiply the same input.
_SAME_INPUT = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))


def _matrices(layer: Any) -> dict[str, native.KernelMatrix]:
    """Those of a decoder layer, in the order of `_Layer`."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    return {name: module.kernel for name, module in modules.items()}


def _describe(matrices: dict[str, native.KernelMatrix], norms: Sequence[torch.Tensor]) -> _Layer:
    """A layer; what multiplies the same input goes by columns or by slices in all of its matrices or in none."""
    described = {name: native.Matrix.from_buffer_copy(matrix.structure) for name, matrix in matrices.items()}
    for names, way in itertools.product(_SAME_INPUT, ("places", "slices")):
        if not all(getattr(described[name], way) for name in names):
            for name in names:
                setattr(described[name], way, None)
    return _Layer(*described.values(), *(norm.data_ptr() for norm in norms))


def _float_copy(norm: Any) -> torch.Tensor:
    return cast(torch.Tensor, norm.weight.detach().to(torch.float32, copy=True).contiguous())


def _decoder_layers(model: Any, heads: Any) -> list[nn.Module]:
    return [*model.layers, *(layer for m in heads for layer in model.heads[m].layers)]


@dataclass(frozen=True)
class _Cached:
    """What the kernels need to know of a cache.

    Args:
        layers: Some of its layers; without a cache those of the tokens themselves, many of which share one layer that
            each decoder layer writes over.
        filled: How many tokens there are of each text.
        starts: int64 [batch], how many tokens of each text are padding, at the beginning.
    """

    layers: list[GrowingLayer]
    filled: int
    starts: torch.Tensor

    @classmethod
    def of(
        cls,
        cache: Cache | None,
        first: int,
        depth: int,
        shape: Sequence[int],
        padding_mask: object,
        empty: Callable[[int], GrowingLayer],
    ) -> _Cached | None:
        """`depth` layers of a dynamic cache, turned into growing ones, for `shape` [batch, seq] more tokens; None for
        another kind of cache or mask. `empty` makes a layer for a batch."""
        batch, length = shape
        few = batch * length <= FEW_TOKENS
        # A tile of many tokens holds those of one text: short ones leave it empty.
        if not few and length <= FEW_TOKENS:
            return None
        if cache is None:
            starts = _left_padding(padding_mask, batch, length)
            # Heads run side by side where tokens are few, and one after the other where they are many.
            own = [empty(batch) for _ in range(depth)] if few else [empty(batch)] * depth
            return None if starts is None else cls(own, 0, starts)
        if not isinstance(cache, DynamicCache):
            return None
        # Some caches make their layers as they are used.
        cache.layers += [DynamicLayer() for _ in range(first + depth - len(cache.layers))]
        slots = slice(first, first + depth)
        layers = cast(list[DynamicLayer], cache.layers[slots])
        filled = layers[0].get_seq_length() if layers else 0
        starts = _left_padding(padding_mask, batch, filled + length)
        if starts is None or not all(_may_grow(layer, batch, filled) for layer in layers):
            return None
        growing = [_grow(layer) if filled else empty(batch) for layer in layers]
        cache.layers[slots] = growing
        return cls(growing, filled, starts)


def _may_grow(layer: DynamicLayer, batch: int, filled: int) -> bool:
    if type(layer) not in (DynamicLayer, GrowingLayer) or layer.get_seq_length() != filled:
        return False
    keys = cast(torch.Tensor, layer.keys)
    return filled == 0 or (keys.shape[0] == batch and keys.dtype in native.ACTIVATIONS)


def _grow(layer: DynamicLayer) -> GrowingLayer:
    return layer if isinstance(layer, GrowingLayer) else GrowingLayer(layer)


def _left_padding(mask: object, batch: int, length: int) -> torch.Tensor | None:
    """How many of the `length` tokens of each text are padding, all at its beginning; None for any other mask."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, length):
        return None
    seen = mask != 0
    return (~seen).sum(1) if bool((seen[:, 1:] >= seen[:, :-1]).all()) else None
