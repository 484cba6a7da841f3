# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Structure, equality with stock LLaMA, votes and active heads."""

import itertools
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, NeuroTrailsLlamaModel


LLAMA_130M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_head_layers": 8,
}
LLAMA_350M = {
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_head_layers": 16,
}


@pytest.mark.parametrize(
    ("size", "overrides", "millions"),
    [
        (LLAMA_130M, {"num_ensemble_heads": 1}, 134.1),
        (LLAMA_130M, {"num_ensemble_heads": 3}, 296.5),
        (LLAMA_130M, {"num_ensemble_heads": 3, "num_head_layers": 12}, 402.3),
        (LLAMA_350M, {"num_ensemble_heads": 1}, 367.9),
        (LLAMA_350M, {"num_ensemble_heads": 3}, 836.6),
        (LLAMA_350M, {"num_ensemble_heads": 3, "num_head_layers": 24}, 1103.8),
    ],
)
def test_parameter_counts_are_the_published_ones(size, overrides, millions):
    with torch.device("meta"):
        model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**{**size, **overrides}))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=2e-3)


LAYER_KEYS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
]


@pytest.mark.parametrize("head_layers", [0, 1, 4])
def test_state_dict_keys_are_the_contract(make_model, head_layers):
    stacks = [f"model.layers.{i}" for i in range(4 - head_layers)]
    stacks += [f"model.heads.{m}.layers.{i}" for m in range(2) for i in range(head_layers)]
    expected = {f"{stack}.{key}.weight" for stack in stacks for key in LAYER_KEYS}
    expected |= {f"model.heads.{m}.norm.weight" for m in range(2)} | {f"lm_heads.{m}.weight" for m in range(2)}
    if head_layers == 4:
        expected |= {f"model.heads.{m}.embed_tokens.weight" for m in range(2)}
    else:
        expected.add("model.embed_tokens.weight")
    assert set(make_model(num_ensemble_heads=2, num_head_layers=head_layers).state_dict()) == expected


def peak_memory_over_weights(size: dict[str, int]) -> tuple[float, float]:
    """Bytes by which the peak memory of a fresh process grows when the model is built, and bytes of its weights."""
    script = f"""
from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
config = NeuroTrailsLlamaConfig(**{size!r})
before = peak()
model = NeuroTrailsLlamaForCausalLM(config)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    grown, weights = output.split()
    return float(grown), float(weights)


def test_building_takes_the_memory_of_the_weights():
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "vocab_size": 8000}
    grown, weights = peak_memory_over_weights({**size, "num_head_layers": 2})
    assert 0.95 * weights < grown < 1.05 * weights + 15e6


@pytest.mark.slow
def test_building_llama_350m_takes_the_memory_of_its_weights():
    grown, weights = peak_memory_over_weights(LLAMA_350M)
    assert 0.95 * weights < grown < 1.05 * weights


def test_every_part_of_every_head_starts_from_its_own_draw(make_model):
    model = make_model(num_head_layers=4, pad_token_id=None)
    stacks = [
        {**dict(head.named_parameters()), "lm_head": lm_head.weight}
        for head, lm_head in zip(model.model.heads, model.lm_heads, strict=True)
    ]
    for first, second in itertools.combinations(stacks, 2):
        for name, weight in first.items():
            if weight.ndim == 2:
                assert not torch.isclose(weight, second[name]).all(1).any(), name


def test_heads_share_no_parameter_norms_included(make_model):
    model = make_model()
    owners = [set(map(id, head.parameters())) for head in model.model.heads]
    assert len(set.union(*owners)) == sum(map(len, owners))
    with torch.no_grad():
        model.model.heads[1].norm.weight.zero_()
    head_logits = model(torch.tensor([[5, 6]]), output_head_logits=True).head_logits
    assert head_logits.ne(0).any((1, 2, 3)).tolist() == [True, False, True]


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_one_head_is_stock_llama_bit_for_bit(make_model, stock_from_head, tokens, head_layers):
    model = make_model(num_ensemble_heads=1, num_head_layers=head_layers)
    stock = stock_from_head(model, 0)
    for vote in ("probs", "logits"):
        model.config.vote = vote
        ours, theirs = (net(tokens, labels=tokens, output_hidden_states=True) for net in (model, stock))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.loss, theirs.loss)
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_each_head_is_stock_llama_of_backbone_and_head(make_model, stock_from_head, tokens, head_layers):
    model = make_model(num_head_layers=head_layers)
    head_logits = model(tokens, output_head_logits=True).head_logits
    for m in range(3):
        assert torch.equal(head_logits[m], stock_from_head(model, m)(tokens).logits)


@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_equal_heads_vote_as_one_stock_llama(make_model, stock_from_head, tokens, vote):
    model = make_model(vote=vote)
    for m in (1, 2):
        model.model.heads[m].load_state_dict(model.model.heads[0].state_dict())
        model.lm_heads[m].load_state_dict(model.lm_heads[0].state_dict())
    expected = stock_from_head(model, 0)(tokens).logits
    logits = model(tokens).logits
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
    if vote == "logits":
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_mean_probability_vote(make_model, tokens):
    out = make_model(vote="probs")(tokens, output_head_logits=True)
    expected = out.head_logits.double().softmax(-1).mean(0)
    torch.testing.assert_close(out.logits.double().exp(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits.double().softmax(-1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(2, 10), rtol=1e-5, atol=1e-5)
    assert (expected - out.head_logits.double().mean(0).softmax(-1)).abs().max() > 0.1


def test_mean_logits_vote(make_model, tokens):
    out = make_model(vote="logits")(tokens, output_head_logits=True)
    torch.testing.assert_close(out.logits, out.head_logits.mean(0), rtol=1e-5, atol=1e-5)


def test_probability_vote_keeps_extreme_logits_finite(make_model, tokens):
    model = make_model()
    with torch.no_grad():
        for lm_head in model.lm_heads:
            lm_head.weight *= 1e4
    out = model(tokens, output_head_logits=True)
    expected = out.head_logits.double().log_softmax(-1).logsumexp(0) - torch.tensor(3.0).double().log()
    torch.testing.assert_close(out.logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_bfloat16_vote_is_right_to_its_precision(make_model, tokens, vote):
    out = make_model(vote=vote).to(torch.bfloat16)(tokens, output_head_logits=True)
    heads = out.head_logits.double()
    expected = heads.mean(0) if vote == "logits" else heads.softmax(-1).mean(0).log()
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("head_layers", [0, 2, 4])
@pytest.mark.parametrize(("choice", "heads"), [(1, [0]), (2, [0, 1]), ([1], [1]), ([2, 0], [2, 0])])
def test_active_heads_choose_who_votes(make_model, tokens, head_layers, choice, heads):
    model = make_model(num_head_layers=head_layers)
    every = model(tokens, labels=tokens, output_head_logits=True)
    model.active_heads = choice
    some = model(tokens, labels=tokens, output_head_logits=True)
    assert model.active_heads == heads
    assert torch.equal(some.head_logits, every.head_logits[heads])
    assert torch.equal(some.head_losses, every.head_losses[heads])
    torch.testing.assert_close(
        some.logits.softmax(-1), every.head_logits[heads].softmax(-1).mean(0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("skip_logits", [False, True])
def test_inactive_heads_are_never_touched(make_model, tokens, skip_logits):
    model = make_model(num_head_layers=4)
    model.active_heads = [2]
    model(tokens, labels=tokens, skip_logits=skip_logits).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if n.startswith(("model.heads.2.", "lm_heads.2."))}
    for m in (0, 1):
        model.model.heads[m].to("meta")
        model.lm_heads[m].to("meta")
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("choice", [0, -1, 4, [], [3], [-1], [1, 1], [0.5], "0"])
def test_impossible_active_heads_are_refused(make_model, choice):
    model = make_model()
    with pytest.raises(ValueError, match=r"active_heads=.*3 heads"):
        model.active_heads = choice
    assert model.active_heads == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_ensemble_heads": 0}, "num_ensemble_heads=0"),
        ({"num_head_layers": -1}, "num_head_layers=-1"),
        ({"num_head_layers": 5}, "num_head_layers=5.*num_hidden_layers"),
        ({"vote": "majority"}, "vote='majority'.*probs.*logits"),
        ({"num_ensemble_heads": 1.5}, "num_ensemble_heads"),
        ({"per_layer_config": {0: {"intermediate_size": 8}}}, "per_layer_config"),
    ],
)
def test_bad_config_values_are_named(make_config, overrides, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        make_config(**overrides)


def test_base_model_returns_the_mean_of_the_heads(make_model, tokens):
    model = make_model().model
    out = model(tokens)
    assert out.head_hidden_states.shape == (3, 2, 10, 32)
    torch.testing.assert_close(out.last_hidden_state, out.head_hidden_states.mean(0))


def test_input_ids_and_embeddings_agree_and_exclude_each_other(make_model, tokens):
    model = make_model()
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize(("head_layers", "layers"), [(0, 4), (2, 8), (4, 12)])
def test_hidden_states_and_attentions_list_backbone_then_heads(make_model, tokens, head_layers, layers):
    model = make_model(num_head_layers=head_layers, attn_implementation="eager")
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 1 + layers
    assert [attention.shape for attention in out.attentions] == [(2, 4, 10, 10)] * layers


def test_tuple_output_begins_as_that_of_llama(make_model, tokens):
    model = make_model()
    out = model(tokens, labels=tokens)
    as_tuple = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


@pytest.mark.parametrize("positions", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(make_model, tokens, positions):
    model = make_model()
    every = model(tokens, output_head_logits=True)
    kept = model(tokens, logits_to_keep=positions, output_head_logits=True)
    index = slice(-positions, None) if isinstance(positions, int) else positions
    torch.testing.assert_close(kept.logits, every.logits[:, index])
    torch.testing.assert_close(kept.head_logits, every.head_logits[:, :, index])


def test_training_and_evaluation_mode_compute_the_same(make_model, tokens):
    model = make_model()
    assert torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_layers", [2, 4])
def test_resizing_the_vocabulary_reaches_every_head(make_model, tokens, head_layers, tied):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=tied)
    before = model(tokens, output_head_logits=True).head_logits
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(tokens, labels=tokens, output_head_logits=True)
    assert after.logits.shape[-1] == model.config.vocab_size == 70
    torch.testing.assert_close(after.head_logits[..., :61], before)
    assert all(p.shape[0] == 70 for name, p in model.named_parameters() if "embed" in name or "lm_heads" in name)


@pytest.mark.parametrize("head_layers", [2, 4])
def test_embeddings_can_be_replaced(make_model, tokens, head_layers):
    model = make_model(num_head_layers=head_layers)
    embeddings, output_layer = torch.nn.Embedding(70, 32), torch.nn.Linear(32, 70, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(output_layer)
    assert model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is output_layer
    assert model(tokens + 9, output_head_logits=True).head_logits.shape == (3, 2, 10, 70)
    assert len({lm_head.weight.data_ptr() for lm_head in model.lm_heads}) == 3


@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_tied_heads_use_the_embeddings_they_read_from(make_model, head_layers):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=True)
    for head, lm_head in zip(model.model.heads, model.lm_heads, strict=True):
        owner = head if head_layers == 4 else model.model
        assert lm_head.weight is owner.embed_tokens.weight


def test_auto_classes_know_the_model(make_config):
    config = make_config()
    assert type(AutoConfig.for_model("neurotrails_llama")) is NeuroTrailsLlamaConfig
    assert type(AutoModel.from_config(config)) is NeuroTrailsLlamaModel
    assert type(AutoModelForCausalLM.from_config(config)) is NeuroTrailsLlamaForCausalLM


def test_import_pulls_in_nothing_beyond_transformers():
    script = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation.utils import GenerationMixin
import transformers.models.llama.modeling_llama
before = {name.partition(".")[0] for name in sys.modules}
import nt_transformers
after = {name.partition(".")[0] for name in sys.modules}
print(*(after - before))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["nt_transformers"]
