# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Products with compressed matrices: by whichever way measures quicker, and as an operator that can be compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import native
from .matrix import SparseMatrix


# One or two tokens wait for the weights to be read, of which the kernels read fewest.
FEW_TOKENS = 2
# The most tokens that are timed; more behave like these.
MANY_TOKENS = 512
# How much quicker torch has to be: the kernels' own timing is not exact, and they need no dense copy.
MARGIN = 0.9


def multiply(matrix: native.KernelMatrix, x: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, columns] times the transposed matrix: [tokens, rows], both float32 or both bfloat16.

    Either by the sparse kernels or by torch on a dense copy, which lives as long as the product. What is quicker is
    measured once in a process for each shape, density (to 0.1), types and number of tokens (to a power of 2).
    """
    return _multiply_dense(matrix, x) if quicker_dense(matrix, len(x), x.dtype) else matrix.multiply(x)


def quicker_dense(matrix: native.KernelMatrix, tokens: int, dtype: torch.dtype) -> bool:
    """Whether torch multiplies so many tokens of this type more quickly than the sparse kernels."""
    if tokens <= FEW_TOKENS:
        return False
    tokens = min(1 << (tokens - 1).bit_length(), MANY_TOKENS)
    key = matrix.kind, tokens, dtype, torch.get_num_threads()
    if key not in _timed:
        # Of its own generator: what is sampled does not depend on what was measured before.
        x = torch.randn(tokens, matrix.structure.columns, generator=torch.Generator(), dtype=torch.float32).to(dtype)
        sparse = _seconds(lambda: matrix.multiply(x))
        _timed[key] = _seconds(lambda: _multiply_dense(matrix, x)) < MARGIN * sparse
    return _timed[key]


@torch.library.custom_op("nt_transformers::sparse_product", mutates_args=(), device_types="cpu")
def sparse_product(
    x: torch.Tensor,
    rows: int,
    values: torch.Tensor,
    bitmap: torch.Tensor | None,
    scales: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """As `multiply`, for `torch.compile`: the parts of a `SparseMatrix` and what `KernelMatrix` adds to them.

    Args:
        x: float32 or bfloat16 [tokens, columns].
        rows: Of the matrix.
        values: See `SparseMatrix`, as for `bitmap` and `scales`.
        index: `KernelMatrix.index`, or None where there are no kernels.
    """
    matrix = SparseMatrix(x.shape[1], bitmap, values, scales)
    return matrix.multiply(x) if index is None else multiply(native.KernelMatrix(matrix, index), x)


@sparse_product.register_fake
def _(
    x: torch.Tensor,
    rows: int,
    values: torch.Tensor,
    bitmap: torch.Tensor | None,
    scales: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("nt_transformers::sparse_product_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: torch.Tensor,
    columns: int,
    values: torch.Tensor,
    bitmap: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of x [tokens, columns], from that of the product [tokens, rows]."""
    weight = SparseMatrix(columns, bitmap, values, scales).to_dense().float()
    return (gradient.float() @ weight).to(gradient.dtype)


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    columns: int,
    values: torch.Tensor,
    bitmap: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    return gradient.new_empty(gradient.shape[0], columns)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, *parts, _ = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(*parts)


sparse_product.register_autograd(
    lambda ctx, gradient: (_backward(gradient, ctx.columns, *ctx.saved_tensors), *[None] * 5),
    setup_context=_keep_weight,
)


def _multiply_dense(matrix: native.KernelMatrix, x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.bfloat16 and matrix.fits_bfloat16:
        y = torch.nn.functional.linear(x, matrix.unscaled(torch.bfloat16))
        return y if matrix.scales is None else y.float().mul_(matrix.scales).to(x.dtype)
    return torch.nn.functional.linear(x.float(), matrix.to_dense()).to(x.dtype)


# Whether torch is quicker, by kind of matrix, number of tokens, their type and number of threads.
_timed: dict[tuple[native.Kind, int, torch.dtype, int], bool] = {}


def _seconds(function: Callable[[], object], repeats: int = 2) -> float:
    """The shortest of a few calls, after one to warm up."""
    function()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return min(durations)
