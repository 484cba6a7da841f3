# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Products with compressed matrices: by whichever way measures quicker, and as an operator that can be compiled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import native
from .matrix import SparseMatrix


# One or two tokens wait for the weights to be read, of which the kernels read fewest; they may go by slices.
FEW_TOKENS = 2
# The most tokens that are timed; more behave like these.
MANY_TOKENS = 512
# How much quicker torch has to be, and slices: timing is not exact, and without them there is no second copy.
MARGIN, SLICED_MARGIN = 0.9, 0.95
# Bytes of weights that a cache of the last level hardly holds, and the most matrices that are copied to have them.
OUT_OF_CACHE = 1 << 25
MANY_COPIES = 64


def multiply(matrix: native.KernelMatrix, x: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, columns] times the transposed matrix: [tokens, rows], both float32 or both bfloat16.

    Either by the sparse kernels or by torch on a dense copy, which lives as long as the product. What is quicker is
    measured once in a process for each shape, density (to 0.1), types and number of tokens (to a power of 2).
    """
    if len(x) <= FEW_TOKENS and x.dtype not in matrix.arranged_for:
        arrange([matrix], x.dtype)
        matrix.arranged_for.add(x.dtype)
    dense = quicker_dense(matrix, len(x), x.dtype)
    return matrix.multiply(x) if dense is None else _multiply_dense(matrix, x, dense)


def quicker_dense(matrix: native.KernelMatrix, tokens: int, dtype: torch.dtype) -> torch.dtype | None:
    """The type in which torch multiplies so many tokens more quickly than the sparse kernels; None if in none."""
    if tokens <= FEW_TOKENS:
        return None
    tokens = min(1 << (tokens - 1).bit_length(), MANY_TOKENS)
    key = matrix.kind, tokens, dtype, torch.get_num_threads()
    if key not in _timed:
        # Of its own generator: what is sampled does not depend on what was measured before.
        x = torch.randn(tokens, matrix.structure.columns, generator=torch.Generator(), dtype=torch.float32).to(dtype)
        most = MARGIN * _seconds(lambda: matrix.multiply(x))
        # Some processors take ten times as long in bfloat16; float32 takes twice the memory.
        types = dict.fromkeys((dtype if matrix.fits_bfloat16 else torch.float32, torch.float32))
        quicker = (each for each in types if _seconds(functools.partial(_multiply_dense, matrix, x, each)) < most)
        _timed[key] = next(quicker, None)
    return _timed[key]


def arrange(matrices: Sequence[native.KernelMatrix], dtype: torch.dtype) -> None:
    """Has matrices that multiply the same one or two tokens of this type do so as measures quickest for all of them.

    By slices; by the columns of the weights, where few exist; or by the bitmap alone. See `KernelMatrix.slice` and
    `list_columns`: both take memory besides.
    """
    if dtype == torch.bfloat16 and all(matrix.may_slice for matrix in matrices) and quicker_sliced(matrices):
        for matrix in matrices:
            matrix.slice()
    elif all(matrix.may_list_columns for matrix in matrices):
        for matrix in matrices:
            matrix.list_columns()


def quicker_sliced(matrices: Sequence[native.KernelMatrix]) -> bool:
    """Whether slices make the products of these matrices with a bfloat16 token enough quicker, all in all."""
    usual, sliced = map(sum, zip(*map(_seconds_of_one_token, matrices), strict=True))
    return sliced < SLICED_MARGIN * usual


def _seconds_of_one_token(matrix: native.KernelMatrix) -> tuple[float, float]:
    """Of a product with a bfloat16 token, without slices and with them.

    Measured once in a process for each shape, density (to 0.1) and type, on copies that no cache holds.
    """
    key = matrix.kind, torch.get_num_threads()
    if key not in _timed_sliced:
        x = torch.zeros(1, matrix.structure.columns, dtype=torch.bfloat16)
        count = max(1, min(OUT_OF_CACHE // matrix.nbytes, MANY_COPIES))

        def seconds(original: native.KernelMatrix) -> float:
            copies = [original, *(original.clone() for _ in range(count - 1))]
            return _seconds(lambda: [each.multiply(x) for each in copies]) / count

        copied = matrix.without_extra()
        if copied.may_list_columns:
            copied.list_columns()
        usual = seconds(copied)
        copied.slice()
        _timed_sliced[key] = usual, seconds(copied)
    return _timed_sliced[key]


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
    if index is None:
        return matrix.multiply(x)
    # What is kept besides would be made anew for every product.
    return multiply(native.KernelMatrix(matrix, index, fast_decoding=False), x)


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


def _multiply_dense(matrix: native.KernelMatrix, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `multiply`, by torch in float32 or, if that holds the unscaled values, in bfloat16."""
    y = torch.nn.functional.linear(x.to(dtype), matrix.unscaled(dtype))
    return (y if matrix.scales is None else y.float().mul_(matrix.scales)).to(x.dtype)


# In which type torch is quicker, by kind of matrix, number of tokens, their type and number of threads.
_timed: dict[tuple[native.Kind, int, torch.dtype, int], torch.dtype | None] = {}
# What `_seconds_of_one_token` measured, by kind of matrix and number of threads.
_timed_sliced: dict[tuple[native.Kind, int], tuple[float, float]] = {}


def _seconds(function: Callable[[], object], repeats: int = 2) -> float:
    """The shortest of a few calls, after one to warm up."""
    function()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return min(durations)
