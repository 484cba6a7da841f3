# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Compiling the kernels: on first use, or beforehand into a wheel (setup.py), where torch may not be installed."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path


SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-O3", "-std=c++17", "-Wno-psabi", "-fPIC", "-shared", "-fopenmp")
_AVX512_FLAGS = ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni")
_AVX512_FEATURES = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_vnni"}
# The flags that each instruction set needs, and the processor features that it asks for, the best first.
InstructionSets = dict[str, tuple[tuple[str, ...], set[str]]]
X86: InstructionSets = {
    "avx512_bf16": ((*_AVX512_FLAGS, "-mavx512bf16"), _AVX512_FEATURES | {"avx512_bf16"}),
    "avx512": (_AVX512_FLAGS, _AVX512_FEATURES),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma", "f16c"}),
}
ARM: InstructionSets = {"neon": (("-DNT_NEON=1",), set())}  # every 64-bit ARM has it
_OF_MACHINES = dict.fromkeys(("x86_64", "AMD64"), X86) | dict.fromkeys(("aarch64", "arm64"), ARM)
INSTRUCTION_SETS: InstructionSets = {**_OF_MACHINES.get(platform.machine(), {}), "portable": ((), set())}


def library_name(instruction_set: str) -> str:
    """Name of the file of the compiled kernels; another one for other sources, flags or machines."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    digest = hashlib.sha256(sources + repr((FLAGS, INSTRUCTION_SETS[instruction_set][0])).encode()).hexdigest()
    return f"kernels-{instruction_set}-{platform.machine()}-{digest[:16]}.so"


def build(instruction_set: str, output: Path) -> None:
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
        flags = (*FLAGS, *INSTRUCTION_SETS[instruction_set][0])
        command = [compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(built)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise OSError(f"{' '.join(command)} failed:\n{run.stderr.strip()[-2000:]}")
        # Whole or not at all, also if several processes compile at the same time.
        built.replace(output)


def build_all(folder: Path) -> None:
    """Compiles the kernels for every instruction set of this machine's architecture.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    for name in INSTRUCTION_SETS:
        build(name, folder / library_name(name))
