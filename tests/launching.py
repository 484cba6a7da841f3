# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Scripts on several CPU processes."""

import os
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]


def launch(processes: int, script: Path, *arguments: object) -> str:
    """Runs a script on so many processes of one thread each, as torchrun does, and returns what they printed."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*torchrun, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
