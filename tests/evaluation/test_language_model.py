# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""One pass with `per_head` answers, bit for bit, what lm-eval's own model answers for each head and vote alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from made_up import SHAPE, make_model, make_text
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nt_transformers import NeuroTrailsLlamaForCausalLM
from nt_transformers.evaluation import NeuroTrailsLM


LENGTH = 64


@pytest.fixture
def requests() -> list[Instance]:
    """Continuations of one token and of many; contexts that are shared, empty, longer than LENGTH tokens."""
    rng = random.Random(0)
    pairs = [("", " the river")]
    for _ in range(12):
        context = make_text(rng, rng.randint(3, 40))
        pairs += [(context, f" {letter}") for letter in "abc"]
        pairs += [(make_text(rng, 3), f" {make_text(rng, length)}") for length in (1, 4, 9)]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.fixture
def wrap(tokenizer_dir: Any) -> Callable[..., HFLM]:
    """`wrap(class, model, **kwargs)`: lm-eval's view of a model."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    settings = {"tokenizer": tokenizer, "batch_size": 5, "max_length": LENGTH}
    return lambda cls, model, **kwargs: cls(model, **settings | kwargs)


Wrap = Callable[..., HFLM]


@pytest.mark.parametrize(
    ("split", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"num_head_layers": 3}, torch.float32),
        ({"vote": "logits"}, torch.float32),
        ({"num_ensemble_heads": 1}, torch.bfloat16),
    ],
)
def test_one_pass_answers_as_the_vote_and_as_each_head_alone(
    wrap: Wrap, requests: list[Instance], split: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_model(**split).to(dtype)
    answers = wrap(NeuroTrailsLM, model, per_head=True).loglikelihood(requests, disable_tqdm=True)
    plain = wrap(HFLM, model)
    assert [tuple(answer) for answer in answers] == plain.loglikelihood(requests, disable_tqdm=True)
    for m in range(model.config.num_ensemble_heads):
        model.active_heads = [m]
        alone = plain.loglikelihood(requests, disable_tqdm=True)
        assert [answer.members[f"head_{m}"] for answer in answers] == alone


def test_both_votes_are_scored_whichever_is_the_models_own(wrap: Wrap, requests: list[Instance]) -> None:
    answers = wrap(NeuroTrailsLM, make_model(), per_head=True).loglikelihood(requests, disable_tqdm=True)
    for vote in ("probs", "logits"):
        own = wrap(HFLM, make_model(vote=vote)).loglikelihood(requests, disable_tqdm=True)
        assert [answer.members[f"{vote}_vote"] for answer in answers] == own
    assert any(answer.members["probs_vote"] != answer.members["logits_vote"] for answer in answers)


def test_greedy_choices_are_told(wrap: Wrap) -> None:
    """A continuation that the vote generates itself is its greedy choice."""
    model = make_model()
    lm = wrap(NeuroTrailsLM, model, per_head=True)
    context = "the farmer"
    token = int(model(torch.tensor([lm.tok_encode(context)])).logits[0, -1].argmax())
    (answer,) = lm._loglikelihood_tokens([((context, ""), lm.tok_encode(context), [token])], disable_tqdm=True)
    assert answer[1]
    assert answer.members["probs_vote"][1]


@pytest.mark.parametrize("precision", [{"mixed_precision_dtype": "bfloat16"}, {"softmax_dtype": "float64"}])
def test_precision_is_that_of_the_plain_model(wrap: Wrap, requests: list[Instance], precision: dict[str, str]) -> None:
    model = make_model()
    answers = wrap(NeuroTrailsLM, model, per_head=True, **precision).loglikelihood(requests, disable_tqdm=True)
    expected = wrap(HFLM, model, **precision).loglikelihood(requests, disable_tqdm=True)
    assert [tuple(answer) for answer in answers] == expected


def test_only_active_heads_are_members(wrap: Wrap, requests: list[Instance]) -> None:
    model = make_model()
    model.active_heads = [2, 0]
    lm = wrap(NeuroTrailsLM, model, per_head=True)
    assert lm.members == ["head_2", "head_0", "probs_vote", "logits_vote"]
    answers = lm.loglikelihood(requests[:4], disable_tqdm=True)
    assert [list(answer.members) for answer in answers] == [lm.members] * 4
    assert [tuple(answer) for answer in answers] == wrap(HFLM, model).loglikelihood(requests[:4], disable_tqdm=True)


def test_the_batch_size_may_be_found_automatically(wrap: Wrap, requests: list[Instance]) -> None:
    model = make_model()
    automatic = wrap(NeuroTrailsLM, model, per_head=True, batch_size="auto", max_batch_size=8)
    given = wrap(NeuroTrailsLM, model, per_head=True, batch_size=8)
    assert automatic.loglikelihood(requests) == given.loglikelihood(requests)


def test_truncation_is_told(wrap: Wrap, requests: list[Instance], caplog: pytest.LogCaptureFixture) -> None:
    wrap(NeuroTrailsLM, make_model(), per_head=True).loglikelihood(requests, disable_tqdm=True)
    assert f"exceed {LENGTH} tokens" in caplog.text


def test_a_continuation_longer_than_the_model_is_refused(wrap: Wrap) -> None:
    lm = wrap(NeuroTrailsLM, make_model(), per_head=True)
    with pytest.raises(ValueError, match=f"max_length={LENGTH}: a continuation to score has 65 tokens"):
        lm._loglikelihood_tokens([(("", ""), [1], [2] * 65)], disable_tqdm=True)


def test_a_stock_llama_has_no_heads_to_score(wrap: Wrap) -> None:
    with pytest.raises(ValueError, match="per_head: LlamaForCausalLM has no ensemble heads"):
        wrap(NeuroTrailsLM, LlamaForCausalLM(LlamaConfig(**SHAPE)), per_head=True)


def test_a_wrapped_llama_scores_as_the_stock_one(wrap: Wrap, requests: list[Instance]) -> None:
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    wrapped = NeuroTrailsLlamaForCausalLM.from_dense(stock, num_ensemble_heads=1, num_head_layers=2)
    expected = wrap(HFLM, stock).loglikelihood(requests, disable_tqdm=True)
    answers = wrap(NeuroTrailsLM, wrapped).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in answers] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
