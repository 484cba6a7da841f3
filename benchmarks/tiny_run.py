# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A run that takes seconds, on text made on the spot: what the benchmarks of robustness break in every way."""

import os
import random
from pathlib import Path
from typing import Any


# Before anything imports the libraries that read them.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}

import json

from nt_transformers.data.prepare import train_tokenizer


WORDS = ("the", "a", "old", "grey", "farmer", "river", "clock", "cat", "follows", "paints", "letter", "rain", "dawn")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Random sentences, from a few words to more than a sequence."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(count)]


def write_json_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def prepare(folder: Path) -> dict[str, Any]:
    """Makes corpus and tokenizer in `folder`; returns the fields of a `TextTrainingConfig` as nested dicts."""
    for split, shards in {"train": 3, "validation": 1}.items():
        for shard in range(shards):
            write_json_lines(folder / "corpus" / split / f"{shard}.jsonl", make_texts(80, seed=shard))
    train_tokenizer(make_texts(200), 288).save_pretrained(folder / "tokenizer")
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 40,
        "global_batch_size": 8,
        "per_device_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "eval_steps": 10,
        "checkpoint_steps": 2,
        "sparsity": {"method": "rigl", "density": 0.5, "update_interval": 2, "stop_fraction": 1.0},
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_ensemble_heads": 2,
            "num_head_layers": 1,
        },
        "data": {
            "train": str(folder / "corpus"),
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 16,
            "eval_tokens": 300,
            "num_workers": 0,
        },
    }
