# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Compressed models: linear layers replaced by sparse ones, saved and loaded like any other checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .decoding import Decoder
from .linear import PARTS, SparseLinear
from .matrix import DTYPES, SparseMatrix, Values, check_values


logger = logging.getLogger(__name__)

METHOD = "nt_sparse"


@register_quantization_config(METHOD)
class SparseWeightsConfig(QuantizationConfigMixin):
    """What `config.json` says of a compressed checkpoint, under `quantization_config`.

    Args:
        values: Type of the stored values: `bf16`, `fp16`, `fp32` or `int8` (with a scale for each row).
        fast_decoding: See `compress`.

    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(self, values: Values = "bf16", fast_decoding: bool = True, **_: Any) -> None:
        check_values(values)
        if not isinstance(fast_decoding, bool):
            raise ValueError(f"fast_decoding={fast_decoding!r}: choose true or false.")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.values = values
        self.fast_decoding = fast_decoding


@register_quantizer(METHOD)
class SparseWeightsQuantizer(HfQuantizer):
    """Lets `from_pretrained` read compressed checkpoints; `compress` makes them."""

    requires_calibration = True
    quantization_config: SparseWeightsConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not devices <= {None, "cpu", "auto", torch.device("cpu")}:
            raise ValueError(f"device_map={device_map!r}: compressed models run on the CPU; leave device_map out.")

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Weights stay what they are stored as, whatever type the model asks for.
        stored = any(name.rpartition(".")[2] in PARTS for name in converter.target_patterns)
        return None if stored else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        stored = _stored_tensors(kwargs["checkpoint_files"])
        dtype = DTYPES[self.quantization_config.values]
        outputs = {id(layer) for layer in _output_layers(model)}
        for name, linear in _linear_layers(model):
            parts = _parts(stored, name, model.base_model_prefix)
            if (values := parts["values"]) is not None:
                matrix = SparseMatrix(linear.in_features, parts["bitmap"], values, parts["scales"])
                _check_parts(name, linear, matrix, dtype)
                fast = self.quantization_config.fast_decoding
                model.set_submodule(name, SparseLinear(matrix, linear.bias, fast_decoding=fast))
            # Output layers may be tied, or new on a base model.
            elif parts["weight"] is None and (id(linear) not in outputs or any(p is not None for p in parts.values())):
                raise ValueError(f"{name}: it has no weight; the checkpoint is damaged, or of another model.")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in _sparse_layers(model):
            try:
                layer.prepare()
            except ValueError as error:
                raise ValueError(f"{name} of the compressed checkpoint is damaged: {error}") from error
        Decoder.install(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        # `dtype` is the configuration's, which need not be that of the model as it is.
        own = model.dtype
        for name, layer in _sparse_layers(model):
            model.set_submodule(name, layer.to_linear().to(own))
        Decoder.remove(model)
        return model


def compress(
    model: PreTrainedModel, values: Values = "bf16", *, output_layers: bool = True, fast_decoding: bool = True
) -> PreTrainedModel:
    """Replaces the linear layers of a model, in place, by sparse ones for inference on the CPU.

    Weights that are zero are neither stored nor read any more. `generate`, `pipeline`, `save_pretrained` and lm-eval
    go on as before; `model.dequantize()` goes back. All values but int8 keep a model of that type as it is.

    Args:
        model: A model on the CPU, sparse if there is to be a gain in size.
        values: Type of the stored weights.
        output_layers: Whether output layers are compressed as well. Those that share their weight with the embedding
            never are.
        fast_decoding: Whether weights may be kept a second time, from the first token that is decoded on, in an
            arrangement by which one token is multiplied more quickly: by slices, in bfloat16 models where they measure
            quicker (1.1 times the bytes of the compressed weights for bf16 at a density of 0.2, 1.4 times for int8),
            or by listed columns, where few weights exist.

    Raises:
        ValueError: unknown `values` or `fast_decoding`, a model that is not on the CPU, has no linear layers or is
            quantized already, or a weight that is not finite in the type.
    """
    config = SparseWeightsConfig(values, fast_decoding)
    if model.device.type != "cpu":
        raise ValueError(f"device {model.device}: compressed models run on the CPU; move the model there before.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized or compressed already: load the original checkpoint.")
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    left_out = set() if output_layers else {id(layer) for layer in _output_layers(model)}
    layers = [
        (name, linear)
        for name, linear in _linear_layers(model)
        if id(linear.weight) not in shared and id(linear) not in left_out
    ]
    if not layers:
        raise ValueError(f"model_type={model.config.model_type!r}: it has no linear layers that could be compressed.")
    compressed = [
        (name, SparseLinear.from_linear(linear, values, fast_decoding=fast_decoding)) for name, linear in layers
    ]
    for name, layer in compressed:
        model.set_submodule(name, layer.train(model.training))
    if all(layer.bitmap is None for _, layer in compressed):
        logger.warning("hardly a weight of the model is zero: compressing only stores them as %s.", values)
    _mark_as_compressed(model, SparseWeightsQuantizer(config))
    for _, layer in compressed:
        layer.prepare()
    Decoder.install(model)
    return model.requires_grad_(False)


def compressed_bytes(model: nn.Module) -> int:
    """Bytes that the compressed layers of a model take."""
    return sum(layer.matrix.nbytes for _, layer in _sparse_layers(model))


def _mark_as_compressed(model: Any, quantizer: SparseWeightsQuantizer) -> None:
    """Sets what `from_pretrained` sets on models that it loads with a quantizer."""
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = METHOD


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _sparse_layers(model: nn.Module) -> list[tuple[str, SparseLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def _output_layers(model: Any) -> list[nn.Module]:
    """The layers behind the network proper: of every head, or the one of a stock model."""
    if hasattr(model, "get_output_layers"):
        return list(model.get_output_layers())
    return [layer for layer in (model.get_output_embeddings(),) if layer is not None]


def _stored_tensors(files: list[str]) -> dict[str, torch.Tensor]:
    """Shape and dtype, on the meta device, of every tensor in the files."""
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    stored[name] = tensors.get_tensor(name).to("meta")
        except SafetensorError as error:
            raise ValueError(f"{file} of the compressed checkpoint is damaged: {error}") from error
    return stored


def _parts(stored: dict[str, torch.Tensor], name: str, prefix: str) -> dict[str, torch.Tensor | None]:
    """What the checkpoint has of a linear layer: a model may be the base of the one that was saved, or built on it."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    found = {part: [stored.get(f"{each}.{part}") for each in names] for part in (*PARTS, "weight")}
    return {part: next((tensor for tensor in tensors if tensor is not None), None) for part, tensors in found.items()}


def _check_parts(name: str, linear: nn.Linear, matrix: SparseMatrix, dtype: torch.dtype) -> None:
    if matrix.values.ndim != 1 or matrix.values.dtype != dtype:
        raise ValueError(
            f"{name}: values are {matrix.values.dtype} {list(matrix.values.shape)}, not a list of {dtype} as "
            "config.json says: the checkpoint is damaged."
        )
    rows = None if matrix.bitmap is None else len(matrix.bitmap)
    whole = linear.out_features * linear.in_features
    right_size = matrix.nonzeros == whole if rows is None else rows == linear.out_features
    if not right_size or matrix.nonzeros > whole:
        raise ValueError(
            f"{name}: {matrix.nonzeros} values and {rows} rows of bits do not make a matrix of {linear.out_features} "
            f"x {linear.in_features}: the checkpoint is damaged, or of another model."
        )
