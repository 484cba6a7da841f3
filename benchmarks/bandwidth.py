# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The machine's read bandwidth, by a loop that adds up a large buffer on all threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch


SOURCE = """
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


def read_bandwidth(threads: int, size: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes per second, the best of `rounds` readings of `size` bytes."""
    data = torch.ones(size // 8 + 1024, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(SOURCE)
        flags = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.restype = ctypes.c_int64
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        total = read_all(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(size // 8), threads)
        durations.append(time.perf_counter() - start)
        assert total == size // 8
    return size / min(durations)
