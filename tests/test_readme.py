# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


README = Path(__file__).parents[1] / "README.md"


# Trainer's default on a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Trainer writes accelerate's settings into the environment.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    AcceleratorState._reset_state(reset_partial_state=True)
