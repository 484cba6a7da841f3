# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The kernels read and write nothing but their arguments, and equal a naive product, on random matrices."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nt_transformers.inference import build, native


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


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", dict.fromkeys([*native.supported_instruction_sets(), *build.ARM]))
def test_kernels_under_address_and_undefined_behaviour_sanitizers(instruction_set: str, tmp_path: Path) -> None:
    compiler, runner = tools(instruction_set)
    program = tmp_path / "check"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    needed, _ = (build.INSTRUCTION_SETS | build.ARM)[instruction_set]
    flags = ("-O1", "-g", "-std=c++17", "-fopenmp", *needed, *sanitizers)
    source = Path(__file__).with_name("kernels_check.cpp")
    command = [compiler, *flags, "-I", str(build.SOURCES), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    # What OpenMP keeps until the process ends is no leak.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "864 products\n"
