# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A compressed model predicts, generates, saves and loads as the model it was made of."""

import copy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from generated import TOKENS, assert_same_generation, generate
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
from nt_transformers.inference.decoding import Decoder


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
