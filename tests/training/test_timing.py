# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Shares of time, on a clock that the test moves."""

import json
import time
from pathlib import Path

import pytest
import torch

from nt_transformers.training import train_language_model
from nt_transformers.training.timing import SHARES, PhaseTimer


def test_shares_of_what_has_passed_since_they_were_last_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer("forward"):
            now += 3.0
        now += 1.0
        with timer("backward"):
            now += 6.0
    shares = timer.take_shares()
    assert shares.pop("share_forward") == 0.3
    assert shares.pop("share_backward") == 0.6
    assert set(shares.values()) == {0.0}
    with timer("data"):
        now += 2.0
    assert timer.take_shares() == {field: float(field == "share_data") for field in SHARES.values()}


def test_training_tells_where_its_time_goes(run_config) -> None:
    config = run_config(logging_steps=4)
    train_language_model(config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    first, second = [[line[field] for field in SHARES.values()] for line in lines if "loss" in line]
    assert all(share > 0 for share in first[:5])
    assert first[5] == 0 < second[5], "the evaluation after step 4 counts in the next line"
    assert sum(first) <= 1.001
    assert sum(second) <= 1.001
