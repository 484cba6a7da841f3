# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training on text, end to end on a tiny corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import assert_equal, assert_resumed_exactly, copy_stopped, read_metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nt_transformers.analysis import count_nonzeros, language_model_cost
from nt_transformers.training import TextTrainingConfig, checkpoint, train_language_model


RunConfig = Callable[..., TextTrainingConfig]


def test_a_run_leaves_a_checkpoint_that_loads(run_config: RunConfig) -> None:
    config = run_config(max_steps=30, learning_rate=3e-2)
    summary = train_language_model(config)
    folder = Path(config.output_dir)
    for name in ("config.json", "generation_config.json", "model.safetensors", "README.md", "summary.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    last = load_file(folder / "checkpoints" / "step_30" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last[name])
    assert summary["eval_perplexity"] < len(tokenizer) / 4
    matrices = [p for p in model.parameters() if p.ndim == 2]
    kept = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
    assert kept <= summary["density"] == 0.5
    inputs = tokenizer("The farmer", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 3

    card = (folder / "README.md").read_text()
    for value in (summary["eval_perplexity_probs_vote"], *summary["eval_perplexity_heads"]):
        assert f"| {value:.2f} |" in card


@pytest.mark.parametrize("choice", [None, False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_heads_are_differentiated_one_by_one_on_a_single_process(
    run_config: RunConfig, choice: bool | None, alone: bool
) -> None:
    calls: list[bool] = []

    def model(headwise_backward: bool, **_: Any) -> Any:
        calls.append(headwise_backward)
        return SimpleNamespace(loss=None, head_losses=None)

    run_config(headwise_backward=choice).loss(model, alone=alone)  # type: ignore[arg-type]
    assert calls == [alone if choice is None else choice]


def test_a_run_that_saves_memory_trains_the_same_network(run_config: RunConfig, tmp_path: Path) -> None:
    plain = train_language_model(run_config(headwise_backward=False))
    options: dict[str, Any] = {"activation_checkpointing": "heads", "headwise_backward": True}
    lean = train_language_model(run_config(output_dir=str(tmp_path / "lean"), **options))
    assert lean["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_metrics_hold_what_the_design_names(run_config: RunConfig) -> None:
    config = run_config()
    train_language_model(config)
    lines = read_metrics(config.output_dir)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [3, 6]
    assert [line["step"] for line in evaluation] == [4, 8]
    for line in training:
        assert line["loss"] == pytest.approx(sum(line["head_losses"]) / 2, rel=1e-6)
        assert line["density"] == 0.5
        assert 0.5 <= line["explored"] <= 1
        assert line["tokens"] > 0
    for line in evaluation:
        assert line["eval_tokens"] == 300
        assert line["eval_loss"] < sum(line["eval_loss_heads"]) / 2
        assert 0 < line["eval_disagreement"] < 1
        assert line["density"] == 0.5
        assert line["explored"] > 0.5
        assert 0 < line["mask_overlap"] < 1
        # The distribution of Erdos and Renyi spares the small matrices.
        densities = line["layer_density"]
        assert densities["model.layers.0.self_attn.q_proj.weight"] > densities["lm_heads.0.weight"] > 0


def test_the_summary_holds_what_training_cost(run_config: RunConfig) -> None:
    config = run_config(sparsity={"method": "static"}, max_steps=2)
    summary = train_language_model(config)
    model = AutoModelForCausalLM.from_pretrained(config.output_dir)
    cost = language_model_cost(model, 16, count_nonzeros(model))
    assert summary["forward_flops_per_token"] == cost.forward < cost.dense_forward
    assert summary["training_flops"] == cost.training() * 2 * 8 * 16  # steps, sequences, tokens


@pytest.mark.parametrize(
    ("data", "sparsity"),
    [
        ({}, {}),
        ({"packing": True, "num_workers": 1}, {"method": "neurotrails_llm"}),
        ({"streaming": True, "packing": True}, {"method": "gmp"}),
    ],
    ids=["padded", "packed", "streamed"],
)
@pytest.mark.parametrize("stop", [2, 6])
def test_resumed_equals_uninterrupted(
    run_config: RunConfig, tmp_path: Path, data: dict[str, Any], sparsity: dict[str, Any], stop: int
) -> None:
    whole = run_config(data=data, sparsity=sparsity)
    train_language_model(whole)

    resumed = run_config(
        data=data, sparsity=sparsity, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint="latest"
    )
    copy_stopped(whole.output_dir, resumed.output_dir, stop)
    train_language_model(resumed)
    assert_resumed_exactly(resumed.output_dir, whole.output_dir, tuple(range(stop + 2, 9, 2)))


def test_accumulation_equals_one_large_batch(run_config: RunConfig, tmp_path: Path) -> None:
    runs = [run_config(per_device_batch_size=size, output_dir=str(tmp_path / f"by_{size}")) for size in (2, 8)]
    for config in runs:
        train_language_model(config)
    small, large = (
        {
            "weights": load_file(Path(config.output_dir) / "checkpoints/step_8/model.safetensors"),
            "masks": torch.load(Path(config.output_dir) / "checkpoints/step_8/training.pt")["sparsifier"]["masks"],
        }
        for config in runs
    )
    assert_equal(small["masks"], large["masks"])
    for name, weight in small["weights"].items():
        torch.testing.assert_close(weight, large["weights"][name], rtol=1e-3, atol=1e-4)


def test_removed_weights_stay_zero_under_weight_decay_and_clipping(run_config: RunConfig) -> None:
    config = run_config(weight_decay=0.1, max_grad_norm=0.5, optimizer="adamw", sparsity={"method": "static"})
    train_language_model(config)
    folder = Path(config.output_dir) / "checkpoints"
    first, last = (load_file(folder / f"step_{step}" / "model.safetensors") for step in (2, 8))
    for name, weight in first.items():
        if weight.ndim == 2:
            assert not last[name][weight == 0].any(), name
            assert not torch.equal(last[name], weight), name


@pytest.mark.parametrize(
    ("model", "heads"),
    [({"num_ensemble_heads": 1}, 1), ({"num_head_layers": None}, 2), ({"tie_word_embeddings": True}, 2)],
    ids=["single", "full ensemble", "tied"],
)
def test_the_whole_family_trains_dense(run_config: RunConfig, model: dict[str, Any], heads: int) -> None:
    config = run_config(model=model, sparsity={"method": "dense"}, max_steps=2, checkpoint_steps=None)
    summary = train_language_model(config)
    assert len(summary["eval_perplexity_heads"]) == heads
    assert summary["active_parameters"] == summary["parameters"]
    assert not (Path(config.output_dir) / "checkpoints").exists()
    loaded = AutoModelForCausalLM.from_pretrained(config.output_dir)
    assert loaded.num_parameters() == summary["parameters"]


def test_bf16_keeps_float32_weights(run_config: RunConfig) -> None:
    config = run_config(mixed_precision="bf16", max_steps=2)
    train_language_model(config)
    weights = load_file(Path(config.output_dir) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_tensorboard_gets_the_metrics(run_config: RunConfig) -> None:
    config = run_config(report_to="tensorboard", max_steps=3)
    train_language_model(config)
    assert list(Path(config.output_dir).rglob("events.out.tfevents.*"))


class TestBadInput:
    """Each mistake is named before anything is trained or overwritten."""

    def fails(self, config: TextTrainingConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train_language_model(config)
        assert not (Path(config.output_dir) / "metrics.jsonl").exists()

    def test_vocabulary(self, run_config: RunConfig) -> None:
        self.fails(run_config(model={"vocab_size": 321}), "321.*320 tokens")

    def test_no_files(self, run_config: RunConfig, tmp_path: Path) -> None:
        self.fails(run_config(data={"train": str(tmp_path)}), "no files")

    def test_no_text(self, run_config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / "shard.jsonl").write_text('{"body": "a"}\n')
        self.fails(run_config(data={"train": str(tmp_path), "validation": str(tmp_path)}), "'text'.*'body'")

    def test_empty_corpus(self, run_config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / "shard.jsonl").write_text("")
        self.fails(run_config(data={"train": str(tmp_path), "validation": str(tmp_path)}), "empty")

    @pytest.mark.parametrize("shape", [{"num_head_layers": 3}, {"num_ensemble_heads": 0}, {"hidden_size": "wide"}])
    def test_shape(self, run_config: RunConfig, shape: dict[str, Any]) -> None:
        name, value = next(iter(shape.items()))
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            run_config(model=shape)

    @pytest.mark.parametrize("name", ["file/run", "x" * 300])
    def test_output_dir(self, run_config: RunConfig, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=r"output_dir=.*: it cannot be made \("):
            train_language_model(run_config(output_dir=str(tmp_path / name)))

    def test_batch(self, run_config: RunConfig) -> None:
        self.fails(run_config(global_batch_size=6), "global_batch_size=6")

    def test_missing_checkpoint(self, run_config: RunConfig, tmp_path: Path) -> None:
        for name in ("nowhere", "x" * 300):
            config = run_config(resume_from_checkpoint=str(tmp_path / name))
            self.fails(config, f"{name}.*cannot be resumed: there is no such folder")


@pytest.mark.parametrize("named", ["latest", "step_8"])
def test_a_checkpoint_is_hashed_once_and_taken_only_if_whole(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    config = run_config()
    train_language_model(config)
    folder = Path(config.output_dir) / "checkpoints" / "step_8"
    hashed: list[str] = []
    original = checkpoint._hash
    monkeypatch.setattr(checkpoint, "_hash", lambda path: hashed.append(path.name) or original(path))
    again = run_config(resume_from_checkpoint="latest" if named == "latest" else str(folder))
    train_language_model(again)
    assert sorted(hashed) == ["model.safetensors", "state.json", "training.pt"]

    (folder / "state.json").write_text((folder / "state.json").read_text().replace("8", "9", 1))
    if named == "latest":
        train_language_model(again)
    else:
        with pytest.raises(ValueError, match="step_8 cannot be resumed: state.json is not as it was written"):
            train_language_model(again)


def test_nothing_is_left_of_a_deletion_that_was_killed_after_the_last_checkpoint(run_config: RunConfig) -> None:
    config = run_config(resume_from_checkpoint="latest")
    train_language_model(config)
    checkpoints = Path(config.output_dir) / "checkpoints"
    (checkpoints / "step_6").rename(checkpoints / "step_6.partial.partial")
    train_language_model(config)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_2", "step_4", "step_8"]


def test_a_run_is_not_overwritten_by_accident(run_config: RunConfig) -> None:
    config = run_config(max_steps=2)
    train_language_model(config)
    before = (Path(config.output_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"output_dir=.*already holds a run.*overwrite_output_dir=true"):
        train_language_model(config)
    assert (Path(config.output_dir) / "metrics.jsonl").read_bytes() == before
    train_language_model(run_config(max_steps=2, overwrite_output_dir=True))


def test_a_checkpoint_of_elsewhere_does_not_write_over_a_run(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config(max_steps=4)
    train_language_model(config)
    other = run_config(max_steps=4, output_dir=str(tmp_path / "other"))
    checkpoint = str(Path(config.output_dir) / "checkpoints" / "step_2")
    train_language_model(other)
    with pytest.raises(ValueError, match="already holds a run"):
        train_language_model(run_config(output_dir=other.output_dir, max_steps=4, resume_from_checkpoint=checkpoint))
    fresh = run_config(output_dir=str(tmp_path / "fresh"), max_steps=4, resume_from_checkpoint=checkpoint)
    assert train_language_model(fresh)["steps"] == 4


def test_resuming_another_configuration_names_the_fields(run_config: RunConfig) -> None:
    config = run_config(max_steps=4)
    train_language_model(config)
    other = run_config(max_steps=4, learning_rate=0.5, sparsity={"density": 0.4}, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=r"learning_rate: 0.01 there, 0.5 here.*sparsity.density: 0.5 there, 0.4 here"
    ):
        train_language_model(other)


def test_latest_skips_a_damaged_checkpoint_and_says_so(
    run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config()
    train_language_model(config)
    final = (Path(config.output_dir) / "model.safetensors").read_bytes()
    damaged = Path(config.output_dir) / "checkpoints" / "step_8" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train_language_model(run_config(resume_from_checkpoint="latest"))
    output = capsys.readouterr().out
    assert "skipping" in output
    assert "step_8: model.safetensors has" in output
    assert "step_6 at step 6 of 8" in output
    assert (Path(config.output_dir) / "model.safetensors").read_bytes() == final


def test_latest_without_a_checkpoint_starts_anew(run_config: RunConfig) -> None:
    assert train_language_model(run_config(max_steps=2, resume_from_checkpoint="latest"))["steps"] == 2
