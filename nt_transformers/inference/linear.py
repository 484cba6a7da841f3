# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Linear layers that store and multiply only the weights that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from . import native
from .matrix import SparseMatrix, Values


# Tokens up to which the kernels win over torch at any density, and the density up to which they win at any number of
# tokens (benchmarks/sparse_linear.py).
FEW_TOKENS = 2
LOW_DENSITY = 0.5


class SparseLinear(nn.Module):
    """`nn.Linear` for inference on CPUs, its weight a `SparseMatrix`.

    Computes in float32 and returns the dtype of its input. Matrices that are smaller without a bitmap (a density near
    1) are stored dense.

    Args:
        matrix: The weight, [out_features, in_features].
        bias: [out_features] or None.
    """

    bitmap: torch.Tensor | None
    values: torch.Tensor
    scales: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, matrix: SparseMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("bitmap", matrix.bitmap)
        self.register_buffer("values", matrix.values)
        self.register_buffer("scales", matrix.scales)
        self.register_parameter("bias", bias)
        self._multiply: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._kernel: native.KernelMatrix | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, values: Values) -> Self:
        """The layer with the same weights in the type `values`; errors as for `SparseMatrix.from_dense`."""
        sparse = SparseMatrix.from_dense(linear.weight, values)
        dense = SparseMatrix.from_dense(linear.weight, values, sparse=False)
        return cls(min(sparse, dense, key=lambda matrix: matrix.nbytes), linear.bias)

    @property
    def matrix(self) -> SparseMatrix:
        """The weight."""
        return SparseMatrix(self.in_features, self.bitmap, self.values, self.scales)

    @property
    def kernel(self) -> native.KernelMatrix:
        """The weight as the kernels read it, which have to be available."""
        if self._kernel is None:
            self.prepare()
            assert self._kernel is not None
        return self._kernel

    def prepare(self) -> None:
        """Checks the weight and hands it to the kernels; done by itself before the first product.

        Raises:
            ValueError: the parts of the weight do not belong together: the file was damaged.
        """
        matrix = self.matrix
        density = matrix.nonzeros / (self.in_features * self.out_features)
        if not native.available():
            matrix.check()
            self._multiply = self._multiply_dense
            return
        kernel = self._kernel = native.KernelMatrix(matrix)
        few = FEW_TOKENS if density > LOW_DENSITY else None

        def multiply(x: torch.Tensor) -> torch.Tensor:
            return kernel.multiply(x) if few is None or len(x) <= few else self._multiply_dense(x)

        self._multiply = multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        flat = x.reshape(-1, self.in_features).float()
        if self._multiply is None:
            self.prepare()
            assert self._multiply is not None
        y = self._multiply(flat)
        if self.bias is not None:
            y += self.bias
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

    def _multiply_dense(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix.to_dense().float())
