# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""From a dense LLaMA to ensemble heads, and back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from nt_transformers import NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head attention": {"num_key_value_heads": 4},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
}


@pytest.mark.parametrize("head_layers", [0, 2, 4])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_the_vote_is_the_dense_model(make_dense, tokens, overrides, head_layers, vote):
    dense = make_dense(**overrides)
    model = NeuroTrailsLlamaForCausalLM.from_dense(dense, 3, head_layers, vote=vote)
    assert not model.training
    assert (model.config.model_type, model.config.vote) == ("neurotrails_llama", vote)
    expected, output = dense(tokens).logits, model(tokens, output_head_logits=True)
    torch.testing.assert_close(output.logits.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-6)
    for logits in output.head_logits:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_layers", [0, 2, 4])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_upcycling_and_extracting_round_trip(make_dense, overrides, head_layers):
    dense = make_dense(**overrides)
    model = NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, head_layers)
    for m in range(2):
        extracted = model.extract_head(m)
        assert type(extracted) is LlamaForCausalLM
        assert {**extracted.config.to_dict(), "dtype": None} == {**dense.config.to_dict(), "dtype": None}
        torch.testing.assert_close(extracted.state_dict(), dense.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_an_extracted_head_is_the_backbone_and_that_head(make_model, stock_from_head, tokens, head_layers):
    model = make_model(num_head_layers=head_layers)
    for m in range(3):
        extracted = model.extract_head(m)
        torch.testing.assert_close(extracted.state_dict(), stock_from_head(model, m).state_dict(), rtol=0, atol=0)
        model.active_heads = [m]
        torch.testing.assert_close(extracted(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_nothing_is_shared(make_dense, tokens):
    dense = make_dense()
    before = dense(tokens).logits
    model = NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 2)
    extracted = model.extract_head(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(dense(tokens).logits, before)
    assert torch.equal(extracted(tokens).logits, before)


def test_heads_train_apart_and_the_global_generator_stays(make_dense, tokens):
    dense = make_dense()
    state = torch.get_rng_state()
    model = NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 2, noise=0.1)
    model.extract_head(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_noise_is_relative_to_each_heads_weight(make_dense, tokens):
    dense = make_dense(hidden_size=64, intermediate_size=96)
    model = NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 2, noise=0.1, seed=1)
    weights = dense.state_dict()
    for name, weight in model.state_dict().items():
        stock = model._locate(name)[1]
        if "heads." not in name:
            assert torch.equal(weight, weights[stock]), name
        elif weight.ndim == 2:
            assert float((weight - weights[stock]).std() / weights[stock].std()) == pytest.approx(0.1, rel=0.1), name
    again, other = (NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 2, noise=0.1, seed=seed) for seed in (1, 2))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_checkpoint_is_upcycled_in_the_dtype_asked_for(make_dense, tokens, tmp_path):
    dense = make_dense()
    dense.generation_config.max_new_tokens = 3
    dense.save_pretrained(tmp_path)
    model = NeuroTrailsLlamaForCausalLM.from_dense(tmp_path, 2, 2)
    assert torch.equal(model.extract_head(0)(tokens).logits, dense(tokens).logits)
    assert model.generate(tokens).shape[1] == tokens.shape[1] + 3
    half = NeuroTrailsLlamaForCausalLM.from_dense(
        str(tmp_path), 2, 2, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == half.extract_head(1).config._attn_implementation == "eager"


def test_an_upcycled_model_saves_and_loads(make_dense, tokens, tmp_path):
    model = NeuroTrailsLlamaForCausalLM.from_dense(make_dense(tie_word_embeddings=True), 2, 4, noise=0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NeuroTrailsLlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


STOCK_ONLY = """
import sys
sys.modules["nt_transformers"] = None  # any import of the package fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(f"{sys.argv[1]}/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "LlamaForCausalLM"
assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
"""


def test_an_extracted_head_runs_where_the_package_is_unknown(make_model, tokens, tmp_path):
    head = make_model().extract_head(2)
    head.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys().isdisjoint({"auto_map", "num_ensemble_heads"})
    assert not list(tmp_path.glob("*.py"))
    assert len(load_file(tmp_path / "model.safetensors")) == len(head.state_dict())
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": head(tokens).logits}, tmp_path / "expected.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", STOCK_ONLY, str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mask_init", ["random", "soft_magnitude"])
def test_masks_set_equal_heads_apart(make_dense, tokens, mask_init):
    model = NeuroTrailsLlamaForCausalLM.from_dense(make_dense(), 3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    config = SparsityConfig(method="static", density=0.5, mask_init=mask_init)
    sparsifier = Sparsifier(model, optimizer, config, total_steps=10)
    assert sparsifier.density == pytest.approx(0.5, abs=1e-4)
    for name, mask in sparsifier.masks.items():
        if "heads.0." in name and not mask.all():
            for m in (1, 2):
                assert not torch.equal(mask, sparsifier.masks[name.replace("heads.0.", f"heads.{m}.")]), name
    first, *others = model(tokens, output_head_logits=True).head_logits
    assert all((first - other).abs().max() > 1e-3 for other in others)


class TestIncompatible:
    def test_another_architecture(self, tmp_path):
        other = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1, n_positions=16))
        other.save_pretrained(tmp_path)
        for dense in (other, tmp_path):
            with pytest.raises(ValueError, match=r"model_type='gpt2' \(GPT2LMHeadModel\).*LlamaForCausalLM"):
                NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 1)

    def test_a_model_without_output_layer(self, make_dense):
        with pytest.raises(ValueError, match=r"LlamaModel\).*LlamaForCausalLM"):
            NeuroTrailsLlamaForCausalLM.from_dense(make_dense().model, 2, 1)

    def test_a_model_that_is_an_ensemble(self, make_model):
        with pytest.raises(ValueError, match="neurotrails_llama"):
            NeuroTrailsLlamaForCausalLM.from_dense(make_model(), 2, 1)

    def test_quantized(self, make_dense):
        dense = make_dense()
        dense.config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(ValueError, match="quantization_config"):
            NeuroTrailsLlamaForCausalLM.from_dense(dense, 2, 1)

    @pytest.mark.parametrize(
        ("heads", "layers", "options", "message"),
        [
            (0, 2, {}, "num_ensemble_heads=0"),
            (2, 5, {}, "num_head_layers=5"),
            (2, 2, {"vote": "borda"}, "vote='borda'"),
            (2, 2, {"noise": -0.1}, "noise=-0.1"),
            (2, 2, {"dtype": torch.bfloat16}, "dtype: options of loading"),
        ],
    )
    def test_arguments(self, make_dense, heads, layers, options, message):
        with pytest.raises(ValueError, match=message):
            NeuroTrailsLlamaForCausalLM.from_dense(make_dense(), heads, layers, **options)

    @pytest.mark.parametrize("m", [-1, 3])
    def test_a_head_that_is_not_there(self, make_model, m):
        with pytest.raises(ValueError, match=f"m={m}.*0 to 2"):
            make_model().extract_head(m)
