# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The scripts that break things at random, in a smaller dose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(tmp_path: Path, script: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(tmp_path / "figures.json"), *arguments]
    # One thread: a fork keeps no others.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([*command, "--threads", "1"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads((tmp_path / "figures.json").read_text())
    return figures


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_they_were_not(tmp_path: Path) -> None:
    figures = run(tmp_path, "soak.py", "--kills", "4")
    assert figures["kills"] == 4
    differences = ("weights_differ", "training_state_differs", "metrics_differ", "leftover_files")
    assert [figures[name] for name in differences] == [0, 0, 0, 0]


@pytest.mark.slow
def test_every_corruption_is_detected(tmp_path: Path) -> None:
    figures = run(tmp_path, "corruption.py", "--count", "30")
    assert figures == {"corruptions": 30, "undetected": 0, "false_alarms": 0}


@pytest.mark.slow
def test_bad_input_ends_in_a_clear_error(tmp_path: Path) -> None:
    figures = run(tmp_path, "bad_input.py", "--configs", "100", "--shards", "100", "--seed", "1")
    assert (figures["configs_unclear"], figures["shards_unclear"]) == (0, 0)
    assert figures["configs_refused"] == 100
