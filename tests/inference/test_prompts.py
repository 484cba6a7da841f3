# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Texts of any length go through the kernels in one call, and come out as the model itself computes them."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nt_transformers.inference import AdaptiveVoting, compress
from nt_transformers.inference.decoding import Decoder, GrowingLayer


pytestmark = pytest.mark.usefixtures("kernels_multiply")


def random_texts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padding(batch: int, length: int) -> torch.Tensor:
    """The first text is whole, each further one begins a third of the length later."""
    starts = torch.arange(batch)[:, None] * (length // 3)
    return (torch.arange(length) >= starts).long()


def assert_equal_where_seen(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()], **{"rtol": 1e-4, "atol": 1e-4, **kwargs})


@pytest.fixture
def refuse_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes the usual way."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the decoder layers run in torch")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", refuse)


@pytest.fixture
def pair(make_model):
    """`pair(**fields)`: a model, and the same compressed without loss."""

    def make(**fields: Any) -> tuple[Any, Any]:
        model = make_model(**fields)
        return model, compress(copy.deepcopy(model), "fp32")

    return make


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [2, 6, 17, 32, 33, 64, 130])
def test_texts_of_any_length(pair, batch: int, length: int) -> None:
    model, compressed = pair()
    tokens, mask = random_texts(batch, length), left_padding(batch, length)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=True)
        actual = compressed(tokens, attention_mask=mask, use_cache=True)
    assert_equal_where_seen(actual.logits, expected.logits, mask)
    assert actual.logits.isfinite().all()
    for layer, other in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert isinstance(layer, GrowingLayer)
        for name in ("keys", "values"):
            assert_equal_where_seen(getattr(layer, name).transpose(1, 2), getattr(other, name).transpose(1, 2), mask)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_head_layers": 0, "num_ensemble_heads": 2},
        {"num_head_layers": 3},
        {"num_ensemble_heads": 1},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"hidden_size": 72, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48},
    ],
    ids=str,
)
def test_networks_of_any_shape(pair, fields: dict[str, int]) -> None:
    model, compressed = pair(**fields)
    tokens = random_texts(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(compressed(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("active", [[1], [2, 0]])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("length", [7, 40])
def test_active_heads_with_and_without_a_cache(pair, active: list[int], use_cache: bool, length: int) -> None:
    model, compressed = pair()
    model.active_heads = compressed.active_heads = active
    tokens = random_texts(2, length)
    with torch.no_grad():
        actual = compressed(tokens, use_cache=use_cache)
        torch.testing.assert_close(actual.logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (actual.past_key_values is not None) == use_cache


@pytest.mark.parametrize("pieces", [[90, 1, 3, 40], [3, 70, 20], [1, 1, 100]])
def test_a_text_in_pieces_is_the_text_as_a_whole(pair, pieces: list[int]) -> None:
    model, compressed = pair()
    tokens = random_texts(2, sum(pieces))
    mask = torch.ones_like(tokens)
    mask[1, : pieces[0] // 2] = 0
    cache, logits, end = DynamicCache(), [], 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        for length in pieces:
            start, end = end, end + length
            step = compressed(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(step.logits)
    assert_equal_where_seen(torch.cat(logits, 1), expected, mask)


def test_many_long_texts_are_read_some_at_a_time(pair) -> None:
    model, compressed = pair()
    tokens = random_texts(5, 300)
    with torch.no_grad():
        torch.testing.assert_close(compressed(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8"])
def test_a_bfloat16_model(make_model, values) -> None:
    """As near to the exact model as torch's bfloat16."""
    model = make_model(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    compressed = compress(copy.deepcopy(model), values)
    tokens = random_texts(2, 80)
    with torch.no_grad():
        expected = exact(tokens).logits.exp()
        assert expected.sum(-1).allclose(torch.ones(()), atol=1e-3)
        torch.testing.assert_close(compressed(tokens).logits.float().exp(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(pair, threads: int) -> None:
    _, compressed = pair()
    tokens, before = random_texts(2, 150), torch.get_num_threads()
    with torch.no_grad():
        expected = compressed(tokens).logits
        try:
            torch.set_num_threads(threads)
            assert torch.equal(compressed(tokens).logits, expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_adaptive_voting_reads_prompts_by_the_kernels(pair, refuse_torch, threshold: float) -> None:
    _, compressed = pair()
    tokens = random_texts(2, 40)
    with AdaptiveVoting(compressed, threshold) as voting, torch.no_grad():
        compressed.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert voting.predictions == 8


@pytest.mark.usefixtures("refuse_torch")
def test_generation_never_leaves_the_kernels(pair) -> None:
    _, compressed = pair()
    tokens = random_texts(2, 40)
    compressed.generate(tokens, attention_mask=left_padding(2, 40), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        compressed(tokens, use_cache=False)


def test_what_the_kernels_cannot_do_goes_the_usual_way(pair) -> None:
    model, compressed = pair()
    assert Decoder.of(compressed) is not None
    tokens = random_texts(2, 40)
    middle = torch.ones_like(tokens)
    middle[:, 10:12] = 0
    right = torch.ones_like(tokens)
    right[0, -5:] = 0
    with torch.no_grad():
        for mask in (middle, right):
            expected = model(tokens, attention_mask=mask).logits
            assert_equal_where_seen(compressed(tokens, attention_mask=mask).logits, expected, mask)
        states = compressed(tokens, output_hidden_states=True).hidden_states
        assert len(states) == len(model(tokens, output_hidden_states=True).hidden_states)
