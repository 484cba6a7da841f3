# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Adaptive voting predicts as if all heads had run on every token and voted where the first is unsure."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nt_transformers.inference import AdaptiveScores, AdaptiveVoting, compress
from nt_transformers.inference.adaptive import certainty
from nt_transformers.inference.decoding import GrowingLayer


TOKENS = torch.randint(1, 99, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
LEFT_PADDED = MASK.clone()
LEFT_PADDED[0, :3] = LEFT_PADDED[2, :1] = 0
# For each: fields of the configuration, active heads.
STRUCTURES = [
    ({}, 3),
    ({}, [2, 0]),
    ({"vote": "logits"}, 3),
    ({"num_head_layers": 3}, [1, 2]),
    ({"num_head_layers": 0}, 3),
    ({"dtype": torch.bfloat16}, 3),
]


def generate(model: Any, mask: torch.Tensor = MASK, **kwargs: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(TOKENS[: len(mask)], attention_mask=mask, **options | kwargs)


@torch.no_grad()
def reference(model: Any, tokens: torch.Tensor, mask: torch.Tensor, threshold: float, measure: str) -> Any:
    """Logits and which of them are the vote's: every head runs on every token, without a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(tokens, attention_mask=mask, position_ids=positions, output_head_logits=True, use_cache=False)
    probs = output.head_logits[0].double().softmax(-1)
    if measure == "margin":
        largest = probs.sort(-1).values
        sure = largest[..., -1] - largest[..., -2]
    else:
        sure = 1 + (probs * probs.clamp(min=1e-300).log()).sum(-1) / math.log(probs.shape[-1])
    unsure = sure < threshold
    return torch.where(unsure[..., None], output.logits, output.head_logits[0]), unsure


def usual_certainty(model: Any, measure: str = "margin", mask: torch.Tensor = MASK, **kwargs: Any) -> float:
    """Amid those over the tokens that the vote generates, and not just at one of them."""
    tokens = generate(model, mask, **kwargs).sequences
    with torch.no_grad():
        head_logits = model(tokens, output_head_logits=True).head_logits
    certainties = certainty(head_logits[0, :, mask.shape[1] :], measure).flatten().sort().values
    middle = len(certainties) // 2
    return float(certainties[middle - 1 : middle + 1].mean())


def assert_as_the_reference(
    model: Any, adaptive: Any, mask: torch.Tensor, voting: AdaptiveVoting, generated: Any
) -> None:
    tokens, logits = generated.sequences, torch.stack(generated.logits, 1).float()
    whole_mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
    expected, unsure = reference(model, tokens, whole_mask, voting.threshold, voting.measure)
    steps = slice(mask.shape[1] - 1, -1)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    same_kind = (logits.softmax(-1) - expected[:, steps].float().softmax(-1)).abs().amax(-1)
    assert same_kind.max() < tolerance
    assert voting.share == pytest.approx(float(unsure[:, steps].float().mean()), abs=0.02)


@pytest.mark.parametrize(("fields", "active", "values"), [*((*one, None) for one in STRUCTURES), ({}, 3, "fp32")])
def test_always_is_the_full_vote_and_never_the_first_head(make_model, fields, active, values) -> None:
    model = make_model(**fields)
    if values is not None:
        compress(model, values)
    model.active_heads = active
    full = generate(model)
    with AdaptiveVoting(model, threshold=2) as voting:
        always = generate(model)
        assert voting.share == 1
    with AdaptiveVoting(model, threshold=0) as voting:
        never = generate(model)
        assert voting.share == 0
    model.active_heads = model.active_heads[:1]
    for adaptive, usual in ((always, full), (never, generate(model))):
        assert torch.equal(adaptive.sequences, usual.sequences)
        torch.testing.assert_close(adaptive.logits, usual.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [MASK[:1], MASK, LEFT_PADDED], ids=["one", "batch", "left padding"])
@pytest.mark.parametrize(("measure", "do_sample"), [("margin", False), ("entropy", True)])
@pytest.mark.usefixtures("kernels_multiply")
def test_between_it_votes_where_the_first_head_is_unsure(make_model, mask, measure, do_sample) -> None:
    model = make_model()
    torch.manual_seed(0)
    threshold = usual_certainty(model, measure, mask, do_sample=do_sample)
    plain = copy.deepcopy(model)
    for adaptive in (plain, compress(copy.deepcopy(model), "fp32")):
        torch.manual_seed(1)
        with AdaptiveVoting(adaptive, threshold, measure) as voting:
            generated = generate(adaptive, mask, do_sample=do_sample)
        layers = generated.past_key_values.layers
        kernels_decode = adaptive is not plain
        assert all(isinstance(layer, GrowingLayer) == kernels_decode for layer in layers[:-1])
        assert 0 < voting.share < 1
        assert_as_the_reference(model, adaptive, mask, voting, generated)


@pytest.mark.parametrize(("fields", "active"), STRUCTURES)
def test_every_structure_between(make_model, fields, active) -> None:
    model = make_model(**fields)
    model.active_heads = active
    with AdaptiveVoting(copy.deepcopy(model), usual_certainty(model)) as voting:
        generated = generate(voting.model)
    assert 0 < voting.share < 1
    assert_as_the_reference(model, voting.model, MASK, voting, generated)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}])
def test_other_ways_of_generating_agree_with_having_no_cache(make_model, options) -> None:
    model = make_model()
    threshold = usual_certainty(model)
    tokens = TOKENS[:1].repeat(1, 2)
    with AdaptiveVoting(model, threshold):
        first = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, **options)
        options = {name: value for name, value in options.items() if name == "num_beams"}
        plain = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, use_cache=False, **options
        )
    assert torch.equal(first, plain)


@torch.no_grad()
@pytest.mark.parametrize(("values", "batch"), [(None, 2), ("fp32", 2), ("fp32", 1)])
def test_catching_up_after_a_long_gap_and_after_going_back(make_model, values, batch) -> None:
    """The vote of a late token is that of a network that ran all its heads all along."""
    model = make_model()
    tokens = torch.randint(1, 99, (batch, 60), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits
    if values is not None:
        compress(model, values)
    with AdaptiveVoting(model, threshold=0) as voting:
        cache = model(tokens[:, :5]).past_key_values
        for t in range(5, 40):
            model(tokens[:, t : t + 1], past_key_values=cache)
        voting.threshold = 2
        pieces = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in (40, 41)]
        voting.threshold = 0
        for t in range(42, 50):
            model(tokens[:, t : t + 1], past_key_values=cache)
        cache.crop(-5)
        voting.threshold = 2
        pieces.append(model(tokens[:, 45:48], past_key_values=cache).logits)
        cache.reorder_cache(torch.arange(batch).flip(0))
        pieces.append(model(tokens[:, 48:].flip(0), past_key_values=cache).logits.flip(0))
    torch.testing.assert_close(torch.cat(pieces[:2], 1), expected[:, 40:42], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(pieces[2:], 1), expected[:, 45:], rtol=1e-4, atol=1e-4)


def test_embeddings_instead_of_tokens(make_model) -> None:
    for head_layers in (2, 3):
        model = make_model(num_head_layers=head_layers)
        embeds = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
        plain = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
        with AdaptiveVoting(model, 2):
            assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False), plain)


def test_certainty_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [1.0, 1e-30, 1e-30]]).log()
    torch.testing.assert_close(certainty(logits, "margin"), torch.tensor([0.2, 0.0, 1.0]))
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)) / math.log(3)
    torch.testing.assert_close(certainty(logits, "entropy"), torch.tensor([1 - entropy, 0.0, 1.0]), rtol=0, atol=1e-6)


class TestScores:
    def test_those_of_adaptive_voting(self, make_model) -> None:
        """One pass of scoring tells what the model would do at any threshold."""
        model = make_model()
        labels = TOKENS.clone()
        labels[1, :4] = labels[2, 2] = -100
        scores = AdaptiveScores.of(
            model, [{"input_ids": TOKENS[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2)]
        )
        for threshold in (0, float(scores.certainty.median()) + 1e-4, 2):
            with AdaptiveVoting(model, threshold) as voting:
                logits = model(TOKENS).logits[:, :-1].reshape(-1, 99)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            assert scores.perplexity(threshold) == pytest.approx(float(loss.exp()), rel=1e-4)
        assert voting.share == scores.share(2) == 1
        assert scores.share(0) == 0

    def test_padding_counts_for_nothing(self, make_model) -> None:
        model = make_model()
        labels = TOKENS[:2].clone()
        labels[0, :3] = -100
        padding = torch.ones_like(labels)
        padding[0, :3] = 0
        both = {"input_ids": TOKENS[:2], "labels": labels}
        alone = [{name: part[:1, 3:] for name, part in both.items()}, {name: part[1:] for name, part in both.items()}]
        found = AdaptiveScores.of(model, [both | {"attention_mask": padding}])
        expected = AdaptiveScores.of(model, alone)
        for name in ("certainty", "first_nll", "vote_nll"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("tolerance", [0, 0.005, 0.05, 10])
    @pytest.mark.parametrize("ties", [False, True])
    def test_the_chosen_threshold_is_the_best_of_all(self, tolerance: float, ties: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        certainty, first = torch.rand(2, 200, generator=generator)
        vote = first - 0.3 * torch.rand(200, generator=generator) * (1.1 - certainty)
        if ties:
            certainty = (certainty * 8).round() / 8
        scores = AdaptiveScores(certainty, first, vote)
        limit = scores.perplexity(2) * (1 + tolerance) * (1 + 1e-9)
        good = [t for t in [0.0, *certainty.tolist(), 2.0] if scores.perplexity(t) <= limit]
        chosen = scores.choose_threshold(tolerance)
        assert scores.perplexity(chosen) <= limit
        assert scores.share(chosen) == min(map(scores.share, good))

    def test_a_worthless_ensemble_is_never_consulted(self) -> None:
        first = torch.rand(10)
        assert AdaptiveScores(torch.rand(10), first, first + 1).choose_threshold() == 0

    def test_mistakes(self, make_model) -> None:
        with pytest.raises(ValueError, match=r"batches: there is no token"):
            AdaptiveScores.of(make_model(), [])
        with pytest.raises(ValueError, match=r"measure='gap'"):
            AdaptiveScores.of(make_model(), [], "gap")
        model = make_model()
        model.active_heads = [1]
        with pytest.raises(ValueError, match=r"active_heads=\[1\]: there is no other"):
            AdaptiveScores.of(model, [])
        with pytest.raises(ValueError, match=r"tolerance=-1"):
            AdaptiveScores(*torch.ones(3, 2)).choose_threshold(-1)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"measure": "gap"}, r"measure='gap': choose from margin, entropy"),
            ({"threshold": math.nan}, r"threshold=nan"),
            ({"threshold": "0.5"}, r"threshold='0.5': give a certainty"),
        ],
    )
    def test_options(self, make_model, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            AdaptiveVoting(**{"model": make_model(), "threshold": 0.5} | options)

    def test_another_kind_of_model(self) -> None:
        config = LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        with pytest.raises(ValueError, match=r"model: LlamaForCausalLM has no heads to vote"):
            AdaptiveVoting(AutoModelForCausalLM.from_config(config), 0.5)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"labels": TOKENS}, r"labels: adaptive voting returns logits only"),
            ({"output_hidden_states": True}, r"output_hidden_states: adaptive"),
            ({"attention_mask": torch.ones(3, 1, 7, 7)}, r"attention_mask: .* shape \[batch, past \+ seq\]"),
        ],
    )
    def test_calls(self, make_model, call, message) -> None:
        model = make_model()
        with AdaptiveVoting(model, 0.5), pytest.raises(ValueError, match=message):
            model(TOKENS, **call)

    def test_one_head(self, make_model) -> None:
        model = make_model()
        model.active_heads = [1]
        with AdaptiveVoting(model, 0.5), pytest.raises(ValueError, match=r"active_heads=\[1\]: there is no other"):
            model(TOKENS)

    def test_caches(self, make_model) -> None:
        model = make_model()
        cache = model(TOKENS).past_key_values
        with AdaptiveVoting(model, 0.5):
            with pytest.raises(ValueError, match=r"filled by another voting"):
                model(TOKENS, past_key_values=cache)
            with pytest.raises(ValueError, match=r"takes a DynamicCache; drop cache_implementation"):
                generate(model, cache_implementation="static")

    def test_twice_and_left_behind(self, make_model) -> None:
        model = make_model()
        with (
            AdaptiveVoting(model, 0.5),
            pytest.raises(ValueError, match=r"replaced already"),
            AdaptiveVoting(model, 0.5),
        ):
            pass
        assert "forward" not in vars(model)
