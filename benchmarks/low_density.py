# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Products of one token with matrices of few weights: by the bitmap, and by the columns of the values.

    python benchmarks/low_density.py [--quick] [--json FILE]

    bitmap_over_columns_<density>_<values> = time by the bitmap / time by the columns

64 matrices of 2736 x 1024 one after the other, as many weights as do not fit a cache. The kernels go by the columns
below `nt_transformers.inference.native.places_below`.
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved

from nt_transformers.inference import native
from nt_transformers.inference.matrix import SparseMatrix, Values


ROWS, COLUMNS, MATRICES = 2736, 1024, 64
DENSITIES = (0.02, 0.04, 0.06, 0.08, 0.1)
VALUES: tuple[Values, ...] = ("bf16", "int8")


def products(matrices: list[SparseMatrix], below: float) -> Callable[[], object]:
    """A function that multiplies a token with each of the matrices, by the columns below this density."""
    native.places_below = lambda values: below
    kernels = [native.KernelMatrix(matrix) for matrix in matrices]
    x = torch.randn(1, COLUMNS).bfloat16()
    return lambda: [kernel.multiply(x) for kernel in kernels]


def main() -> None:
    """Time both for every density and type, in turn, and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    figures = {}
    for values in VALUES:
        for density in DENSITIES:
            weights = [torch.randn(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS) < density) for _ in range(MATRICES)]
            matrices = [SparseMatrix.from_dense(weight, values) for weight in weights]
            seconds = time_interleaved(
                {"bitmap": products(matrices, 0), "columns": products(matrices, 1)}, rounds=5 if args.quick else 31
            )
            figures[f"bitmap_over_columns_{density}_{values}"] = seconds["bitmap"] / seconds["columns"]
    report(figures, args)


if __name__ == "__main__":
    main()
