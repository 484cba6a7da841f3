# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Parameters and FLOPs of any network, layer by layer, with and without the weights that a topology removes.

Notable:
- Nothing is computed: the network runs on tensors without data, so it may live on the meta device. What runs several
  times counts several times, whatever the structure.
- The conventions are those of torch's `FlopCounterMode`: a multiply-add is two operations; only matrix products,
  convolutions and attention count; causal attention counts as full attention.
- Sparse FLOPs are what hardware without overhead would need: every active weight is one multiply-add at each position.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class LayerCost:
    """A parameter with the products it takes part in, or a module's products of activations (attention).

    Args:
        name: Of the parameter, or of the module.
        parameters: Weights stored; 0 for products of activations.
        active: Weights that exist.
        dense_forward: FLOPs per item of the forward pass if all weights existed.
        dense_input_gradient: The same for the gradient of the activations.
        dense_weight_gradient: The same for the gradient of the weights.
    """

    name: str
    parameters: int
    active: int
    dense_forward: float
    dense_input_gradient: float
    dense_weight_gradient: float

    @property
    def density(self) -> float:
        """Share of weights that exist; 1 where there are none."""
        return self.active / self.parameters if self.parameters else 1.0

    @property
    def dense_training(self) -> float:
        """FLOPs per item of forward and backward pass if all weights existed."""
        return self.dense_forward + self.dense_input_gradient + self.dense_weight_gradient

    @property
    def forward(self) -> float:
        """FLOPs per item of the forward pass."""
        return self.density * self.dense_forward

    def training(self, dense_gradient_interval: float | None = None) -> float:
        """FLOPs per item of forward and backward pass.

        Args:
            dense_gradient_interval: Steps from one topology update to the next, for growth by gradient: at each update
                the gradient of removed weights is computed as well (Evci et al., 2020, appendix on FLOPs); see
                `SparsityConfig.dense_gradient_interval`.
        """
        extra = (1 - self.density) * self.dense_weight_gradient
        return self.density * self.dense_training + (extra / dense_gradient_interval if dense_gradient_interval else 0)


@dataclass(frozen=True)
class ModelCost:
    """What a network costs per item (token, image): the sum of its layers."""

    layers: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """Weights stored."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Weights that exist."""
        return sum(layer.active for layer in self.layers)

    @property
    def dense_forward(self) -> float:
        """See `LayerCost.dense_forward`."""
        return sum(layer.dense_forward for layer in self.layers)

    @property
    def dense_training(self) -> float:
        """See `LayerCost.dense_training`."""
        return sum(layer.dense_training for layer in self.layers)

    @property
    def forward(self) -> float:
        """See `LayerCost.forward`."""
        return sum(layer.forward for layer in self.layers)

    def training(self, dense_gradient_interval: float | None = None) -> float:
        """See `LayerCost.training`."""
        return sum(layer.training(dense_gradient_interval) for layer in self.layers)


def language_model_cost(
    model: nn.Module, sequence_length: int, nonzeros: Mapping[str, int] | None = None
) -> ModelCost:
    """Cost per token of a causal language model on sequences of `sequence_length` tokens; see `count_cost`."""
    inputs = {"input_ids": torch.zeros(1, sequence_length, dtype=torch.long), "use_cache": False}
    return count_cost(model, inputs, items=sequence_length, nonzeros=nonzeros)


def image_model_cost(
    model: nn.Module, image_size: int | tuple[int, int], channels: int = 3, nonzeros: Mapping[str, int] | None = None
) -> ModelCost:
    """Cost per image of a classifier that takes `pixel_values` [batch, channels, height, width]; see `count_cost`."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return count_cost(model, {"pixel_values": torch.zeros(1, channels, height, width)}, items=1, nonzeros=nonzeros)


def count_cost(
    model: nn.Module, inputs: Mapping[str, Any], items: int, nonzeros: Mapping[str, int] | None = None
) -> ModelCost:
    """Counts what one call `model(**inputs)` costs, without computing or changing anything.

    Args:
        model: Any module, on any device, meta included; heads that are not active cost nothing.
        inputs: The arguments; of tensors only shape and dtype matter.
        items: Tokens or images in `inputs`, by which FLOPs are divided.
        nonzeros: How many weights of a parameter exist, by name, as from `count_nonzeros` or `planned_nonzeros`;
            parameters that are not named are dense.

    Raises:
        ValueError: `nonzeros` names an unknown parameter or too many weights, or the network calls an operation that
            cannot be attributed to weights.
    """
    nonzeros = nonzeros or {}
    parameters = dict(model.named_parameters())
    for name, count in nonzeros.items():
        if name not in parameters or not 0 <= count <= parameters[name].numel():
            raise ValueError(
                f"nonzeros[{name!r}]={count}: the model has no parameter of that name with so many weights."
            )
    # Batch norm refuses a single value a channel in training.
    training = {module: module.training for module in model.modules()}
    try:
        flops = _trace(model.eval(), inputs)
    finally:
        for module, was in training.items():
            module.training = was
    names = [*parameters, *(name for name in flops if name not in parameters)]
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    return ModelCost(
        tuple(
            LayerCost(
                name,
                sizes.get(name, 0),
                nonzeros.get(name, sizes.get(name, 0)),
                *(count / items for count in flops.get(name, (0, 0, 0))),
            )
            for name in names
        )
    )


def count_nonzeros(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """Non-zeros by parameter name: of the matrices and kernels of a module, or of tensors such as `Sparsifier.masks`.

    A module's vectors are left out: biases start at zero and are none the less there.
    """
    if isinstance(weights, nn.Module):
        weights = {name: parameter for name, parameter in weights.named_parameters() if parameter.ndim > 1}
    return {name: int(tensor.count_nonzero()) for name, tensor in weights.items()}


def _trace(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """FLOPs of forward pass, input gradient and weight gradient by name of parameter or module."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _module_names(model) as stack:
        parameters = {
            name: nn.Parameter(_without_data(parameter), requires_grad=parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        buffers = {name: _without_data(buffer) for name, buffer in model.named_buffers()}
        arguments = {
            name: _without_data(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        with _Counter(parameters, stack) as counter:
            torch.func.functional_call(model, {**parameters, **buffers}, kwargs=arguments)
    return counter.flops


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(*_: Any, name: str = name) -> None:
            stack.append(name)

        def leave(*_: Any) -> None:
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchFunctionMode):
    """Sees every call of torch's functions and adds up the FLOPs of those that multiply."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], stack: list[str]) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.stack = stack
        self.flops: dict[str, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPAQUE:
            raise ValueError(
                f"{func.__name__}, called by {self.stack[-1]!r}: its FLOPs cannot be attributed to weights; write the "
                "layer with linear, conv, matmul or scaled_dot_product_attention."
            )
        output = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            _COUNTED[func](self, output, *args, **(kwargs or {}))
        return output

    def product(self, left: Tensor, right: Tensor, flops: int) -> None:
        """A product of two tensors, of which one may be a parameter or a view of one."""
        owners = [self._parameter(operand) for operand in (left, right)]
        owner = owners[0] or owners[1] or self.stack[-1]
        self.add(owner, 0, flops)
        for operand, parameter in zip((left, right), owners, strict=True):
            if operand.requires_grad:
                self.add(owner, 2 if parameter else 1, flops)

    def add(self, name: str, part: int, flops: int) -> None:
        self.flops.setdefault(name, [0, 0, 0])[part] += flops

    def _parameter(self, operand: Tensor) -> str | None:
        base = operand if operand._base is None else operand._base
        return self.names.get(id(base))


def _linear(counter: _Counter, output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    counter.product(input, weight, 2 * output.numel() * input.shape[-1])


def _convolution(counter: _Counter, output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    counter.product(input, weight, 2 * output.numel() * prod(weight.shape[1:]))


def _matmul(counter: _Counter, output: Tensor, left: Tensor, right: Tensor, **_: Any) -> None:
    counter.product(left, right, 2 * output.numel() * left.shape[-1])


def _add_matmul(counter: _Counter, output: Tensor, _: Tensor, left: Tensor, right: Tensor, **__: Any) -> None:
    _matmul(counter, output, left, right)


def _attention(
    counter: _Counter, output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> None:
    flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    counter.add(counter.stack[-1], 0, flops)
    if output.requires_grad:
        counter.add(counter.stack[-1], 1, 2 * flops)


_COUNTED: dict[Any, Callable[..., None]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _add_matmul),
    F.scaled_dot_product_attention: _attention,
}
_OPAQUE = {
    torch.einsum,
    F.multi_head_attention_forward,
    F.bilinear,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}
