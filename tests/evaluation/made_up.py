# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Texts and models small enough to evaluate within a second."""

import random
from typing import Any

import torch

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    # Wide enough for heads to disagree.
    "initializer_range": 0.5,
}
WORDS = [
    "the",
    "a",
    "farmer",
    "boat",
    "river",
    "clock",
    "market",
    "window",
    "crosses",
    "follows",
    "under",
    "old",
    "grey",
]


def make_text(rng: random.Random, words: int) -> str:
    """A sentence of so many words."""
    return " ".join(rng.choices(WORDS, k=words)).capitalize()


def make_model(**overrides: Any) -> NeuroTrailsLlamaForCausalLM:
    """A random ensemble of 3 heads, 2 of the 3 layers in each; the same weights for the same overrides."""
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SHAPE | {"num_ensemble_heads": 3, "num_head_layers": 2} | overrides)
    return NeuroTrailsLlamaForCausalLM(config).eval()
