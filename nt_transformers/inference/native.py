# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The compiled kernels: of the wheel, or built on first use and kept in a cache; called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .build import INSTRUCTION_SETS, build, library_name
from .matrix import SparseMatrix


logger = logging.getLogger(__name__)

# Where wheels hold kernels that were compiled beforehand.
PREBUILT = Path(__file__).with_name("prebuilt")
# The fewest rows that are sliced together.
_CHUNK = 16
_ARRANGING = threading.Lock()
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
# The types that activations and key-value caches may have.
ACTIVATIONS = {torch.bfloat16: 0, torch.float32: 2}


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
        ("places", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("slice_starts", ctypes.c_void_p),
        ("slice_chunks", ctypes.c_int64),
        ("slice_bits", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


# Below these densities a product with one token goes by the columns of the values, two bytes each, not by the bitmap:
# with AVX-512, which expands bits by itself, and without. docs/inference.md shows the times.
PLACES_BELOW_AVX512 = {torch.bfloat16: 0.05, torch.float16: 0.08, torch.float32: 0.08, torch.int8: 0.02}
PLACES_BELOW = 0.1

# Rows, columns, density to a tenth, type of the values, whether there is a bitmap: what the time of a product is
# made of.
Kind = tuple[int, int, int, int, bool]


class KernelMatrix:
    """A `SparseMatrix` as the kernels read it; keeps the memory that it points to, the `values` themselves included.

    Args:
        matrix: The matrix.
        index: int64 [1, rows + 1], where in the values each row begins and the last one ends, and for int8
            [2, rows + 1], also the sum of each row's values; computed unless given.
        fast_decoding: Whether more than the matrix may be kept, for products with one or two tokens.

    Attributes:
        state: `state_of` the matrix's parts, as they were then.
        arranged_for: Types of activations for which it was decided how one or two tokens are multiplied.

    Raises:
        ValueError: the parts of the matrix do not belong together (checked unless `index` is given).
    """

    def __init__(self, matrix: SparseMatrix, index: torch.Tensor | None = None, *, fast_decoding: bool = True) -> None:
        # Before anything is computed of them.
        self.state = state_of(matrix.parts())
        self._matrix = matrix
        self._kernels = kernels()
        self.fast_decoding = fast_decoding
        # Other tensors than those of the layer, which may be given other memory.
        self.values = matrix.values.detach().contiguous()
        self.index = self._build_index(matrix.check()) if index is None else index
        bitmap = None if matrix.bitmap is None else matrix.bitmap.detach().contiguous()
        scales = None if matrix.scales is None else matrix.scales.float()
        sums = self.index[1] if len(self.index) > 1 else None
        self._memory = (bitmap, self.values, self.index[0], scales, sums)
        # What is kept besides, by its name in `structure`.
        self._extra: dict[str, torch.Tensor] = {}
        self.arranged_for: set[torch.dtype] = set()
        pointers = (None if part is None else part.data_ptr() for part in self._memory)
        self.structure = Matrix(*matrix.shape, *pointers, None, None, None, 0, 0, _TYPES[matrix.values.dtype])

    def _build_index(self, counts: torch.Tensor) -> torch.Tensor:
        """What `index` is, from the number of values in each row."""
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if self.values.dtype != torch.int8:
            return bounds[None]
        index = torch.stack([bounds, torch.zeros_like(bounds)])
        self._kernels.nt_sum_rows(self.values.data_ptr(), bounds.data_ptr(), len(counts), index[1].data_ptr())
        return index

    def __reduce__(self) -> tuple[Callable[..., KernelMatrix], tuple[SparseMatrix]]:
        # Copies point to memory of their own.
        return functools.partial(KernelMatrix, fast_decoding=self.fast_decoding), (self._matrix,)

    def clone(self) -> KernelMatrix:
        """With memory of its own for what products read."""
        bitmap = None if self._matrix.bitmap is None else self._matrix.bitmap.clone()
        matrix = replace(self._matrix, bitmap=bitmap, values=self.values.clone())
        clone = KernelMatrix(matrix, self.index, fast_decoding=self.fast_decoding)
        clone._keep(self.structure, **{name: part.clone() for name, part in self._extra.items()})
        return clone

    def without_extra(self) -> KernelMatrix:
        """The same matrix, in the same memory, without what is kept besides."""
        return KernelMatrix(self._matrix, self.index, fast_decoding=self.fast_decoding)

    def _keep(self, layout: Matrix, **extra: torch.Tensor) -> None:
        """Keeps more than the matrix, slices as `layout` describes them."""
        # Never in place, and nothing is ever freed: plans, and products in other threads, point to it.
        structure = Matrix.from_buffer_copy(self.structure)
        structure.slice_chunks, structure.slice_bits = layout.slice_chunks, layout.slice_bits
        for name, part in extra.items():
            setattr(structure, name, part.data_ptr())
        self._extra = self._extra | extra
        self.structure = structure

    @property
    def may_slice(self) -> bool:
        """Whether one or two bfloat16 tokens may be multiplied by slices."""
        return self.fast_decoding and self._matrix.bitmap is not None and self.fits_bfloat16

    def slice(self) -> None:
        """Keeps the weights as slices too, by which one or two tokens are multiplied from now on (bfloat16 ones)."""
        assert self.may_slice
        with _ARRANGING:
            if "slices" not in self._extra:
                layout, threads = Matrix.from_buffer_copy(self.structure), torch.get_num_threads()
                starts = torch.zeros(layout.rows // _CHUNK + 2, dtype=torch.int64)
                size = self._kernels.nt_measure_slices(layout, starts.data_ptr(), threads)
                slices = torch.empty(size, dtype=torch.uint8)
                layout.slice_starts = starts.data_ptr()
                self._kernels.nt_slice(layout, slices.data_ptr(), threads)
                self._keep(layout, slices=slices, slice_starts=starts)

    @property
    def may_list_columns(self) -> bool:
        """Whether so few weights exist that a product with one token is quicker by their columns."""
        rows, columns = self._matrix.shape
        return (
            self.fast_decoding
            and self._matrix.bitmap is not None
            and self._matrix.nonzeros < places_below(self.values.dtype) * rows * columns
            and columns <= 1 << 16
        )

    def list_columns(self) -> None:
        """Keeps the column of each value, by which one token is multiplied from now on unless by slices."""
        assert self.may_list_columns
        assert self._matrix.bitmap is not None
        with _ARRANGING:
            if "places" not in self._extra:
                bits, columns = self._matrix.bitmap.numpy(), self._matrix.columns
                exists = np.unpackbits(bits, axis=1, count=columns, bitorder="little")
                # The kernels read eight at once.
                places = np.pad(exists.nonzero()[1].astype(np.uint16), (0, 8))
                self._keep(self.structure, places=torch.from_numpy(places))

    @property
    def nbytes(self) -> int:
        """See `SparseMatrix`."""
        return self._matrix.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes that a product with one bfloat16 token reads."""
        if "slices" in self._extra:
            return self._extra["slices"].nbytes
        return self.nbytes if "places" not in self._extra else self.values.nbytes + self._extra["places"].nbytes

    @property
    def extra_bytes(self) -> int:
        """Bytes that are kept besides the matrix."""
        return self.index.nbytes + sum(part.nbytes for part in self._extra.values())

    @property
    def scales(self) -> torch.Tensor | None:
        """See `SparseMatrix`."""
        return self._matrix.scales

    @property
    def fits_bfloat16(self) -> bool:
        """Whether bfloat16 holds the unscaled values exactly."""
        return self._matrix.values.dtype in (torch.bfloat16, torch.int8)

    @functools.cached_property
    def kind(self) -> Kind:
        """What matrices that take the same time have in common."""
        rows, columns = self._matrix.shape
        tenths = round(10 * self._matrix.nonzeros / max(rows * columns, 1))
        return rows, columns, tenths, self.structure.type, self._matrix.bitmap is not None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, columns] times the transposed matrix: [tokens, rows], both float32 or both bfloat16.

        Sums are float32. int8 values take the activations as whole numbers of 24 bits (16 where they are bfloat16)
        below the largest of each token.
        """
        assert x.shape[1] == self.structure.columns
        x = x.contiguous()
        y = x.new_empty(len(x), self.structure.rows)
        self._kernels.nt_multiply(
            self.structure, x.data_ptr(), y.data_ptr(), ACTIVATIONS[x.dtype], len(x), torch.get_num_threads()
        )
        return y

    def unscaled(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, without their scales, as a whole matrix in float32 or bfloat16."""
        dense = torch.empty(self.structure.rows, self.structure.columns, dtype=dtype)
        self._kernels.nt_to_dense(self.structure, dense.data_ptr(), ACTIVATIONS[dtype], torch.get_num_threads())
        return dense


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
        if chosen not in supported_instruction_sets():
            raise ValueError(
                f"NT_TRANSFORMERS_INSTRUCTION_SET={chosen!r}: choose from {', '.join(supported_instruction_sets())}, "
                "which this processor has."
            )
        return chosen
    return supported_instruction_sets()[0]


def supported_instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that this processor has, the best first."""
    features = _processor_features()
    return [name for name, (_, needed) in INSTRUCTION_SETS.items() if needed <= features]


def kernels() -> ctypes.CDLL:
    """The kernels for this processor, compiled now if they never were.

    Raises:
        OSError: there is no compiler, or it fails; it is tried once in a process.
    """
    loaded = _load_once(instruction_set())
    if isinstance(loaded, OSError):
        raise loaded
    return loaded


@functools.cache
def _load_once(instruction_set: str) -> ctypes.CDLL | OSError:
    try:
        return _load(instruction_set)
    except OSError as error:
        return error


def _load(instruction_set: str) -> ctypes.CDLL:
    name = library_name(instruction_set)
    path = next((folder / name for folder in (PREBUILT, _cache_folder()) if (folder / name).exists()), None)
    if path is None:
        path = _cache_folder() / name
        build(instruction_set, path)
    library = ctypes.CDLL(str(path))
    pointer, integer, choice = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.nt_multiply.argtypes = (ctypes.POINTER(Matrix), pointer, pointer, choice, integer, choice)
    library.nt_decode.argtypes = (pointer, pointer, pointer, pointer, choice)
    library.nt_to_dense.argtypes = (ctypes.POINTER(Matrix), pointer, choice, choice)
    library.nt_sum_rows.argtypes = (pointer, pointer, integer, pointer)
    library.nt_slice.argtypes = library.nt_measure_slices.argtypes = (ctypes.POINTER(Matrix), pointer, choice)
    library.nt_measure_slices.restype = integer
    for name in ("nt_multiply", "nt_decode", "nt_to_dense", "nt_sum_rows", "nt_slice"):
        getattr(library, name).restype = None
    return library


def places_below(values: torch.dtype) -> float:
    """The density below which products with one token go by the columns of values of this type."""
    return PLACES_BELOW_AVX512[values] if instruction_set().startswith("avx512") else PLACES_BELOW


def state_of(tensors: Sequence[torch.Tensor]) -> object:
    """Differs once one of these tensors has changed or lies elsewhere, as after sharing it with another process."""
    changes: list[int | None]
    try:
        changes = [each._version for each in tensors]
    except RuntimeError:  # those made in inference mode do not count theirs
        changes = [None if each.is_inference() else each._version for each in tensors]
    return [each.data_ptr() for each in tensors], changes


def _cache_folder() -> Path:
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"{error}: name a folder for the compiled kernels in XDG_CACHE_HOME") from error
    return Path(cache) / "nt_transformers"


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse kernels are not available, torch multiplies dense matrices instead: %s", reason)


@functools.cache
def _processor_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
