# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What runs leave behind, and whether two of them left the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nt_transformers.training.metrics import TIMING_FIELDS


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of the metrics file without what depends on the clock."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in lines]


def read_checkpoint(folder: str | Path, step: int) -> dict[str, Any]:
    """Everything that a checkpoint holds."""
    path = Path(folder) / "checkpoints" / f"step_{step}"
    return {
        "weights": load_file(path / "model.safetensors"),
        "training": torch.load(path / "training.pt"),
        "state": json.loads((path / "state.json").read_text()),
    }


def copy_stopped(source: str | Path, target: str | Path, step: int) -> None:
    """Copies what a crash some steps after the checkpoint of `step` would have left."""
    shutil.copytree(source, target)
    for folder in (Path(target) / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def assert_equal(left: Any, right: Any) -> None:
    """Bit for bit, however nested."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            assert_equal(ours, theirs)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_resumed_exactly(resumed: str | Path, whole: str | Path, steps: tuple[int, ...] = (6, 8)) -> None:
    """Metrics, the checkpoints of `steps` and the final weights are those of the run that was not interrupted."""
    assert read_metrics(resumed) == read_metrics(whole)
    for step in steps:
        assert_equal(read_checkpoint(resumed, step), read_checkpoint(whole, step))
    ours, theirs = ((Path(folder) / "model.safetensors").read_bytes() for folder in (resumed, whole))
    assert ours == theirs
