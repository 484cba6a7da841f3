# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Small models for the model tests, and the stock LLaMA that one head amounts to."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Wide enough for heads to disagree and for the vote to be far from uniform.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors cost more to share out among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config() -> Callable[..., NeuroTrailsLlamaConfig]:
    """`make_config(**overrides)`: 4 layers, 2 of them in each of 3 heads."""
    return lambda **overrides: NeuroTrailsLlamaConfig(
        **{**SMALL, "num_ensemble_heads": 3, "num_head_layers": 2, **overrides}
    )


@pytest.fixture
def make_model(make_config: Callable[..., NeuroTrailsLlamaConfig]) -> Callable[..., NeuroTrailsLlamaForCausalLM]:
    """`make_model(**config overrides)`: the same weights for the same overrides, in evaluation mode."""

    def make(**overrides: Any) -> NeuroTrailsLlamaForCausalLM:
        torch.manual_seed(0)
        return NeuroTrailsLlamaForCausalLM(make_config(**overrides)).eval()

    return make


@pytest.fixture
def make_dense() -> Callable[..., LlamaForCausalLM]:
    """`make_dense(**config overrides)`: a stock LLaMA whose norms and biases differ from their initial values."""

    def make(**overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        dense = LlamaForCausalLM(LlamaConfig(**SMALL | overrides)).eval()
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return dense

    return make


@pytest.fixture
def stock_from_head() -> Callable[[NeuroTrailsLlamaForCausalLM, int], LlamaForCausalLM]:
    """`stock_from_head(model, m)`: stock LLaMA with the weights of the backbone and head m."""

    def assemble(model: NeuroTrailsLlamaForCausalLM, m: int) -> LlamaForCausalLM:
        backbone_layers = model.config.num_hidden_layers - model.config.num_head_layers
        weights = {}
        for key, value in model.state_dict().items():
            if key.startswith("model.heads."):
                _, _, head, rest = key.split(".", 3)
                if int(head) != m:
                    continue
                if rest.startswith("layers."):
                    _, i, rest = rest.split(".", 2)
                    rest = f"layers.{backbone_layers + int(i)}.{rest}"
                weights[f"model.{rest}"] = value
            elif key.startswith("lm_heads."):
                if key == f"lm_heads.{m}.weight":
                    weights["lm_head.weight"] = value
            else:
                weights[key] = value
        stock = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        stock.load_state_dict(weights)
        return stock

    return assemble


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 10] token ids, none of them the padding token."""
    return torch.randint(1, SMALL["vocab_size"], (2, 10), generator=torch.Generator().manual_seed(1))
