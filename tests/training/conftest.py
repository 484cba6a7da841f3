# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A run small enough to train within a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from nt_transformers.data import TextDataConfig
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import LlamaArguments, TextTrainingConfig


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the life of the process; every test may choose its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


RunConfig = Callable[..., TextTrainingConfig]


@pytest.fixture
def run_config(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> RunConfig:
    """Makes the configuration of a tiny run; arguments override fields, those of nested parts as dicts."""

    def make(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        sparsity: dict[str, Any] | None = None,
        **fields: Any,
    ) -> TextTrainingConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "global_batch_size": 8,
            "per_device_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 3,
            "eval_steps": 4,
            "checkpoint_steps": 2,
            "keep_last": 100,
        }
        shape = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_ensemble_heads": 2,
            "num_head_layers": 1,
        }
        text = {
            "train": str(corpus_dir),
            "tokenizer": str(tokenizer_dir),
            "sequence_length": 16,
            "eval_tokens": 300,
            "num_workers": 0,
        }
        topology = {"method": "rigl", "density": 0.5, "update_interval": 2, "stop_fraction": 1.0}
        return TextTrainingConfig(
            model=LlamaArguments(**shape | (model or {})),
            data=TextDataConfig(**text | (data or {})),
            sparsity=SparsityConfig(**topology | (sparsity or {})),
            **defaults | fields,
        )

    return make
