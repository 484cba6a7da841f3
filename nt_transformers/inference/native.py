# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The compiled kernels: built on first use, kept in a cache, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from .matrix import SparseMatrix


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
# The flags that each instruction set needs, and the processor features that it asks for.
INSTRUCTION_SETS = {
    "avx512": (
        ("-march=x86-64-v4", *(f"-mavx512{part}" for part in ("vbmi", "vbmi2", "vpopcntdq", "bitalg", "vnni"))),
        {"avx512f", "avx512bw", "avx512vl", "avx512vbmi"}
        | {f"avx512_{part}" for part in ("vbmi2", "vpopcntdq", "bitalg", "vnni")},
    ),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma", "f16c"}),
    "portable": ((), set()),
}
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}


class Matrix(ctypes.Structure):
    """`NtMatrix` of the kernels."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bitmap", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("type", ctypes.c_int32),
    )


class KernelMatrix:
    """A `SparseMatrix` as the kernels read it; keeps the memory that it points to.

    Raises:
        ValueError: the parts of the matrix do not belong together.
    """

    def __init__(self, matrix: SparseMatrix) -> None:
        matrix.check()
        counts = matrix.row_counts()
        bitmap = None if matrix.bitmap is None else matrix.bitmap.contiguous()
        starts = counts.cumsum(0) - counts
        sums = None if matrix.scales is None else _row_sums(matrix.values, starts, counts)
        self.memory = (bitmap, matrix.values.contiguous(), starts, matrix.scales, sums)
        pointers = (None if part is None else part.data_ptr() for part in self.memory)
        self.structure = Matrix(*matrix.shape, *pointers, _TYPES[matrix.values.dtype])
        self._kernels = kernels()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, columns] times the transposed matrix: [tokens, rows], both float32."""
        assert x.dtype == torch.float32
        assert x.shape[1] == self.structure.columns
        x = x.contiguous()
        y = torch.empty(len(x), self.structure.rows)
        self._kernels.nt_multiply(self.structure, x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads())
        return y


def available() -> bool:
    """Whether the kernels run here; if not, the reason is logged once."""
    try:
        kernels()
    except OSError as error:
        _warn_once(str(error))
        return False
    return True


def instruction_set() -> str:
    """The best instruction set of this processor; `NT_TRANSFORMERS_INSTRUCTION_SET` chooses another."""
    if chosen := os.environ.get("NT_TRANSFORMERS_INSTRUCTION_SET"):
        if chosen not in INSTRUCTION_SETS:
            raise ValueError(f"NT_TRANSFORMERS_INSTRUCTION_SET={chosen!r}: choose from {', '.join(INSTRUCTION_SETS)}.")
        return chosen
    features = _processor_features()
    return next(name for name, (_, needed) in INSTRUCTION_SETS.items() if needed <= features)


def build(name: str, output: Path) -> None:
    """Compiles the kernels for an instruction set.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler (g++, clang++ or $CXX) was found")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        built = Path(scratch) / output.name
        command = [compiler, *FLAGS, *INSTRUCTION_SETS[name][0], str(SOURCES / "kernels.cpp"), "-o", str(built)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise OSError(f"{' '.join(command)} failed:\n{run.stderr.strip()[-2000:]}")
        # Whole or not at all, also if several processes compile at the same time.
        built.replace(output)


def kernels() -> ctypes.CDLL:
    """The compiled kernels for this processor, compiled now if they never were.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    return _load(instruction_set())


@functools.cache
def _load(name: str) -> ctypes.CDLL:
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    digest = hashlib.sha256(sources + repr((FLAGS, INSTRUCTION_SETS[name][0])).encode()).hexdigest()
    path = _cache_folder() / f"kernels-{name}-{platform.machine()}-{digest[:16]}.so"
    if not path.exists():
        build(name, path)
    library = ctypes.CDLL(str(path))
    pointer, integer, choice = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.nt_multiply.argtypes = (ctypes.POINTER(Matrix), pointer, pointer, integer, choice)
    buffers = (pointer, pointer, pointer)
    library.nt_decode.argtypes = (pointer, *buffers, choice, integer, integer, *buffers, choice)
    library.nt_multiply.restype = library.nt_decode.restype = None
    return library


def _row_sums(values: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    totals = torch.cat([torch.zeros(1, dtype=torch.int64), values.cumsum(0, dtype=torch.int64)])
    return (totals[starts + counts] - totals[starts]).int()


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nt_transformers"


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse kernels are not available, torch multiplies dense matrices instead: %s", reason)


def _processor_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
