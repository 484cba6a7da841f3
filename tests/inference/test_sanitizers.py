# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The kernels read and write nothing but their arguments, and equal a naive product, on random matrices."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nt_transformers.inference import build, native


# What stands in for AVX-512.
EMULATED_AVX512 = Path("/usr/include/simde")
# The compiler for ARM and what runs its programs, on other processors.
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def tools(instruction_set: str) -> tuple[str, tuple[str, ...]]:
    """The compiler for an instruction set, and what its programs are started by; skips the test where they lack."""
    if instruction_set in build.INSTRUCTION_SETS:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        return compiler, ()
    if not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR[0])):
        pytest.skip(f"no {ARM_COMPILER} and {ARM_EMULATOR[0]} (Debian: g++-aarch64-linux-gnu and qemu-user)")
    return ARM_COMPILER, ARM_EMULATOR


def check(compiler: str, runner: tuple[str, ...], source: str, flags: tuple[str, ...], tmp_path: Path) -> str:
    """What a program prints that is built with sanitizers; skips the test where they lack."""
    program = tmp_path / "check"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    options = ("-O1", "-g", "-std=c++17", "-fopenmp", *flags, *sanitizers, "-I", str(build.SOURCES))
    command = [compiler, *options, str(Path(__file__).with_name(source)), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    # What OpenMP keeps until the process ends is no leak.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", dict.fromkeys([*native.supported_instruction_sets(), *build.ARM]))
def test_kernels_under_address_and_undefined_behaviour_sanitizers(instruction_set: str, tmp_path: Path) -> None:
    compiler, runner = tools(instruction_set)
    flags, _ = (build.INSTRUCTION_SETS | build.ARM)[instruction_set]
    assert check(compiler, runner, "kernels_check.cpp", flags, tmp_path) == "864 products\n"


@pytest.mark.slow
@pytest.mark.skipif(
    not (EMULATED_AVX512 / "x86" / "avx512.h").exists(), reason="no SIMDe headers (Debian: libsimde-dev)"
)
def test_slices_of_avx512_on_any_processor(tmp_path: Path) -> None:
    compiler, runner = tools("portable")
    assert check(compiler, runner, "slices_check.cpp", ("-DNT_AVX512=1",), tmp_path) == "300 products\n"
