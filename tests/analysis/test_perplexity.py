# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Perplexities equal those computed head by head from full logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from nt_transformers.analysis import perplexity as perplexity_module
from nt_transformers.analysis import score_language_model, unigram_perplexity
from nt_transformers.models import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM


VOCAB = 19


def make_model(heads: int = 3) -> NeuroTrailsLlamaForCausalLM:
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_ensemble_heads=heads,
        num_head_layers=1,
        initializer_range=0.7,
    )
    return NeuroTrailsLlamaForCausalLM(config).eval()


def make_batches(lengths: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Batches of sequences of the given lengths, padded to 12."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch in lengths:
        input_ids = torch.randint(VOCAB, (len(batch), 12), generator=generator)
        labels = input_ids.clone()
        for row, length in enumerate(batch):
            labels[row, length:] = -100
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def reference(model: NeuroTrailsLlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    """One token at a time, in float64."""
    nll = {name: [] for name in ("probs", "logits", *range(3))}
    different = []
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"], output_head_logits=True).head_logits.double()
        for row, labels in enumerate(batch["labels"].tolist()):
            for position, label in enumerate(labels[1:]):
                if label == -100:
                    continue
                heads = logits[:, row, position]
                nll["probs"].append(-heads.softmax(-1).mean(0)[label].log().item())
                nll["logits"].append(-heads.mean(0).log_softmax(-1)[label].item())
                for index, head in enumerate(heads):
                    nll[index].append(-head.log_softmax(-1)[label].item())
                top = heads.argmax(-1).tolist()
                different.append(sum(top[a] != top[b] for a, b in ((0, 1), (0, 2), (1, 2))) / 3)
    means = {name: sum(values) / len(values) for name, values in nll.items()}
    return {**means, "disagreement": sum(different) / len(different), "tokens": len(different)}


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_scores_equal_the_reference_token_by_token(monkeypatch: pytest.MonkeyPatch, chunk: int, vote: str) -> None:
    monkeypatch.setattr(perplexity_module, "CHUNK_TOKENS", chunk)
    model = make_model()
    # Batches of very different length: a mean of batch means would be another number.
    batches = make_batches([[12, 12, 12], [2, 3], [1, 12]])
    expected = reference(model, batches)
    figures = score_language_model(model, batches).language_figures(vote)
    assert figures["eval_tokens"] == expected["tokens"]
    assert figures["eval_loss"] == pytest.approx(expected[vote], rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(expected[vote]), rel=1e-5)
    assert figures["eval_perplexity_probs_vote"] == pytest.approx(math.exp(expected["probs"]), rel=1e-5)
    assert figures["eval_perplexity_logits_vote"] == pytest.approx(math.exp(expected["logits"]), rel=1e-5)
    assert figures["eval_perplexity_heads"] == pytest.approx([math.exp(expected[m]) for m in range(3)], rel=1e-5)
    assert figures["eval_disagreement"] == pytest.approx(expected["disagreement"])


def test_the_models_own_vote_gives_the_same_loss() -> None:
    model, batches = make_model(), make_batches([[12, 7]])
    logits = model(batches[0]["input_ids"]).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batches[0]["labels"][:, 1:].flatten())
    assert score_language_model(model, batches).language_figures("probs")["eval_loss"] == pytest.approx(
        loss.item(), rel=1e-5
    )


def test_only_active_heads_are_scored() -> None:
    model, batches = make_model(), make_batches([[12, 7]])
    everything = score_language_model(model, batches).language_figures("probs")["eval_perplexity_heads"]
    model.active_heads = [2, 0]
    some = score_language_model(model, batches).language_figures("probs")["eval_perplexity_heads"]
    assert some == pytest.approx([everything[2], everything[0]])


def test_scores_add_up_over_parts() -> None:
    model, batches = make_model(), make_batches([[12, 7], [5, 3]])
    whole = score_language_model(model, batches)
    parts = score_language_model(model, batches[:1]) + score_language_model(model, batches[1:])
    assert parts.items == whole.items
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-6, atol=1e-6)


def test_one_head_cannot_disagree() -> None:
    assert (
        score_language_model(make_model(1), make_batches([[12]])).language_figures("probs")["eval_disagreement"] == 0
    )


def test_unigram_perplexity_by_hand() -> None:
    training = [{"labels": torch.tensor([[9, 0, 0, 1], [9, 2, -100, -100]])}]
    held_out = [{"labels": torch.tensor([[9, 0, 3, -100]])}]
    # Counts 2, 1, 1, 0 plus one each: 3/8 for token 0, 1/8 for token 3.
    assert unigram_perplexity(training, held_out, 4) == pytest.approx((3 / 8 * 1 / 8) ** -0.5)
