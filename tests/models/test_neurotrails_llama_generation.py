# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Generation by a NeuroTrails LLaMA, whatever its heads, and by stock LLaMA, which has to pass the same tests."""

import itertools

import pytest
import torch
from generation import GenerationTests, SlowGenerationTests


class NeuroTrailsLlama:
    """The model, out of `request.param`: ensemble heads, layers in a head, the heads that are active."""

    @pytest.fixture
    def model(self, request, make_model):
        heads, head_layers, active = request.param
        model = make_model(num_ensemble_heads=heads, num_head_layers=head_layers).double()
        model.active_heads = active
        return model

    @pytest.fixture
    def num_slots(self, model):
        return model.config.num_hidden_layers + (len(model.active_heads) - 1) * model.config.num_head_layers

    @pytest.fixture
    def assistant(self, make_dense):
        return make_dense(num_hidden_layers=2).double()


class StockLlama:
    @pytest.fixture
    def model(self, make_dense):
        return make_dense().double()

    @pytest.fixture
    def assistant(self, make_model):
        return make_model().double()


STRUCTURES = [(1, 2, 1), (3, 0, 3), (3, 2, 3), (3, 2, [1]), (3, 4, [2, 0])]


@pytest.mark.parametrize("model", STRUCTURES, ids=str, indirect=True)
class TestNeuroTrailsLlama(NeuroTrailsLlama, GenerationTests):
    pass


@pytest.mark.parametrize("model", [(3, 2, [2, 0])], ids=str, indirect=True)
class TestNeuroTrailsLlamaSlowly(NeuroTrailsLlama, SlowGenerationTests):
    pass


class TestStockLlama(StockLlama, GenerationTests):
    pass


class TestStockLlamaSlowly(StockLlama, SlowGenerationTests):
    pass


@pytest.mark.parametrize("head_layers", range(5))
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_cached_equals_uncached_for_every_choice_of_heads(make_model, tokens, heads, head_layers):
    model = make_model(num_ensemble_heads=heads, num_head_layers=head_layers).double()
    choices = [list(c) for size in range(1, heads + 1) for c in itertools.permutations(range(heads), size)]
    for choice in choices:
        model.active_heads = choice
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        cached = model(tokens[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(cached, model(tokens, use_cache=False).logits[:, 6:], rtol=1e-5, atol=1e-5)


def test_from_embeddings(make_model, tokens):
    model = make_model().double()
    options = {"max_new_tokens": 5, "do_sample": False}
    embeds = model.get_input_embeddings()(tokens)
    from_tokens = model.generate(tokens, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), from_tokens[:, 10:])
    static = model.generate(inputs_embeds=embeds, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, from_tokens[:, 10:])
