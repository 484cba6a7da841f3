# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A compressed model predicts, generates, saves and loads as the model it was made of."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTImageProcessor,
    pipeline,
)

from nt_transformers import NeuroTrailsViTConfig, NeuroTrailsViTForImageClassification
from nt_transformers.inference import SparseLinear, compress, compressed_bytes, products
from nt_transformers.inference.convert import convert
from nt_transformers.inference.convert import main as convert_command
from nt_transformers.inference.decoding import Decoder, GrowingLayer


TOKENS = torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
# For each: [heads, head layers, active heads].
STRUCTURES = [(3, 2, 3), (3, 2, [2, 0]), (3, 3, 3), (3, 3, [1]), (2, 0, 2), (1, 2, 1)]


def generate(model: Any, batch: int = 1, **kwargs: Any) -> Any:
    return model.generate(
        TOKENS[:batch],
        attention_mask=MASK[:batch],
        **{"max_new_tokens": 12, "do_sample": False, **kwargs},
        return_dict_in_generate=True,
        output_logits=True,
    )


def assert_same_generation(first: Any, second: Any) -> None:
    assert torch.equal(first.sequences, second.sequences)
    for a, b in zip(first.logits, second.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


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


def test_weights_are_kept_once_on_request(make_model, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(products, "_timed_sliced", {})
    monkeypatch.setattr(products, "SLICED_MARGIN", 1e9)

    def extra_bytes(model: Any) -> list[int]:
        generate(model)
        return [layer.kernel.extra_bytes for layer in _layers(model)]

    fast = extra_bytes(compress(make_model(dtype=torch.bfloat16)))
    slow = compress(make_model(dtype=torch.bfloat16), fast_decoding=False)
    assert all(a > b for a, b in zip(fast, extra_bytes(slow), strict=True))
    slow.save_pretrained(tmp_path)
    assert extra_bytes(AutoModelForCausalLM.from_pretrained(tmp_path)) == extra_bytes(slow)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["fast_decoding"] = True
    assert extra_bytes(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) == fast


def test_an_unknown_way_of_decoding(make_model) -> None:
    with pytest.raises(ValueError, match=r"fast_decoding='yes': choose true or false"):
        compress(make_model(), fast_decoding="yes")


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_compiles_without_graph_breaks(make_model, values) -> None:
    compressed = compress(make_model(), values)
    compiled = torch.compile(compressed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = compressed(TOKENS, use_cache=False).logits
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_outlives_the_model(make_model) -> None:
    compressed = compress(make_model(), "int8")
    expected = generate(compressed)
    copied = copy.deepcopy(compressed)
    del compressed
    assert_same_generation(generate(copied), expected)


def test_a_stock_llama(make_model) -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.5)
    compressed = compress(copy.deepcopy(dense), "fp32")
    assert not Decoder.supports(compressed)
    assert torch.equal(generate(compressed).sequences, generate(dense).sequences)


@pytest.mark.parametrize("values", ["bf16", "fp32", "int8"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_saved_and_loaded_is_the_same_bit_for_bit(make_model, tmp_path, values, max_shard_size) -> None:
    compressed = compress(make_model(), values)
    compressed.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, state = compressed.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(state[name].dtype == expected[name].dtype for name in expected)
    assert_same_generation(generate(loaded), generate(compressed))
    assert isinstance(loaded.lm_heads[0], SparseLinear)


def test_dense_again(make_model, tmp_path) -> None:
    model = make_model()
    dense = compress(copy.deepcopy(model), "fp32").dequantize()
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    assert_same_generation(generate(dense), generate(model))
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(again).sequences, generate(model).sequences)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_again_in_the_models_own_type(make_model, tmp_path, values, dtype) -> None:
    compressed = compress(make_model(dtype=dtype), values)
    compressed.save_pretrained(tmp_path)
    dense = compressed.dequantize()
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
    assert torch.equal(generate(loaded).sequences, generate(dense).sequences)


def test_the_base_model_of_a_compressed_checkpoint_and_back(make_model, tmp_path) -> None:
    model = make_model()
    compress(copy.deepcopy(model), "fp32").save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    expected = model.model(TOKENS).last_hidden_state
    torch.testing.assert_close(base(TOKENS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    compress(copy.deepcopy(model.model), "fp32").save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again.model(TOKENS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_other_weights_in_place(make_model) -> None:
    def fixed_nonzeros() -> Any:
        model = make_model(density=1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    order = torch.randperm(parameter.numel(), generator=generator).view_as(parameter)
                    parameter.mul_(order < 0.3 * parameter.numel())
                else:
                    parameter.add_(torch.rand(parameter.shape, generator=generator))
        return model

    generator = torch.Generator().manual_seed(0)
    first, second = (compress(fixed_nonzeros(), "bf16") for _ in range(2))
    generate(first)
    first.load_state_dict(second.state_dict())
    assert_same_generation(generate(first), generate(second))


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_the_type_of_a_compressed_model_may_change(make_model, tmp_path, values) -> None:
    """Weights stay as they are stored; norms, embeddings and activations are of the new type."""
    compressed, dense = compress(make_model(), values), compress(make_model(), values).dequantize()
    compressed.save_pretrained(tmp_path / "compressed")
    dense.save_pretrained(tmp_path / "dense")
    weight = compressed.lm_heads[1].values
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        loaded = [
            AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype=dtype) for each in ("compressed", "dense")
        ]
        converted = copy.deepcopy(compressed), copy.deepcopy(dense)
        generate(converted[0])
        for model in converted:
            model.to(dtype)
        for pair in (converted, loaded):
            assert pair[0].dtype == pair[1].dtype == dtype
            assert torch.equal(pair[0].lm_heads[1].values, weight)
        # Of a logit, all of which are below 8; products are sums of float32.
        step = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(dtype, 1e-4)
        for found, expected in (converted, loaded):
            with torch.no_grad():
                torch.testing.assert_close(found(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=step)
    expected = generate(compressed).sequences
    assert torch.equal(generate(compressed.to("cpu")).sequences, expected)


@pytest.mark.usefixtures("kernels_multiply")
@pytest.mark.parametrize("values", ["fp32", "int8"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(torch.bfloat16).to(torch.float32),
        lambda model: model.share_memory(),
        lambda model: ForkingPickler.dumps(model.state_dict()),
    ],
    ids=["another type", "there and back", "shared memory", "sent to a process"],
)
def test_the_kernels_follow_weights_that_move(make_model, values, change) -> None:
    """As a copy does, whose kernels are made anew."""
    model = make_model()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    compressed = compress(model, values)
    with torch.no_grad():
        compressed(TOKENS)
        change(compressed)
        others = [torch.full_like(part, 99) for part in compressed.state_dict().values()]  # in what was freed
        assert torch.equal(compressed(TOKENS).logits, copy.deepcopy(compressed)(TOKENS).logits)
        x = torch.ones(1, 64, dtype=compressed.dtype)
        assert torch.equal(compressed.lm_heads[0](x), copy.deepcopy(compressed.lm_heads[0])(x))
    del others


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
def test_gradients_through_a_compiled_layer(make_model, values) -> None:
    layer = compress(make_model(), values).lm_heads[0]
    layer.prepare()
    x = torch.randn(5, 64, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    found, x.grad = x.grad, None
    layer.to_linear().float()(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_type_is_not_that_of_the_kernels(make_model, dtype) -> None:
    compressed = compress(make_model(), "fp32")
    expected = generate(compressed, batch=2)
    torch.set_default_dtype(dtype)
    try:
        found = generate(compressed, batch=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_generation(found, expected)


def test_tensors_without_data(make_model) -> None:
    layer = compress(make_model(), "bf16").lm_heads[0]
    out = layer(torch.empty(2, 64, device="meta"))
    assert (out.shape, out.device.type) == ((2, 99), "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(2, 64)).shape == (2, 99)


def test_gradients_of_the_input(make_model) -> None:
    model = make_model()
    compressed = compress(copy.deepcopy(model), "fp32")
    gradients = []
    for network in (model, compressed):
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        network(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_what_is_sampled_does_not_depend_on_what_was_measured(make_model, monkeypatch) -> None:
    monkeypatch.setattr(products, "_timed", {})
    compressed = compress(make_model(), "fp32")
    state = torch.get_rng_state()
    compressed(TOKENS.repeat(8, 1))
    assert products._timed
    assert torch.equal(torch.get_rng_state(), state)


def test_output_layers_of_classifiers_stay_dense_on_request() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    depth = {"num_hidden_layers": 2, "num_head_layers": 1, "num_attention_heads": 2}
    model = NeuroTrailsViTForImageClassification(NeuroTrailsViTConfig(**sizes, **depth))
    classifier = compress(model, output_layers=False)
    assert not isinstance(classifier.classifiers[0], SparseLinear)
    assert compressed_bytes(classifier) > 0


def test_output_layers_stay_dense_on_request_and_when_tied(make_model) -> None:
    assert not isinstance(compress(make_model(), output_layers=False).lm_heads[0], SparseLinear)
    tied = make_model(tie_word_embeddings=True)
    compressed = compress(copy.deepcopy(tied), "fp32")
    assert compressed.lm_heads[0].weight is compressed.model.embed_tokens.weight
    assert_same_generation(generate(compressed), generate(tied))


def test_a_dense_model_is_stored_dense_and_a_note_says_so(make_model, caplog) -> None:
    compressed = compress(make_model(density=1.0), "bf16")
    assert compressed.lm_heads[0].bitmap is None
    assert "hardly a weight of the model is zero" in caplog.text


def _layers(model: Any) -> list[SparseLinear]:
    return [layer for layer in model.modules() if isinstance(layer, SparseLinear)]


def test_bytes(make_model) -> None:
    model = make_model()
    compressed = compress(model, "int8")
    stored = sum(buffer.nbytes for layer in _layers(compressed) for buffer in layer.buffers())
    assert compressed_bytes(compressed) == stored
    shapes = [(layer.out_features, layer.in_features, layer.matrix.nonzeros) for layer in _layers(compressed)]
    exact = sum(rows * (4 * -(-columns // 32) + 2) + nonzeros + 64 for rows, columns, nonzeros in shapes)
    assert stored == exact, "a bit for each place, a byte for each weight, two for each row, and what is read ahead"


def test_converting_checkpoints_there_and_back(make_model, tokenizer_dir, tmp_path) -> None:
    model = make_model(vocab_size=320)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), str(tmp_path / "small"), "fp32")
    convert(str(tmp_path / "small"), str(tmp_path / "dense"), dense=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "small").vocab_size == 320
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "model")]
    assert sizes[0] < 0.6 * sizes[1]


def test_converting_a_checkpoint_of_images_and_one_without_a_tokenizer(make_model, tmp_path, caplog) -> None:
    config = NeuroTrailsViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        num_head_layers=1,
    )
    classifier = NeuroTrailsViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    convert(str(tmp_path / "vit"), str(tmp_path / "small"), "fp32")
    compressed = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compressed(images).logits, classifier(images).logits, rtol=1e-4, atol=1e-4)
    assert AutoImageProcessor.from_pretrained(tmp_path / "small").size == {"height": 32, "width": 32}
    assert "no tokenizer" not in caplog.text
    make_model().save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), str(tmp_path / "small_model"), fast_decoding=False)
    assert "has no tokenizer or image processor, so none is written" in caplog.text
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "small_model").lm_heads[0]
    assert (layer.values.dtype, layer.fast_decoding) == (torch.bfloat16, False)


@pytest.mark.parametrize("option", [["--values", "fp32"], ["--keep_output_layers"], ["--weights_once"]])
def test_options_that_a_dense_checkpoint_has_no_use_for(monkeypatch, capsys, option) -> None:
    monkeypatch.setattr("sys.argv", ["convert", "in", "out", "--dense", *option])
    with pytest.raises(SystemExit):
        convert_command()
    assert "--dense keeps every weight as it is" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # lm-eval does, for every such model
def test_pipeline_and_lm_eval_of_a_compressed_checkpoint(make_model, tokenizer_dir, tmp_path) -> None:
    """The same text and the same likelihoods as of the dense one."""
    make_model(vocab_size=320).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), str(tmp_path / "small"), "fp32")
    texts, scores = [], []
    for name in ("model", "small"):
        generator = pipeline("text-generation", model=str(tmp_path / name), device="cpu")
        options = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
        texts.append(generator("Once upon a time", generation_config=options)[0]["generated_text"])
        model = HFLM(pretrained=str(tmp_path / name), device="cpu", batch_size=2)
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in (("Once", " upon a time"), ("", "A girl"))]
        scores.append([log_likelihood for log_likelihood, _ in model.loglikelihood(requests, disable_tqdm=True)])
    assert texts[0] == texts[1]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


class TestMistakes:
    def test_unknown_values_leave_the_model_alone(self, make_model) -> None:
        model = make_model()
        with pytest.raises(ValueError, match=r"values='int4': choose from"):
            compress(model, "int4")
        assert isinstance(model.lm_heads[0], torch.nn.Linear)

    def test_bad_weights_leave_the_model_alone(self, make_model) -> None:
        model = make_model()
        model.lm_heads[2].weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"a weight is not finite"):
            compress(model)
        assert isinstance(model.lm_heads[0], torch.nn.Linear)

    def test_twice(self, make_model) -> None:
        with pytest.raises(ValueError, match=r"compressed already"):
            compress(compress(make_model()))

    def test_another_device_afterwards(self, make_model) -> None:
        compressed = compress(make_model())
        with pytest.raises(ValueError, match=r"meta: compressed layers stay on the CPU; `dequantize\(\)`"):
            compressed.to("meta")
        assert {part.device.type for part in compressed.state_dict().values()} == {"cpu"}

    def test_what_needs_dense_weights(self, make_model) -> None:
        compressed = compress(make_model())
        with pytest.raises(ValueError, match=r"compressed or quantized: go on with model.dequantize"):
            compressed.extract_head(0)
        with pytest.raises(ValueError, match=r"compressed or quantized: go on with model.dequantize"):
            compressed.resize_token_embeddings(120)

    def test_another_device(self, make_model) -> None:
        with pytest.raises(ValueError, match=r"device meta"):
            compress(make_model().to("meta"))

    @pytest.mark.parametrize("damage", ["bits", "values", "rows"])
    def test_damaged_checkpoint(self, make_model, tmp_path: Path, damage: str) -> None:
        compress(make_model(), "bf16").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        if damage == "bits":
            tensors[f"{name}.bitmap"][3, 0] ^= 1
        elif damage == "values":
            tensors[f"{name}.values"] = tensors[f"{name}.values"][:-5]
        else:
            tensors[f"{name}.bitmap"] = tensors[f"{name}.bitmap"][:-1]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("values", None),
            ("values", torch.tensor(1, dtype=torch.int8)),
            ("values", torch.zeros(700, dtype=torch.bfloat16)),
            ("scales", torch.full((81,), torch.nan, dtype=torch.bfloat16)),
            ("scales", torch.ones(81)),
            (None, None),
        ],
    )
    def test_parts_that_are_missing_or_of_another_kind(self, make_model, tmp_path: Path, part, value) -> None:
        compress(make_model(), "int8").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.heads.1.layers.0.mlp.up_proj"
        for removed in ("bitmap", "values", "scales") if part is None else (part,):
            del tensors[f"{name}.{removed}"]
        if value is not None:
            tensors[f"{name}.{part}"] = value
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_truncated_file(self, make_model, tmp_path: Path) -> None:
        compress(make_model(), "bf16").save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors of the compressed checkpoint is damaged"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model\.safetensors of the compressed checkpoint is damaged"):
            convert(str(tmp_path), str(tmp_path / "out"), dense=True)

    def test_nothing_to_compress(self) -> None:
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
        with pytest.raises(ValueError, match="model_type='gpt2': it has no linear layers"):
            compress(model)

    def test_values_that_are_no_text(self, make_model) -> None:
        with pytest.raises(ValueError, match=r"values=\['bf16'\]: choose from"):
            compress(make_model(), ["bf16"])

    def test_converting_onto_something(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for target in (tmp_path, tmp_path / "file"):
            with pytest.raises(ValueError, match=r"it exists and is no empty folder"):
                convert("anything", str(target))

    def test_converting_with_a_damaged_tokenizer(self, make_model, tokenizer_dir, tmp_path: Path) -> None:
        make_model(vocab_size=320).save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "tokenizer.json"
        path.write_text(path.read_text()[:200])
        with pytest.raises(ValueError, match=r"source=.*its tokenizer or image processor cannot be loaded"):
            convert(str(tmp_path / "model"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_converting_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"source='.*nothing' cannot be loaded"):
            convert(str(tmp_path / "nothing"), str(tmp_path / "out"))
