# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A study of toy networks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nt_transformers.study import StudyConfig
from nt_transformers.training import build_config


@pytest.fixture
def study_config(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> Callable[..., StudyConfig]:
    """Makes the configuration of a small study; arguments override fields."""

    def make(**fields: Any) -> StudyConfig:
        defaults = {
            "output_dir": str(tmp_path / "study"),
            "test": str(corpus_dir / "test"),
            "flops_reference": "ensemble",
            "learning_rates": [1e-2],
            "training": {
                "max_steps": 6,
                "global_batch_size": 4,
                "per_device_batch_size": 4,
                "logging_steps": 2,
                "eval_steps": 3,
                "checkpoint_steps": 2,
                "model": {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_ensemble_heads": 2,
                    "num_head_layers": 1,
                },
                "sparsity": {"density": 0.8, "update_interval": 2, "stop_fraction": 1.0},
                "data": {
                    "train": str(corpus_dir),
                    "tokenizer": str(tokenizer_dir),
                    "sequence_length": 16,
                    "eval_tokens": 300,
                    "num_workers": 0,
                },
            },
            "methods": {
                "single": {"model": {"num_ensemble_heads": 1}, "sparsity": {"method": "dense"}},
                "ensemble": {"model": {"num_head_layers": None}, "sparsity": {"method": "dense"}},
                "set": {"sparsity": {"method": "set"}},
            },
            "grids": [{"method": ["single", "ensemble", "set"]}],
        }
        return build_config(StudyConfig, {**defaults, **fields})

    return make


@pytest.fixture
def vision_study_config(tmp_path: Path, image_folder: Path) -> Callable[..., StudyConfig]:
    """Makes the configuration of a small study of classifiers; arguments override fields."""

    def make(**fields: Any) -> StudyConfig:
        defaults = {
            "output_dir": str(tmp_path / "study"),
            "kind": "vision",
            "test": {"corruptions": ["fog", "contrast"], "severities": [1, 5], "images": 5},
            "flops_reference": "ensemble",
            "learning_rates": [0.1],
            "training": {
                "max_steps": 6,
                "global_batch_size": 6,
                "per_device_batch_size": 6,
                "optimizer": "sgd",
                "eval_steps": 3,
                "checkpoint_steps": 2,
                "model": {
                    "model_type": "neurotrails_wide_resnet",
                    "num_ensemble_heads": 2,
                    "num_head_blocks": 1,
                    "shape": {"depth": 10, "widen_factor": 1},
                },
                "sparsity": {"density": 0.5, "update_interval": 2, "stop_fraction": 1.0},
                "data": {
                    "train": str(image_folder),
                    "test_split": "val",
                    "validation_size": 6,
                    "image_size": 32,
                    "num_workers": 0,
                },
            },
            "methods": {
                "single": {"model": {"num_ensemble_heads": 1}, "sparsity": {"method": "dense"}},
                "ensemble": {"model": {"num_head_blocks": None}, "sparsity": {"method": "dense"}},
                "set": {"sparsity": {"method": "set"}},
            },
            "grids": [{"method": ["single", "ensemble", "set"]}],
        }
        return build_config(StudyConfig, {**defaults, **fields})

    return make


@pytest.fixture
def kill_at_work(tmp_path: Path) -> Callable[[StudyConfig, str], None]:
    """Runs a study until a run of this method has left a checkpoint, and kills it."""

    def kill(config: StudyConfig, method: str) -> None:
        (tmp_path / "study.json").write_text(json.dumps(asdict(config)))
        command = [sys.executable, "recipes/study.py", "--config", str(tmp_path / "study.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
        folder = Path(config.output_dir) / "runs"
        deadline = time.monotonic() + 240
        while not list(folder.glob(f"{method}-*/checkpoints/step_*/manifest.json")):
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()

    return kill
