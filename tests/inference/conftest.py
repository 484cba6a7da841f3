# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Kernels compiled once for the test session, and small sparse models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.inference import native, products


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def kernels_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts as slower, whatever this machine is busy with."""
    monkeypatch.setattr(products, "_timed", {})
    monkeypatch.setattr(products, "MARGIN", 0)


@pytest.fixture(params=native.supported_instruction_sets())
def _each_instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NT_TRANSFORMERS_INSTRUCTION_SET", request.param)


MakeModel = Callable[..., NeuroTrailsLlamaForCausalLM]


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model(density, **config fields)`: 3 layers, 2 of them in each of 3 heads, 30 % of the weights not zero."""

    def make(density: float = 0.3, dtype: torch.dtype = torch.float32, **fields: Any) -> NeuroTrailsLlamaForCausalLM:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 99,
            "hidden_size": 64,
            "intermediate_size": 81,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_ensemble_heads": 3,
            "num_head_layers": 2,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**shape | fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(torch.rand_like(parameter) < density)
        return model.to(dtype)

    return make
