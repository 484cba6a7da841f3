# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoding and prompts by the kernels predict and generate as the model does that was compressed."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from generated import MASK, TOKENS, assert_same_generation, generate
from transformers import DynamicCache

from nt_transformers.inference import compress, products
from nt_transformers.inference.decoding import Decoder, GrowingLayer


# For each: [heads, head layers, active heads].
STRUCTURES = [(3, 2, 3), (3, 2, [2, 0]), (3, 3, 3), (3, 3, [1]), (2, 0, 2), (1, 2, 1)]


@pytest.mark.parametrize(("heads", "head_layers", "active"), STRUCTURES)
def test_prediction_and_generation_are_those_of_the_model(make_model, heads, head_layers, active) -> None:
    model = make_model(num_ensemble_heads=heads, num_head_layers=head_layers)
    model.active_heads = active
    compressed = compress(copy.deepcopy(model), "fp32")
    with torch.no_grad():
        torch.testing.assert_close(compressed(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    one = generate(compressed)
    assert_same_generation(one, generate(model))
    assert isinstance(one.past_key_values.layers[0], GrowingLayer), "one text is decoded by the kernels"
    assert_same_generation(generate(compressed, batch=2), generate(model, batch=2))


@pytest.mark.usefixtures("kernels_multiply")
@pytest.mark.parametrize("mixed", [False, True])
def test_few_weights(make_model, mixed: bool) -> None:
    model = make_model(density=0.03)
    if mixed:  # what takes the same input may be of different density
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.normal_(std=0.2)
            model.model.heads[1].layers[0].mlp.up_proj.weight.normal_(std=0.2)
    compressed = compress(copy.deepcopy(model), "fp32")
    assert_same_generation(generate(compressed), generate(model))
    assert_same_generation(generate(compressed, batch=2), generate(model, batch=2))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"max_new_tokens": 1}])
def test_other_ways_of_generating(make_model, options) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    assert torch.equal(generate(compressed, **options).sequences, generate(model, **options).sequences)


@pytest.mark.usefixtures("kernels_multiply")
def test_several_tokens_of_padded_texts_are_decoded_in_one_call(make_model) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    mask = MASK.clone()
    mask[0, :2] = 0
    with torch.no_grad():
        prompt = {"input_ids": TOKENS[:, :4], "attention_mask": mask[:, :4]}
        caches = [network(**prompt).past_key_values for network in (model, compressed)]
        expected, logits = (
            network(TOKENS[:, 4:], attention_mask=mask, past_key_values=cache).logits
            for network, cache in zip((model, compressed), caches, strict=True)
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(caches[1].layers[0], GrowingLayer)


def test_left_padding(make_model) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    mask = MASK[:1].clone()
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(compressed.generate(TOKENS[:1], **options), model.generate(TOKENS[:1], **options))


def test_active_heads_may_change_between_texts(make_model) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    for active in (3, 1, [2, 1], 3):
        model.active_heads = compressed.active_heads = active
        assert_same_generation(generate(compressed), generate(model))


def test_a_cache_filled_by_decoding_goes_on_the_usual_way(make_model) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    with torch.no_grad():
        cache = compressed(TOKENS[:1, :3], use_cache=True).past_key_values
        pieces = [compressed(TOKENS[:1, t : t + 1], past_key_values=cache).logits for t in (3, 4)]
        cache.crop(-1)
        pieces.append(compressed(TOKENS[:1, 4:6], past_key_values=cache).logits)
        pieces.append(compressed(TOKENS[:1, 6:], past_key_values=cache).logits)
        whole = model(TOKENS[:1]).logits
    torch.testing.assert_close(torch.cat(pieces[:2], 1), whole[:, 3:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(pieces[2:], 1), whole[:, 4:], rtol=1e-4, atol=1e-4)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8"])
def test_a_bfloat16_model(make_model, values) -> None:
    """Decoding computes in float32 between bfloat16 roundings: as near to the exact model as torch's bfloat16."""
    exact = make_model()
    model = exact.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    compressed = compress(copy.deepcopy(model), values)
    with torch.no_grad():
        cache = compressed(TOKENS[:1, :-1], use_cache=True).past_key_values
        probs = compressed(TOKENS[:1, -1:], past_key_values=cache).logits[0, -1].float().exp()
        expected = exact(TOKENS[:1]).logits[0, -1].exp()
    torch.testing.assert_close(probs, expected, rtol=0, atol=0.02)


def _sliced(model: Any) -> list[list[bool]]:
    """Whether q, k, v, o, gate, up and down of each layer are multiplied by slices when one token is decoded."""
    plan = next(made.plan for (_, _, few), made in Decoder.of(model)._plans.items() if few)
    fields = ("query", "key", "value", "output", "gate", "up", "down")
    depth = model.config.num_backbone_layers + plan.heads * plan.head_depth
    return [[bool(getattr(plan.layers[i], name).slices) for name in fields] for i in range(depth)]


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("dense_layer", [None, "layers.0.self_attn.k_proj", "heads.1.layers.1.mlp.up_proj"])
def test_decoding_by_slices(make_model, monkeypatch, values, dense_layer) -> None:
    """Their sums are in another order; a matrix without them takes them from those that multiply the same input."""
    model = make_model(dtype=torch.bfloat16)
    if dense_layer:
        torch.nn.init.normal_(model.model.get_submodule(dense_layer).weight, std=0.2)
    compressed = compress(model, values)
    monkeypatch.setattr(products, "quicker_sliced", lambda _: False)
    expected = generate(compressed)
    assert not np.any(_sliced(compressed))
    monkeypatch.setattr(products, "quicker_sliced", lambda _: True)
    sliced = copy.deepcopy(compressed)
    actual = generate(sliced)
    # As far apart as rounding to bfloat16 takes them.
    for a, b in zip(actual.logits[:2], expected.logits[:2], strict=True):
        torch.testing.assert_close(a.float().exp(), b.float().exp(), rtol=0, atol=0.02)
    unsliced = {
        None: [],
        "layers.0.self_attn.k_proj": [(0, 0), (0, 1), (0, 2)],
        "heads.1.layers.1.mlp.up_proj": [(4, 4), (4, 5)],
    }
    assert list(zip(*np.nonzero(~np.array(_sliced(sliced))), strict=True)) == unsliced[dense_layer]


def test_slices_of_some_matrices_of_an_input_are_left_alone(make_model, monkeypatch) -> None:
    compressed = compress(make_model(dtype=torch.bfloat16))
    monkeypatch.setattr(products, "quicker_sliced", lambda _: False)
    expected = generate(compressed)
    partly = copy.deepcopy(compressed)
    for layer in (*partly.model.layers, *partly.model.heads[2].layers):
        layer.self_attn.q_proj.kernel.slice()
    assert_same_generation(generate(partly), expected)
    assert not np.any(_sliced(partly))


def _load_alone(model: Any, other: Any, **kwargs: Any) -> None:
    """The weights of one linear layer and one norm of another model."""
    for name in ("heads.1.layers.0.mlp.down_proj", "layers.0.input_layernorm"):
        model.model.get_submodule(name).load_state_dict(other.model.get_submodule(name).state_dict(), **kwargs)


@pytest.mark.usefixtures("kernels_multiply")
@pytest.mark.parametrize(
    "change",
    [
        _load_alone,
        lambda model, other: _load_alone(model, other, assign=True),
        lambda model, other: model.load_state_dict(other.state_dict()),
        lambda model, _: model.model.layers[0].self_attn.q_proj.values.mul_(2),
        lambda model, _: model.model.heads[2].layers[1].mlp.gate_proj.scales.mul_(2),
        lambda model, _: model.model.heads[0].norm.weight.mul_(2),
        lambda model, _: model.lm_heads[1].values.zero_(),
    ],
    ids=["of a submodule", "assigned", "all", "in place", "scales", "a norm", "of an output layer"],
)
def test_decoding_follows_weights_that_change(make_model, monkeypatch, change) -> None:
    monkeypatch.setattr(products, "quicker_sliced", lambda _: True)
    model = make_model(dtype=torch.bfloat16)
    # As many weights in every layer, elsewhere.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    compressed, other = compress(model, "int8"), compress(other, "int8")
    before = generate(compressed)
    change(compressed, other)
    found, expected = generate(compressed), generate(copy.deepcopy(compressed))
    assert_same_generation(found, expected)
    assert not torch.equal(torch.stack(found.logits), torch.stack(before.logits))


@pytest.mark.usefixtures("kernels_multiply")
def test_plans_are_kept_until_weights_change(make_model) -> None:
    """Weights made in inference mode, which do not count their changes, included."""
    compressed = compress(make_model())
    layer = compressed.model.layers[0].self_attn.q_proj
    with torch.inference_mode():
        layer.values = layer.values.clone()
    generate(compressed)
    decoder = Decoder.of(compressed)
    plans = dict(decoder._plans)
    generate(compressed)
    assert decoder._plans == plans
    assert len(plans) == 2  # of the prompt and of a token
    compressed.model.heads[1].norm.weight.mul_(2)
    with torch.no_grad():
        found = compressed(TOKENS[:1, :1]).logits
        expected = copy.deepcopy(compressed)(TOKENS[:1, :1]).logits
    assert torch.equal(found, expected)
    assert len(decoder._plans) == 1  # the other one would keep the old weights


def test_threads_that_decode_at_once_for_the_first_time(make_model, monkeypatch) -> None:
    monkeypatch.setattr(products, "quicker_sliced", lambda _: True)
    compressed = compress(make_model(dtype=torch.bfloat16, hidden_size=256))
    expected = generate(copy.deepcopy(compressed)).sequences
    for _ in range(5):
        shared, barrier = copy.deepcopy(compressed), threading.Barrier(4)

        def decode(shared: Any = shared, barrier: threading.Barrier = barrier) -> torch.Tensor:
            barrier.wait()
            return generate(shared).sequences

        with ThreadPoolExecutor(4) as pool:
            for found in [pool.submit(decode) for _ in range(4)]:
                assert torch.equal(found.result(), expected)
