# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Sparse matrices as a bitmap and the packed values of the weights that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch


Values = Literal["bf16", "fp16", "fp32", "int8"]

DTYPES: dict[Values, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
}
# Columns of one word of the bitmap.
WORD = 32
# The kernels load whole registers, and so up to this many bytes behind the last value.
READ_AHEAD = 64


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix [rows, columns] of which only some weights exist.

    Args:
        columns: Number of columns.
        bitmap: uint8 [rows, 4 * ceil(columns / 32)], one bit for each weight in little-endian order, 1 where the
            weight exists; None for a dense matrix, where all do.
        values: Of the existing weights, row by row, in bfloat16, float16, float32 or int8, and `READ_AHEAD` bytes of
            zeros behind them, which the kernels may load.
        scales: bfloat16 [rows], what the values of each row are multiplied by; int8 only.
    """

    columns: int
    bitmap: torch.Tensor | None
    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def from_dense(cls, weight: torch.Tensor, values: Values, *, sparse: bool = True) -> SparseMatrix:
        """Packs the non-zero weights of a matrix (all of them where `sparse` is false).

        int8 values are whole multiples of a step, a 127th of the largest magnitude in their row, which is rounded to
        bfloat16; the others are converted.

        Raises:
            ValueError: unknown `values`, or a weight that is not finite in that type.
        """
        check_values(values)
        assert weight.ndim == 2
        weight = weight.detach().cpu()
        scales = None
        if values == "int8":
            steps = weight.float().abs().amax(1) / 127
            scales = steps.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
            # Below 127.5, however the step was rounded.
            converted = (weight.float() / scales[:, None]).round().to(torch.int8)
        else:
            converted = weight.to(DTYPES[values])
        if not (converted if scales is None else scales).isfinite().all():
            raise ValueError(f"values={values!r}: a weight is not finite in this type; choose another, or repair it.")
        exists = weight != 0
        kept = converted[exists] if sparse else converted.flatten()
        kept = torch.cat([kept, kept.new_zeros(READ_AHEAD // kept.itemsize)])
        return cls(weight.shape[1], _pack_bits(exists) if sparse else None, kept, scales)

    @property
    def nonzeros(self) -> int:
        """How many values are stored."""
        return len(self.values) - READ_AHEAD // self.values.itemsize

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.nonzeros // self.columns if self.bitmap is None else len(self.bitmap), self.columns

    def parts(self) -> list[torch.Tensor]:
        """Bitmap, values and scales, as far as there are."""
        return [part for part in (self.bitmap, self.values, self.scales) if part is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts())

    def row_counts(self) -> torch.Tensor:
        """int64 [rows], how many weights of each row exist."""
        if self.bitmap is None:
            return torch.full((self.shape[0],), self.columns)
        return torch.from_numpy(np.bitwise_count(self.bitmap.numpy().view("<u4")).sum(1, dtype=np.int64))

    def to_dense(self) -> torch.Tensor:
        """The whole matrix in the type of the values; float32 where those are scaled."""
        if self.bitmap is None:
            dense = self.values[: self.nonzeros].view(self.shape)
        else:
            exists = np.unpackbits(self.bitmap.numpy(), axis=1, count=self.columns, bitorder="little")
            dense = torch.zeros(self.shape, dtype=self.values.dtype)
            dense[torch.from_numpy(exists).view(torch.bool)] = self.values[: self.nonzeros]
        return dense if self.scales is None else dense * self.scales.float()[:, None]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, columns] times the transposed matrix in torch: [tokens, rows], of the same type."""
        return torch.nn.functional.linear(x.float(), self.to_dense().float()).to(x.dtype)

    def check(self) -> torch.Tensor:
        """`row_counts`; raises `ValueError` unless the parts belong together, which the kernels trust."""
        if self.values.ndim != 1 or self.values.dtype not in DTYPES.values() or self.nonzeros < 0:
            raise ValueError(f"values: {self.values.dtype} {list(self.values.shape)} is no list of values")
        if self.bitmap is not None:
            words = -(-self.columns // WORD)
            if self.bitmap.dtype != torch.uint8 or self.bitmap.ndim != 2 or self.bitmap.shape[1] != 4 * words:
                raise ValueError(
                    f"bitmap: {self.bitmap.dtype} {list(self.bitmap.shape)} instead of uint8 [rows, {4 * words}]"
                )
            last_word = np.ascontiguousarray(self.bitmap[:, -4:].numpy()).view("<u4")
            if (last_word >> np.uint64((self.columns - 1) % WORD + 1)).any():
                raise ValueError(f"bitmap: bits beyond the {self.columns} columns are set")
        counts = self.row_counts()
        if self.nonzeros != (expected := int(counts.sum())):
            raise ValueError(f"values: there are {self.nonzeros} of {expected} weights")
        if (self.scales is None) == (self.values.dtype == torch.int8):
            raise ValueError("scales: int8 values have one a row, others have none")
        if self.scales is not None and self.scales.dtype == torch.float32:
            raise ValueError("scales: of an earlier version, in float32; compress the original model again")
        if self.scales is not None and (self.scales.shape != self.shape[:1] or self.scales.dtype != torch.bfloat16):
            raise ValueError(f"scales: {self.scales.dtype} {list(self.scales.shape)}, not bfloat16 [{self.shape[0]}]")
        if self.scales is not None and not self.scales.isfinite().all():
            raise ValueError("scales: some are not finite")
        return counts


def check_values(values: str) -> None:
    """Raises `ValueError` unless `values` is one of `Values`."""
    if not isinstance(values, str) or values not in DTYPES:
        raise ValueError(f"values={values!r}: choose from {', '.join(get_args(Values))}.")


def _pack_bits(exists: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(exists, (0, -exists.shape[1] % WORD))
    return torch.from_numpy(np.packbits(padded.numpy(), axis=1, bitorder="little"))
