# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Cached generation equals uncached generation, whatever the heads and the padding."""

import pytest
import torch
from transformers import DynamicCache


STRUCTURES = [(1, 2), (3, 0), (3, 2), (3, 4), (1, 4)]
HEAD_CHOICES = [3, 1, [1], [2, 0]]


def greedy_by_hand(model, tokens, attention_mask, steps):
    """New tokens [batch, steps] and their logits [batch, steps, vocab], the whole text run again for every token."""
    all_logits = []
    for _ in range(steps):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits[:, -1]
        all_logits.append(logits)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(tokens), 1)], 1)
    return tokens[:, -steps:], torch.stack(all_logits, 1)


def check_generation(model, tokens, attention_mask, **kwargs):
    # In float32 the order of summation alone, which differs from processor to processor, can exceed the tolerance.
    model = model.double()
    with torch.no_grad():
        expected_tokens, expected_logits = greedy_by_hand(model, tokens, attention_mask, 5)
    out = model.generate(
        tokens,
        attention_mask=attention_mask,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    assert torch.equal(out.sequences[:, -5:], expected_tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected_logits.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def left_padded(tokens):
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :4] = 0
    return tokens.masked_fill(attention_mask == 0, 0), attention_mask


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("heads", "head_layers"), STRUCTURES)
def test_generation_with_left_padding(make_model, left_padded, heads, head_layers, use_cache):
    model = make_model(num_ensemble_heads=heads, num_head_layers=head_layers)
    check_generation(model, *left_padded, use_cache=use_cache)


@pytest.mark.parametrize("choice", HEAD_CHOICES)
@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_generation_with_some_of_the_heads(make_model, left_padded, head_layers, choice):
    model = make_model(num_head_layers=head_layers)
    model.active_heads = choice
    check_generation(model, *left_padded)


@pytest.mark.parametrize("choice", HEAD_CHOICES)
@pytest.mark.parametrize("head_layers", [2, 4])
def test_generation_with_a_static_cache(make_model, left_padded, head_layers, choice):
    model = make_model(num_head_layers=head_layers)
    model.active_heads = choice
    check_generation(model, *left_padded, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_left_padding_does_not_change_a_text(make_model, left_padded, head_layers):
    model = make_model(num_head_layers=head_layers)
    padded, attention_mask = left_padded
    kwargs = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(padded, attention_mask=attention_mask, **kwargs)
    alone = model.generate(padded[:1, 4:], attention_mask=attention_mask[:1, 4:], **kwargs)
    assert torch.equal(together.sequences[:1, 4:], alone.sequences)
    for with_padding, without in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(with_padding[:1], without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "head_layers"), STRUCTURES)
def test_prompt_in_pieces_through_the_cache(make_model, tokens, heads, head_layers):
    model = make_model(num_ensemble_heads=heads, num_head_layers=head_layers)
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 10
    assert len(cache.layers) == 4 - head_layers + heads * head_layers
    assert all(layer.get_seq_length() == 10 for layer in cache.layers)


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_every_earlier_token_counts(make_model, tokens, head_layers):
    model = make_model(num_head_layers=head_layers)
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    cached = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
    for position in range(9):
        changed = tokens.clone()
        changed[:, position] = changed[:, position] % 60 + 1
        other = model(changed[:, :-1], use_cache=True).past_key_values
        assert (model(changed[:, -1:], past_key_values=other).logits[:, -1] - cached).abs().max() > 1e-4
