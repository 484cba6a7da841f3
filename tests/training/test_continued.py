# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training that starts from a checkpoint, end to end on a tiny corpus."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_resumed_exactly, copy_stopped
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from nt_transformers import NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import (
    ContinuedTextTrainingConfig,
    PretrainedArguments,
    TextTrainingConfig,
    parse_arguments,
    train_language_model,
)


RECIPE = Path(__file__).parents[2] / "recipes" / "configs" / "continue_pretraining.yaml"
SPLIT = {"num_ensemble_heads": 2, "num_head_layers": 1}
ContinuedConfig = Callable[..., ContinuedTextTrainingConfig]


@pytest.fixture
def continued_config(run_config: Callable[..., TextTrainingConfig], tmp_path: Path) -> ContinuedConfig:
    """Makes the configuration of a tiny run from the checkpoint `source`; `model` and other fields override."""

    def make(
        source: Path, model: dict[str, Any] | None = None, sparsity: dict[str, Any] | None = None, **fields: Any
    ) -> ContinuedTextTrainingConfig:
        base = run_config(**{"output_dir": str(tmp_path / "continued"), **fields})
        own = {name: value for name, value in vars(base).items() if name not in ("model", "sparsity")}
        return ContinuedTextTrainingConfig(
            **own,
            model=PretrainedArguments(from_pretrained=str(source), **model or {}),
            sparsity=SparsityConfig(**asdict(base.sparsity) | (sparsity or {})),
        )

    return make


@pytest.fixture
def dense_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_dense_checkpoint_is_upcycled_and_trained(continued_config: ContinuedConfig, dense_dir: Path) -> None:
    config = continued_config(dense_dir, SPLIT, max_steps=30, learning_rate=3e-2)
    assert config.sparsity.mask_init == "soft_magnitude"
    summary = train_language_model(config)
    assert summary["density"] == 0.5
    assert summary["eval_perplexity"] < 80
    assert summary["eval_disagreement"] > 0
    model = AutoModelForCausalLM.from_pretrained(config.output_dir)
    assert type(model) is NeuroTrailsLlamaForCausalLM
    assert (model.config.num_ensemble_heads, model.config.num_head_layers, model.config.vote) == (2, 1, "probs")
    assert type(model.extract_head(1)) is LlamaForCausalLM


def test_before_training_the_vote_is_the_dense_checkpoints(continued_config: ContinuedConfig, dense_dir: Path) -> None:
    still = {"learning_rate": 1e-20, "max_steps": 1}
    three, one = (
        train_language_model(
            continued_config(
                dense_dir,
                {**SPLIT, "num_ensemble_heads": heads},
                {"method": "dense"},
                overwrite_output_dir=True,
                **still,
            )
        )
        for heads in (3, 1)
    )
    assert three["eval_perplexity"] == pytest.approx(one["eval_perplexity"], rel=1e-6)
    assert three["eval_disagreement"] == 0


@pytest.mark.parametrize("mask_init", ["magnitude", "soft_magnitude"])
def test_a_neurotrails_checkpoint_goes_on_with_its_own_masks(
    run_config: Callable[..., TextTrainingConfig], continued_config: ContinuedConfig, mask_init: str
) -> None:
    first = run_config(sparsity={"method": "neurotrails_llm"})
    train_language_model(first)
    second = continued_config(
        Path(first.output_dir), sparsity={"method": "static", "mask_init": mask_init}, learning_rate=1e-20, seed=7
    )
    train_language_model(second)
    before, after = (load_file(Path(config.output_dir) / "model.safetensors") for config in (first, second))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-12)


def test_resumed_equals_uninterrupted(continued_config: ContinuedConfig, dense_dir: Path, tmp_path: Path) -> None:
    whole, resumed = (
        continued_config(
            dense_dir,
            {**SPLIT, "noise": 0.1},
            output_dir=str(tmp_path / name),
            resume_from_checkpoint="latest",
        )
        for name in ("whole", "resumed")
    )
    train_language_model(whole)
    copy_stopped(whole.output_dir, resumed.output_dir, 4)
    train_language_model(resumed)
    assert_resumed_exactly(resumed.output_dir, whole.output_dir)


class TestBadInput:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({}, "model.num_ensemble_heads=None.*dense"),
            ({"num_ensemble_heads": 2}, "model.num_head_layers=None.*dense"),
            ({"num_ensemble_heads": 2, "num_head_layers": 3}, "num_head_layers=3"),
            ({**SPLIT, "noise": -1.0}, "noise=-1.0"),
        ],
    )
    def test_dense(
        self, continued_config: ContinuedConfig, dense_dir: Path, model: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            train_language_model(continued_config(dense_dir, model))

    @pytest.mark.parametrize(
        "field", [{"num_ensemble_heads": 3}, {"num_head_layers": 2}, {"vote": "logits"}, {"noise": 0.1}]
    )
    def test_neurotrails(
        self, continued_config: ContinuedConfig, dense_dir: Path, tmp_path: Path, field: dict[str, Any]
    ) -> None:
        NeuroTrailsLlamaForCausalLM.from_dense(dense_dir, 2, 1).save_pretrained(tmp_path / "sparse")
        ((name, value),) = field.items()
        with pytest.raises(ValueError, match=f"model.{name}={value!r}.*leave the field out"):
            train_language_model(continued_config(tmp_path / "sparse", field))

    def test_another_architecture(self, continued_config: ContinuedConfig, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=1, n_positions=16)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
        with pytest.raises(ValueError, match="model_type='gpt2'"):
            train_language_model(continued_config(tmp_path / "gpt2", SPLIT))

    def test_nowhere(self, continued_config: ContinuedConfig, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model.from_pretrained=.*nowhere.*cannot be loaded"):
            train_language_model(continued_config(tmp_path / "nowhere", SPLIT))

    def test_vocabulary(self, continued_config: ContinuedConfig, tmp_path: Path) -> None:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape)).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"400.*320 tokens"):
            train_language_model(continued_config(tmp_path / "other", SPLIT))


def test_the_recipes_configuration() -> None:
    config = parse_arguments(
        ContinuedTextTrainingConfig,
        "test",
        [f"--config={RECIPE}", "--model.from_pretrained=a", "--data.tokenizer=a", "--output_dir=b"],
    )
    assert (config.model.num_ensemble_heads, config.sparsity.mask_init) == (None, "soft_magnitude")
