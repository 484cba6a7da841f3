# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading, with the package and without it."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nt_transformers import NeuroTrailsLlamaForCausalLM


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_saving_and_loading_keeps_every_bit(make_model, tokens, tmp_path, head_layers, tied, shard_size):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=tied, vote="logits")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is NeuroTrailsLlamaForCausalLM
    assert not any(info.values()), info
    assert loaded.config.vote == "logits"
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("head_layers", [2, 4])
def test_tied_weights_are_written_once(make_model, tmp_path, head_layers):
    make_model(num_head_layers=head_layers, tie_word_embeddings=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(key.startswith("lm_heads.") for key in file.keys())  # noqa: SIM118 (not a dict)


def test_base_model_loads_from_a_language_model_checkpoint(make_model, tokens, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_config_round_trip_keeps_the_split(make_config, tmp_path):
    make_config(num_ensemble_heads=5, num_head_layers=0, vote="logits").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_ensemble_heads, config.num_head_layers, config.vote) == (5, 0, "logits")


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["nt_transformers"] = None  # any import of the package fails
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    expected = load_file(f"{folder}/expected.safetensors")
    tokens = expected["tokens"]
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_ensemble_heads == 3
    hidden_states = AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state
    assert torch.equal(hidden_states, expected["hidden_states"])
    if "logits" in expected:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model(tokens).logits, expected["logits"])
        assert model.generate(tokens, max_new_tokens=2).shape == (2, 12)
"""


def test_checkpoints_load_where_the_package_is_unknown(make_model, tokens, tmp_path):
    models = {f"causal_lm_{layers}": make_model(num_head_layers=layers) for layers in (2, 4)}
    models["base"] = models["causal_lm_2"].model
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = {"tokens": tokens, "hidden_states": model.base_model(tokens).last_hidden_state}
            if name != "base":
                expected["logits"] = model(tokens).logits
        save_file(expected, tmp_path / name / "expected.safetensors")

    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(str(tmp_path / name) for name in models)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
