# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Texts of any length go through the kernels in one call, and come out as the model itself computes them."""

import copy
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

from nt_transformers.inference import AdaptiveVoting, compress, products
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
@pytest.mark.parametrize("length", [2, 5, 17, 32, 33, 64, 130])
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


@pytest.mark.parametrize("texts", [2, 20])
def test_adaptive_voting_of_few_and_many_texts(pair, texts: int) -> None:
    model, compressed = pair()
    tokens = random_texts(texts, 30)
    options = {"attention_mask": left_padding(texts, 30), "max_new_tokens": 6, "do_sample": False}
    options["attention_mask"][:, -1] = 1
    with AdaptiveVoting(compressed, 2.0):
        assert torch.equal(compressed.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_adaptive_voting_reads_prompts_by_the_kernels(pair, refuse_torch, threshold: float) -> None:
    _, compressed = pair()
    tokens = random_texts(2, 40)
    with AdaptiveVoting(compressed, threshold) as voting, torch.no_grad():
        compressed.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert voting.predictions == 8


@pytest.mark.parametrize("length", [1, 4])
def test_many_short_texts(pair, length: int) -> None:
    model, compressed = pair()
    tokens = random_texts(20, 6 + length)
    cache = DynamicCache()
    with torch.no_grad():
        compressed(tokens[:, :6], past_key_values=cache)
        logits = compressed(tokens[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(tokens).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_beams_of_many_texts(pair) -> None:
    model, compressed = pair()
    tokens = random_texts(6, 30)
    options = {"attention_mask": torch.ones_like(tokens), "num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(compressed.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_drafts_by_early_exit(pair, exit_layer: int) -> None:
    model, compressed = pair()
    tokens = random_texts(1, 30)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **options)
    for options_ in (options, options | {"assistant_early_exit": exit_layer}, options):
        assert torch.equal(compressed.generate(tokens, **options_), expected)


@pytest.mark.usefixtures("refuse_torch")
def test_generation_never_leaves_the_kernels(pair) -> None:
    _, compressed = pair()
    tokens = random_texts(2, 40)
    compressed.generate(tokens, attention_mask=left_padding(2, 40), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        compressed(tokens, use_cache=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": (torch.arange(40) // 2 != 5).long().repeat(2, 1)},
        {"attention_mask": (torch.arange(40) < 35).long().repeat(2, 1)},
        {"attention_mask": torch.ones(1, 40)},
        {"position_ids": torch.arange(40)[None] % 13, "use_cache": False},
        {"position_ids": torch.zeros(1, 1, dtype=torch.int64)},
        {"position_ids": torch.arange(40)[None] * 2},
        {"is_causal": False},
        {"output_hidden_states": True},
        {"return_dict": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_any_argument_means_what_it_means_to_the_model(pair, arguments: dict[str, Any]) -> None:
    model, compressed = pair()
    assert Decoder.of(compressed) is not None
    tokens = random_texts(2, 40)
    with torch.no_grad():
        expected, actual = model(tokens, **arguments), compressed(tokens, **arguments)
    mask = torch.broadcast_to(arguments.get("attention_mask", torch.ones(())), tokens.shape)
    assert_equal_where_seen(actual.logits, expected.logits, mask)
    assert actual.keys() == expected.keys()


def test_what_is_wrong_stays_wrong(pair) -> None:
    _, compressed = pair()
    with torch.no_grad(), pytest.raises(RuntimeError):
        compressed(random_texts(2, 40), position_ids=torch.arange(41)[None])


def test_a_tuple_on_request(pair) -> None:
    _, compressed = pair()
    with torch.no_grad():
        assert isinstance(compressed.model(input_ids=random_texts(1, 40), return_dict=False), tuple)


def test_a_cache_goes_from_hand_to_hand(pair) -> None:
    """Reset, copied, filled without autograd's records and continued in torch."""
    model, compressed = pair()
    tokens = random_texts(1, 50)
    with torch.inference_mode():
        cache = compressed(tokens[:, :40]).past_key_values
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(tokens).logits[:, 40:]
        for one in (cache, copied):
            logits = compressed(tokens[:, 40:], past_key_values=one, output_hidden_states=True).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        cache.reset()
        whole = compressed(tokens, past_key_values=cache, output_hidden_states=True).logits
        torch.testing.assert_close(whole[:, 40:], expected, rtol=1e-4, atol=1e-4)


def test_layers_of_unequal_room(pair) -> None:
    model, compressed = pair()
    tokens = random_texts(1, 41)
    with torch.no_grad():
        cache = compressed(tokens[:, :40]).past_key_values
        cache.layers[0].resize(90)
        cache.layers[3].resize(43)
        logits = compressed(tokens[:, 40:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(tokens).logits[:, 40:], rtol=1e-4, atol=1e-4)


def test_a_backlog_goes_back_to_torch(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = compress(make_model(dtype=torch.bfloat16))
    tokens = random_texts(1, 40)
    cache = DynamicCache()
    with torch.no_grad():
        with AdaptiveVoting(compressed, 0.0):
            compressed(tokens[:, :30], past_key_values=cache)
            compressed(tokens[:, 30:39], past_key_values=cache)
        with AdaptiveVoting(compressed, 2.0):
            monkeypatch.setattr(products, "quicker_dense", lambda _, n, __: torch.float32 if n > 1 else None)
            cast(Any, Decoder.of(compressed))._quicker.clear()
            logits = compressed(tokens[:, 39:], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert all(layer.keys.dtype == torch.bfloat16 for layer in cache.layers)
