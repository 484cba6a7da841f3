# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A wheel brings compiled kernels to machines without a compiler; without being asked for it holds none."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nt_transformers.inference import build


ROOT = Path(__file__).parents[2]
MULTIPLY = """
import torch
import nt_transformers
from nt_transformers.inference import SparseMatrix, native
weight = torch.randn(33, 70) * (torch.rand(33, 70) < 0.3)
x = torch.randn(2, 70)
assert native.available()
torch.testing.assert_close(native.KernelMatrix(SparseMatrix.from_dense(weight, "fp32")).multiply(x), x @ weight.T)
print(nt_transformers.__file__)
"""


def build_wheel(folder: Path, prebuilt: bool) -> Path:
    source = folder / "source"
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "nt_transformers", source / "nt_transformers", ignore=kept)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    environment = os.environ | {"NT_TRANSFORMERS_PREBUILT": "1" if prebuilt else ""}
    subprocess.run(command, check=True, env=environment)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_with_kernels_needs_no_compiler(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, prebuilt=True)
    assert wheel.name.endswith(".whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    cache = tmp_path / "cache"
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "installed"),
        "XDG_CACHE_HOME": str(cache),
        "CXX": str(tmp_path / "no_compiler"),
    }
    command = [sys.executable, "-c", MULTIPLY]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "installed")
    assert not cache.exists()


@pytest.mark.slow
def test_a_wheel_for_every_platform(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, prebuilt=False)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {f"nt_transformers/inference/kernels/{path.name}" for path in build.SOURCES.iterdir()} <= set(names)
