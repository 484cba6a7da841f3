# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What reads memory: a loop that adds up a large buffer on all threads, and products with sparse matrices."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nt_transformers.inference import SparseLinear, native
from nt_transformers.inference.build import FLAGS, INSTRUCTION_SETS, SOURCES


READ_BYTES = 1 << 29
READ = """
#include <cstdint>
#include <omp.h>
extern "C" int64_t read_all(const int64_t* data, int64_t size, int threads) {
  int64_t total = 0;
#pragma omp parallel for reduction(+ : total) num_threads(threads) schedule(static)
  for (int64_t block = 0; block < size; block += 64) {
    for (int64_t line = 0; line < 64; line += 8) __builtin_prefetch(data + block + 512 + line);
    for (int64_t i = block; i < block + 64; ++i) total += data[i];
  }
  return total;
}
"""

# The products of a token with matrices of two widths, in one parallel region, as decoding computes them.
MULTIPLY = """
#include "kernels.cpp"
extern "C" float multiply_all(const NtMatrix* const* matrices, int64_t count, int threads) {
  const std::vector<float> x(1 << 16, 1.0f);
  omp_set_num_threads(threads);
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = std::max(widest, matrices[i]->columns);
  Input input(widest, 1);
  float total = 0;
  const auto differ = [](const NtMatrix& a, const NtMatrix& b) {
    return a.columns != b.columns || !a.slices != !b.slices || !a.places != !b.places;
  };
#pragma omp parallel reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || differ(*matrices[i], *matrices[i - 1])) {
#pragma omp barrier
#pragma omp single
      input.set<BFloat16>(*matrices[i], 1, 0, x.data());
    }
    each_row<BFloat16>(*matrices[i], input, 0, 1, [&](int64_t, int64_t, float value) { total += value; });
  }
  return total;
}
"""


@functools.cache
def _compile(source: str, *flags: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder) / "code.cpp", Path(folder) / "code.so"
        code.write_text(source)
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(code), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def reading(threads: int) -> Callable[[], None]:
    """A function that reads `READ_BYTES` once."""
    data = torch.ones(READ_BYTES // 8 + 1024, dtype=torch.int64)
    read_all = _compile(READ, "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared").read_all
    read_all.restype = ctypes.c_int64

    def read() -> None:
        total = read_all(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(READ_BYTES // 8), threads)
        assert total == READ_BYTES // 8

    return read


def multiplying(layers: Sequence[SparseLinear], threads: int) -> Callable[[], None]:
    """A function that multiplies a token of a bfloat16 model with layers one after the other."""
    flags = (*FLAGS, *INSTRUCTION_SETS[native.instruction_set()][0], "-I", str(SOURCES))
    multiply_all = _compile(MULTIPLY, *flags).multiply_all
    pointers = (ctypes.POINTER(native.Matrix) * len(layers))(
        *(ctypes.pointer(layer.kernel.structure) for layer in layers)
    )
    return lambda: multiply_all(pointers, ctypes.c_int64(len(layers)), threads)
