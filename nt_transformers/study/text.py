# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Studies of language models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..analysis import language_model_cost, mask_overlap, score_language_model, weight_masks
from ..data import TokenSequences, load_documents, load_tokenizer
from ..models.neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..sparsity import planned_nonzeros
from ..training import TextTrainingConfig, train_language_model
from .config import StudyConfig
from .kind import Kind, Outline


class TextKind(Kind):
    """Runs of `train_language_model`, measured on test documents."""

    config_class = TextTrainingConfig
    curve = (
        "step",
        "tokens",
        "eval_loss",
        "eval_perplexity",
        "eval_disagreement",
        "eval_ambiguity",
        "density",
        "explored",
        "mask_overlap",
    )
    head_length = "num_head_layers"
    loss = "eval_loss"

    def outline(self, training: TextTrainingConfig) -> Outline:
        with torch.device("meta"):
            network = NeuroTrailsLlamaForCausalLM(training.model.outline(training.data.tokenizer))
        length = training.data.sequence_length
        columns = ("num_ensemble_heads", "num_head_layers", "num_hidden_layers", "hidden_size")
        return Outline(
            cost=language_model_cost(network, length, planned_nonzeros(network, training.sparsity)),
            items_per_example=length,
            shape={name: getattr(network.config, name) for name in columns},
        )

    def prepare(self, config: StudyConfig) -> str:
        assert isinstance(config.test, str)
        return config.test

    def train(self, training: TextTrainingConfig, *, final: bool) -> dict[str, Any]:
        return train_language_model(training)

    def test(self, folder: Path, training: TextTrainingConfig, test: str) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        sequences = TokenSequences(
            load_documents(test, "test"),
            load_tokenizer(str(folder)),
            sequence_length=training.data.sequence_length,
            batch_size=training.per_device_batch_size,
            packing=training.data.packing,
            training=False,
        )
        figures = score_language_model(model, sequences).language_figures(model.config.vote)
        figures = {name.replace("eval_", "test_", 1): value for name, value in figures.items()}
        return {**figures, "mask_overlap_pairs": mask_overlap(weight_masks(model)).tolist()}

    def headline(self, row: Mapping[str, Any]) -> str:
        return f"perplexity {row.get('test_perplexity', row['eval_perplexity']):.2f}"
