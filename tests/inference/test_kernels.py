# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Packed matrices keep what they were given; products equal those of the dense matrix, for any shape and type."""

import copy
import functools
import logging
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from nt_transformers.inference import SparseLinear, SparseMatrix, native, products
from nt_transformers.inference.matrix import DTYPES, READ_AHEAD, Values


SHAPES = [(1, 1), (3, 31), (2, 32), (5, 33), (70, 130), (129, 257)]
DENSITIES = [0, 0.02, 0.05, 0.2, 0.5, 0.9, 1]


def random_matrix(rows: int, columns: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def random_tokens(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_packing_keeps_the_matrix(rows: int, columns: int, density: float, values: Values) -> None:
    weight = random_matrix(rows, columns, density)
    matrix = SparseMatrix.from_dense(weight, values)
    matrix.check()
    assert matrix.shape == (rows, columns)
    assert matrix.nonzeros == int(weight.count_nonzero())
    assert torch.equal(matrix.row_counts(), weight.count_nonzero(1))
    if values == "int8":
        steps = weight.abs().amax(1, keepdim=True) / 127
        assert ((matrix.to_dense() - weight).abs() <= steps / 2 * (1 + 2**-8)).all(), (
            "a step has the digits of a bfloat16"
        )
    else:
        assert torch.equal(matrix.to_dense(), weight.to(DTYPES[values]))
    assert torch.equal(SparseMatrix.from_dense(weight, values, sparse=False).to_dense(), matrix.to_dense())


@pytest.mark.parametrize("density", [0.05, 0.2])
@pytest.mark.parametrize("values", get_args(Values))
def test_size_is_that_of_the_values_and_one_bit_a_weight(values: Values, density: float) -> None:
    weight = random_matrix(512, 768, density)
    matrix = SparseMatrix.from_dense(weight, values)
    assert matrix.nbytes <= 1.02 * (matrix.nonzeros * DTYPES[values].itemsize + weight.numel() / 8)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("values", get_args(Values))
def test_products_equal_those_of_the_dense_matrix(values: Values) -> None:
    for rows, columns in SHAPES:
        for density in DENSITIES:
            for sparse in (True, False):
                matrix = SparseMatrix.from_dense(random_matrix(rows, columns, density), values, sparse=sparse)
                kernel, dense = native.KernelMatrix(matrix), matrix.to_dense().double()
                unscaled = kernel.unscaled(torch.float32)
                scales = 1 if matrix.scales is None else matrix.scales[:, None]
                assert torch.equal(unscaled * scales, matrix.to_dense().float())
                if values == "int8":
                    assert torch.equal(kernel.index[1, :-1].float(), unscaled.sum(1)), "read with AVX-512 only"
                for tokens in (0, 1, 2, 3, 17, 33, 130):
                    x = random_tokens(tokens, columns)
                    expected = (x.double() @ dense.T).float()
                    torch.testing.assert_close(kernel.multiply(x), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("values", get_args(Values))
def test_products_with_bfloat16_activations(values: Values) -> None:
    for rows, columns in SHAPES:
        for density in (0, 0.2, 0.9):
            matrix = SparseMatrix.from_dense(random_matrix(rows, columns, density), values)
            kernel, dense = native.KernelMatrix(matrix), matrix.to_dense().double()
            for tokens in (1, 2, 7, 16, 17, 33, 130):
                x = random_tokens(tokens, columns).bfloat16()
                expected = (x.double() @ dense.T).float()
                y = kernel.multiply(x)
                assert y.dtype == torch.bfloat16
                # Rounding of the result; int8 values take activations as 16 bits of the largest.
                steps = x.abs().max() * dense.abs().sum(1).max() / 2**16 if values == "int8" else 0
                torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=float(steps) + 2e-5)
                for dtype in (torch.float32, torch.bfloat16)[: 1 + kernel.fits_bfloat16]:
                    product = products._multiply_dense(kernel, x, dtype).float()
                    torch.testing.assert_close(product, expected, rtol=2**-6, atol=1e-4)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("values", get_args(Values))
def test_one_token_by_the_columns_of_few_values(values: Values) -> None:
    matrix = SparseMatrix.from_dense(random_matrix(90, 700, 0.015), values)
    kernel = native.KernelMatrix(matrix)
    kernel.list_columns()
    assert not native.KernelMatrix(SparseMatrix.from_dense(random_matrix(90, 700, 0.2), values)).may_list_columns
    for dtype in native.ACTIVATIONS:
        x = random_tokens(1, 700).to(dtype)
        expected = (x.double() @ matrix.to_dense().double().T).to(dtype)
        torch.testing.assert_close(kernel.multiply(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 5])
def test_one_or_two_tokens_by_slices(values: Values, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, columns in [*SHAPES, (700, 90), (31, 1100)]:
        for density in DENSITIES:
            matrix = SparseMatrix.from_dense(random_matrix(rows, columns, density), values)
            kernel, dense = native.KernelMatrix(matrix), matrix.to_dense().double()
            before = kernel.extra_bytes
            kernel.slice()
            assert kernel.extra_bytes > before
            for tokens in (3, 1, 2):
                x = random_tokens(tokens, columns).bfloat16()
                expected = (x.double() @ dense.T).float()
                # The result is rounded; int8 values of three tokens take activations as 16 bits of the largest.
                torch.testing.assert_close(kernel.multiply(x).float(), expected, rtol=2**-8, atol=5e-4)
                # Fewer are multiplied without what slices replace.
                kernel.values.zero_()


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_slices_of_activations_of_any_magnitude(values: Values) -> None:
    matrix = SparseMatrix.from_dense(random_matrix(40, 90, 0.2), values)
    kernel = native.KernelMatrix(matrix)
    kernel.slice()
    for scale in (1e-30, 1e35):
        x = (random_tokens(1, 90) * scale).bfloat16()
        expected = (x.double() @ matrix.to_dense().double().T).bfloat16()
        torch.testing.assert_close(kernel.multiply(x), expected, rtol=2**-7, atol=1e-3 * scale)


def test_slices_are_kept_where_they_measure_quicker_and_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def sliced(values: Values = "bf16", dtype: torch.dtype = torch.bfloat16, tokens: int = 1, **options: bool) -> bool:
        matrix = SparseMatrix.from_dense(random_matrix(40, 90, 0.2), values, sparse=options.pop("sparse", True))
        kernel = native.KernelMatrix(matrix, **options)
        for copied in (kernel, copy.deepcopy(kernel)):
            products.multiply(copied, random_tokens(tokens, 90).to(dtype))
            assert bool(copied.structure.slices) == (copied.extra_bytes > copied.index.nbytes)
        return bool(copied.structure.slices)

    monkeypatch.setattr(products, "_timed_sliced", {})
    monkeypatch.setattr(products, "SLICED_MARGIN", 1e9)
    assert sliced()
    assert sliced("int8", tokens=2)
    assert not sliced(tokens=3)
    assert not sliced(dtype=torch.float32)
    assert not sliced("fp32")
    assert not sliced(sparse=False)
    assert not sliced(fast_decoding=False)
    layer = SparseLinear(SparseMatrix.from_dense(random_matrix(40, 90, 0.2), "bf16"))
    layer.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(native.KernelMatrix, "slice", None)  # not for every product of a compiled layer
        torch.compile(layer, backend="eager", fullgraph=True)(random_tokens(1, 90).bfloat16())
    monkeypatch.setattr(products, "SLICED_MARGIN", 0)
    assert not sliced()


def test_slices_are_compared_with_products_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a matrix that has some, of another number of threads."""
    kernel = native.KernelMatrix(SparseMatrix.from_dense(random_matrix(40, 90, 0.2), "bf16"))
    kernel.slice()
    timed = []
    usual_multiply = native.KernelMatrix.multiply

    def multiply(self: native.KernelMatrix, x: torch.Tensor) -> torch.Tensor:
        timed.append(bool(self.structure.slices))
        return usual_multiply(self, x)

    monkeypatch.setattr(products, "_timed_sliced", {})
    monkeypatch.setattr(native.KernelMatrix, "multiply", multiply)
    products.quicker_sliced([kernel])
    half = len(timed) // 2
    assert timed == [False] * half + [True] * half


@pytest.mark.parametrize(("loss", "sliced"), [(1.0, True), (3.0, False)])
def test_matrices_of_the_same_input_are_sliced_if_that_is_quicker_for_all(
    loss: float, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = [native.KernelMatrix(SparseMatrix.from_dense(random_matrix(40, 90, d), "bf16")) for d in (0.2, 0.6)]
    threads = torch.get_num_threads()
    seconds = {(matrices[0].kind, threads): (3.0, 1.0), (matrices[1].kind, threads): (1.0, 1.0 + loss)}
    monkeypatch.setattr(products, "_timed_sliced", seconds)
    products.arrange(matrices, torch.bfloat16)
    assert [bool(matrix.structure.slices) for matrix in matrices] == [sliced] * 2


@pytest.mark.parametrize("fast_decoding", [True, False])
def test_columns_are_listed_where_few_weights_exist_and_they_may_be(
    fast_decoding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SLICED_MARGIN", 0)
    matrices = [SparseMatrix.from_dense(random_matrix(40, 90, density), "bf16") for density in (0.01, 0.01, 0.2)]
    few, other, many = (native.KernelMatrix(matrix, fast_decoding=fast_decoding) for matrix in matrices)
    products.arrange([other, many], torch.bfloat16)
    products.multiply(few, random_tokens(3, 90))
    assert not any(matrix.structure.places for matrix in (few, other, many))
    products.multiply(few, random_tokens(1, 90))
    assert bool(few.structure.places) == fast_decoding


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_product(values: Values, special: float) -> None:
    kernel = native.KernelMatrix(SparseMatrix.from_dense(torch.ones(3, 40), values))
    x = torch.randn(1, 40)
    x[0, 17] = special
    assert not kernel.multiply(x).isfinite().any()


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize("scale", [0, 1e-36, 1e-6, 1e6, 1e30])
def test_inputs_of_any_magnitude_beside_an_outlier(values: Values, scale: float) -> None:
    matrix = SparseMatrix.from_dense(random_matrix(20, 200, 0.5), values)
    x = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * scale
    x[0, 3] *= 1000
    expected = (x.double() @ matrix.to_dense().double().T).float()
    tolerance = 1e-5 * float(expected.abs().max()) + 1e-30
    torch.testing.assert_close(native.KernelMatrix(matrix).multiply(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_operator_for_compilers(values: Values) -> None:
    matrix = SparseMatrix.from_dense(random_matrix(24, 40, 0.5), values)
    index = native.KernelMatrix(matrix).index
    for given in (index, None):
        arguments = (torch.randn(5, 40), 24, matrix.values, matrix.bitmap, matrix.scales, given)
        torch.library.opcheck(products.sparse_product, arguments)
        expected = arguments[0] @ matrix.to_dense().float().T
        torch.testing.assert_close(products.sparse_product(*arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("torch_is_quicker", [False, True])
def test_what_measures_quicker_multiplies_many_tokens(torch_is_quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_matrix(24, 40, 0.5)
    matrix = native.KernelMatrix(SparseMatrix.from_dense(weight, "fp32"))
    seconds = iter((2.0, 1.0) if torch_is_quicker else (1.0, 2.0))  # of the kernels, of torch
    monkeypatch.setattr(products, "_timed", {})
    monkeypatch.setattr(products, "_seconds", lambda function: next(seconds))
    copies = []
    monkeypatch.setattr(matrix, "unscaled", lambda dtype: copies.append(None) or type(matrix).unscaled(matrix, dtype))
    for tokens in (1, 2, 5, 7, 8):  # one measurement, for up to 8 tokens
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(products.multiply(matrix, x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert len(copies) == (3 if torch_is_quicker else 0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_product(threads: int) -> None:
    kernel = native.KernelMatrix(SparseMatrix.from_dense(random_matrix(65, 97, 0.4), "fp32"))
    x = torch.randn(9, 97)
    before = torch.get_num_threads()
    expected = kernel.multiply(x), kernel.multiply(x[:1])
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernel.multiply(x), expected[0])
        assert torch.equal(kernel.multiply(x[:1]), expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0.3, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_takes_any_leading_shape_and_dtype(density: float, bias: bool) -> None:
    linear = nn.Linear(40, 24, bias=bias)
    linear.weight.data = random_matrix(24, 40, density)
    layer = SparseLinear.from_linear(linear, "fp32")
    assert (layer.bitmap is None) == (density == 1)
    for shape in ((40,), (3, 40), (2, 5, 40), (0, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.to_linear().weight, linear.weight)


def test_without_a_compiler_torch_multiplies_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    linear = nn.Linear(40, 24, bias=False)
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "_load_once", functools.cache(native._load_once.__wrapped__))
    native._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            x = torch.randn(3, 40)
            torch.testing.assert_close(SparseLinear.from_linear(linear, "fp32")(x), linear(x), rtol=1e-5, atol=1e-5)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "sparse kernels are not available, torch multiplies dense matrices instead"
    ]
    assert (tmp_path / "calls").read_text().count("called") == 1


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", no_home)
    monkeypatch.setattr(native, "PREBUILT", Path("nowhere"))
    monkeypatch.setattr(native, "_load_once", functools.cache(native._load_once.__wrapped__))
    with pytest.raises(OSError, match="name a folder for the compiled kernels in XDG_CACHE_HOME"):
        native.kernels()


class TestMistakes:
    def test_unknown_values(self) -> None:
        with pytest.raises(ValueError, match=r"values='fp8': choose from bf16, fp16, fp32, int8"):
            SparseMatrix.from_dense(torch.ones(2, 2), "fp8")

    @pytest.mark.parametrize("values", get_args(Values))
    def test_weights_that_are_not_finite(self, values: Values) -> None:
        with pytest.raises(ValueError, match=r"a weight is not finite"):
            SparseMatrix.from_dense(torch.tensor([[1.0, torch.inf]]), values)

    def test_too_large_for_the_type(self) -> None:
        with pytest.raises(ValueError, match=r"values='fp16': a weight is not finite in this type"):
            SparseMatrix.from_dense(torch.tensor([[1e6]]), "fp16")

    def test_unknown_instruction_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NT_TRANSFORMERS_INSTRUCTION_SET", "mmx")
        with pytest.raises(ValueError, match=r"NT_TRANSFORMERS_INSTRUCTION_SET='mmx': choose from .*portable"):
            native.instruction_set()

    def test_an_instruction_set_of_other_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NT_TRANSFORMERS_INSTRUCTION_SET", "avx2")
        monkeypatch.setattr(native, "_processor_features", set)
        with pytest.raises(ValueError, match="='avx2': choose from portable, which this processor has"):
            native.instruction_set()

    @pytest.mark.parametrize("part", ["bitmap", "values", "scales"])
    def test_parts_that_do_not_belong_together(self, part: str) -> None:
        matrix = SparseMatrix.from_dense(random_matrix(4, 33, 0.5), "int8")
        damaged = getattr(matrix, part).clone()
        if part == "bitmap":
            damaged[1, 7] |= 128
        elif part == "values":
            damaged = damaged[: -READ_AHEAD - 1]
        else:
            damaged = damaged[:-1]
        parts = {"bitmap": matrix.bitmap, "values": matrix.values, "scales": matrix.scales, part: damaged}
        with pytest.raises(ValueError, match=part):
            native.KernelMatrix(SparseMatrix(33, **parts))
