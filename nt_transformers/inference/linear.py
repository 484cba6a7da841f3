# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Linear layers that store and multiply only the weights that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import nn

from . import native
from .matrix import SparseMatrix, Values
from .products import multiply, sparse_product


# Of the weight, in a checkpoint.
PARTS = ("bitmap", "values", "scales")


class SparseLinear(nn.Module):
    """`nn.Linear` for inference on CPUs, its weight a `SparseMatrix`.

    Sums in float32 and returns the dtype of its input. Matrices that are smaller without a bitmap (a density near
    1) are stored dense. `.to(dtype)` leaves the weight as it is stored. `torch.compile` takes the layer as one custom
    operator, once it has been prepared.

    Args:
        matrix: The weight, [out_features, in_features].
        bias: [out_features] or None.
        fast_decoding: See `compress`.
    """

    bitmap: torch.Tensor | None
    values: torch.Tensor
    scales: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, matrix: SparseMatrix, bias: nn.Parameter | None = None, *, fast_decoding: bool = True) -> None:
        super().__init__()
        self.fast_decoding = fast_decoding
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("bitmap", matrix.bitmap)
        self.register_buffer("values", matrix.values)
        self.register_buffer("scales", matrix.scales)
        self.register_parameter("bias", bias)
        self._kernel: native.KernelMatrix | None = None
        self._prepared = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, values: Values, *, fast_decoding: bool = True) -> Self:
        """The layer with the same weights in the type `values`; errors as for `SparseMatrix.from_dense`."""
        sparse = SparseMatrix.from_dense(linear.weight, values)
        dense = SparseMatrix.from_dense(linear.weight, values, sparse=False)
        smaller = min(sparse, dense, key=lambda matrix: matrix.nbytes)
        return cls(smaller, linear.bias, fast_decoding=fast_decoding)

    @property
    def matrix(self) -> SparseMatrix:
        """The weight."""
        return SparseMatrix(self.in_features, self.bitmap, self.values, self.scales)

    @property
    def kernel(self) -> native.KernelMatrix:
        """The weight as the kernels read it, which have to be available."""
        kernel = self.prepare()
        assert kernel is not None
        return kernel

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # What `.to()`, `.half()` and their like go through; the kernels point to the weight as it is.
        check_stays_on_cpu(fn)
        stored = {name: self._buffers[name] for name in PARTS}
        super()._apply(fn, recurse)
        for name, part in stored.items():
            if part is not None and cast(torch.Tensor, self._buffers[name]).dtype != part.dtype:
                self._buffers[name] = part
        if self._kernel is not None and self._kernel.state != native.state_of(self.parts()):
            self._forget_kernel()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_kernel()

    def _forget_kernel(self) -> None:
        self._kernel, self._prepared = None, False

    def parts(self) -> list[torch.Tensor]:
        """Of the weight: see `SparseMatrix`."""
        return [part for name in PARTS if (part := self._buffers[name]) is not None]

    def prepare(self) -> native.KernelMatrix | None:
        """Checks the weight and hands it to the kernels, once and after changes; done by itself before products.

        Compiled layers take changes in place only after it has been called.

        Returns:
            The weight as the kernels read it; None where there are none.

        Raises:
            ValueError: the parts of the weight do not belong together: the file was damaged.
        """
        kernel = self._kernel  # read once: other threads may prepare the layer as well
        if self._prepared and (kernel is None or kernel.state == native.state_of(self.parts())):
            return kernel
        if native.available():
            kernel = native.KernelMatrix(self.matrix, fast_decoding=self.fast_decoding)
        else:
            self.matrix.check()
        self._kernel, self._prepared = kernel, True
        return kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        flat = x.reshape(-1, self.in_features)
        flat = flat if flat.dtype in native.ACTIVATIONS else flat.float()
        if torch.compiler.is_compiling() or not _has_data(flat):
            index = None if self._kernel is None else self._kernel.index
            y = sparse_product(flat, self.out_features, self.values, self.bitmap, self.scales, index)
        else:
            kernel = self.prepare()
            # The kernels know no gradients.
            if kernel is None or (flat.requires_grad and torch.is_grad_enabled()):
                y = self.matrix.multiply(flat)
            else:
                y = multiply(kernel, flat)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weights, in the type that they are stored in (float32 for int8)."""
        weight = self.matrix.to_dense()
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.matrix.nonzeros}"


def check_stays_on_cpu(fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raises `ValueError` if `fn`, what `nn.Module._apply` takes, moves tensors to another device."""
    device = fn(torch.empty(0, dtype=torch.uint8)).device
    if device.type != "cpu":
        raise ValueError(f"{device}: compressed layers stay on the CPU; `dequantize()` the model before moving it.")


def _has_data(x: torch.Tensor) -> bool:
    """False for tensors of the meta device and for fake ones, which stand for others."""
    return type(x) in (torch.Tensor, nn.Parameter) and x.device.type == "cpu"
