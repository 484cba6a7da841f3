# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""With NT_TRANSFORMERS_PREBUILT=1 the kernels for sparse inference are compiled into the wheel, for one platform."""

import os
import runpy
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


PREBUILT = os.environ.get("NT_TRANSFORMERS_PREBUILT") == "1"
INFERENCE = Path("nt_transformers") / "inference"


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if PREBUILT and not self.editable_mode:
            folder = Path(self.build_lib) / INFERENCE / "prebuilt"
            shutil.rmtree(folder, ignore_errors=True)  # of other sources, from an earlier build
            # By its path: the package itself needs torch.
            runpy.run_path(str(INFERENCE / "build.py"))["build_all"](folder)


class DistributionWithKernels(Distribution):
    def has_ext_modules(self):
        return PREBUILT or super().has_ext_modules()


class WheelForAnyPython(bdist_wheel):
    def get_tag(self):
        *_, platform = super().get_tag()
        # The kernels are called through ctypes.
        return "py3", "none", platform


setup(
    distclass=DistributionWithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForAnyPython},
)
