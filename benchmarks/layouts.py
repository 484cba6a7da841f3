# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Products of one bfloat16 token with sparse matrices: by the bitmap, by the columns of the values and by slices.

    python benchmarks/layouts.py [--quick] [--json FILE]

    bitmap_over_columns_<density>_<values> = time by the bitmap / time by the columns
    bitmap_over_slices_<density>_<values>  = time by the bitmap / time by slices

64 matrices of 2736 x 1024 one after the other, as many weights as do not fit a cache. The kernels go by slices where
those measure quicker, otherwise by the columns below `nt_transformers.inference.native.places_below`.
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved

from nt_transformers.inference import native
from nt_transformers.inference.matrix import SparseMatrix, Values


ROWS, COLUMNS, MATRICES = 2736, 1024, 64
DENSITIES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.3, 0.5)
VALUES: tuple[Values, ...] = ("bf16", "int8")


def products(
    matrices: list[SparseMatrix], way: Callable[[native.KernelMatrix], None] | None = None
) -> Callable[[], object]:
    """A function that multiplies a token with each of the matrices: the usual way, by their columns or by slices."""
    kernels = [native.KernelMatrix(matrix) for matrix in matrices]
    for kernel in kernels:
        if way:
            way(kernel)
    x = torch.randn(1, COLUMNS).bfloat16()
    return lambda: [kernel.multiply(x) for kernel in kernels]


def main() -> None:
    """Time all three for every density and type, in turn, and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    native.places_below = lambda values: 1  # any density may go by the columns
    figures = {}
    for values in VALUES:
        for density in DENSITIES:
            weights = [torch.randn(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS) < density) for _ in range(MATRICES)]
            matrices = [SparseMatrix.from_dense(weight, values) for weight in weights]
            ways = {
                "bitmap": products(matrices),
                "columns": products(matrices, native.KernelMatrix.list_columns),
                "slices": products(matrices, native.KernelMatrix.slice),
            }
            seconds = time_interleaved(ways, rounds=5 if args.quick else 31)
            for way in ("columns", "slices"):
                figures[f"bitmap_over_{way}_{density}_{values}"] = seconds["bitmap"] / seconds[way]
    report(figures, args)


if __name__ == "__main__":
    main()
