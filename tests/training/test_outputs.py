# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Metrics and export after an interruption."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from test_text import RunConfig

from nt_transformers.training import train_language_model
from nt_transformers.training.metrics import MetricsLog


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b"\0" * 100, b'{"step": 9}\n', b"\xff\n", b"[]\n"])
def test_metrics_go_on_after_the_step_that_is_resumed(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "eval_loss": NaN}\n' + tail)
    log = MetricsLog(path, Accelerator(cpu=True), last_step=2)
    log.write({"step": 3, "loss": 1.5})
    log.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_interrupted_export_has_no_weights_and_is_finished_by_a_restart(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def interrupt(self: Path, target: Path) -> Path:
        if self.name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    config = run_config(resume_from_checkpoint="latest", max_steps=2)
    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_language_model(config)
    folder = Path(config.output_dir)
    assert (folder / "config.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "summary.json").exists()

    monkeypatch.undo()
    summary = train_language_model(config)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["eval_perplexity"] > 1
    assert not list(folder.rglob("*.partial*"))


def test_a_run_that_replaces_another_takes_its_weights_away_first(run_config: RunConfig) -> None:
    config = run_config(max_steps=1)
    train_language_model(config)
    weights = Path(config.output_dir) / "model.safetensors"
    broken = run_config(max_steps=1, overwrite_output_dir=True, learning_rate=1e38)
    assert weights.exists()
    with pytest.raises(ArithmeticError, match="not finite"):
        train_language_model(broken)
    assert not weights.exists()
