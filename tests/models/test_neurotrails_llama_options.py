# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""LLaMA's options: attention implementations, precisions, positions, devices, compilation, pipelines."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline


EVERY_LAYER = pytest.mark.parametrize("head_layers", [0, 2, 4])


@pytest.fixture
def right_padded(tokens):
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 7:] = 0
    return {"input_ids": tokens, "attention_mask": attention_mask}


@EVERY_LAYER
@pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        pytest.param(
            "flex_attention",
            # Compiles; and transformers asks torch for the compilation in a way that torch would see changed.
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")],
        ),
    ],
)
def test_attention_implementations_agree(make_model, right_padded, head_layers, implementation):
    model = make_model(num_head_layers=head_layers)
    logits = []
    with torch.no_grad():
        for name in ("eager", implementation):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            logits.append(model(**right_padded).logits[right_padded["attention_mask"].bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_and_grouped_queries_are_those_of_llama(make_dense, make_model, rope, key_value_heads):
    dense = make_dense(rope_parameters=rope, num_key_value_heads=key_value_heads)
    # Longer than max_position_embeddings, where dynamic scaling sets in.
    tokens = torch.randint(1, 61, (1, 80), generator=torch.Generator().manual_seed(0))
    model = type(make_model()).from_dense(dense, 2, 2, vote="logits")
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


@EVERY_LAYER
def test_bfloat16_generates_what_its_own_full_passes_predict(make_model, tokens, head_layers):
    model = make_model(num_head_layers=head_layers).to(torch.bfloat16)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(tokens, **options)
    with torch.no_grad():
        full = model(out.sequences[:, :-1]).logits[:, 9:].float()
    assert torch.cosine_similarity(torch.stack(out.logits, 1), full, dim=-1).min() > 0.99


def test_chosen_hidden_states_only(make_model, tokens):
    model = make_model()
    every = model(tokens, output_hidden_states=True).hidden_states
    chosen = model(tokens, output_hidden_states=[1, -1]).hidden_states
    assert len(chosen) == len(every) == 9
    for i, state in enumerate(chosen):
        assert state is None if i not in (1, 8) else torch.equal(state, every[i])


@pytest.mark.parametrize(("head_layers", "tied"), [(0, True), (2, False), (4, False)])
def test_device_maps_of_one_machine(make_model, tokens, tmp_path, head_layers, tied):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    offloaded = {"model.rotary_emb": "cpu", "lm_heads": "cpu"}
    offloaded |= {f"model.heads.{m}": "cpu" if m == 1 or tied else "disk" for m in range(3)}
    if head_layers < 4:
        offloaded |= {"model.embed_tokens": "cpu", "model.layers": "disk"}
    for device_map in ("auto", offloaded):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        greedy = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(loaded.generate(tokens, **greedy), model.generate(tokens, **greedy))


def place(module, device):
    """Moves fake weights to `device`, and inputs there before each call, as a device map does."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, device=device)
                    tensors[name] = torch.nn.Parameter(moved) if tensors is part._parameters else moved
    add_hook_to_module(module, AlignDevicesHook(execution_device=device), append=True)


@EVERY_LAYER
def test_parts_on_different_devices(make_model, head_layers):
    # Fake tensors have no values, but a device, and refuse to be mixed across devices.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(num_head_layers=head_layers)
        parts = [*model.model.layers, model.model.rotary_emb, *model.lm_heads]
        if head_layers < 4:
            parts.append(model.model.embed_tokens)
        for head in model.model.heads:
            parts += [*head.layers, head.norm] + ([head.embed_tokens] if head_layers == 4 else [])
        for i, part in enumerate(parts):
            place(part, torch.device("cuda", i % 3))
        tokens = torch.zeros(2, 7, dtype=torch.long, device="cuda:1")
        out = model(tokens, labels=tokens, use_cache=True, output_head_logits=True)
        assert out.logits.shape == (2, 7, 61)
        assert out.head_logits.shape == (3, 2, 7, 61)
        assert model(tokens[:, :1], past_key_values=out.past_key_values).logits.shape == (2, 1, 61)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_text_streamer(make_model, tokenizer, capsys):
    model = make_model(vocab_size=320)
    inputs = tokenizer("The farmer", return_tensors="pt")
    answer = model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(answer[0]) + "\n"


def test_text_generation_pipeline(make_model, tokenizer):
    model = make_model(vocab_size=320)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["The farmer", "A small boat in the rain"]
    answers = generator(texts, batch_size=2, max_new_tokens=6, do_sample=False)
    for text, (answer,) in zip(texts, answers, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert answer["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)


@pytest.mark.slow
def test_compiled_as_one_graph(make_model, right_padded):
    model = make_model(num_ensemble_heads=2, num_hidden_layers=2, num_head_layers=1)
    labels = right_padded["input_ids"]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for network in (model, compiled):
        model.zero_grad()
        out = network(**right_padded, labels=labels)
        out.loss.backward()
        results.append((out.logits, out.loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
