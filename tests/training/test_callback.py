# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Sparse training under Hugging Face's Trainer."""

import copy
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import launch
from runs import assert_equal
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.data import load_documents
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import SparsifierCallback


RECIPE = Path(__file__).parents[2] / "recipes" / "finetune_trainer.py"
TWO_PROCESSES = Path(__file__).parent / "scripts" / "trainer_run.py"
SPARSITY = {"method": "rigl", "density": 0.5, "update_interval": 2, "stop_fraction": 1.0}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainer writes accelerate's settings into the environment; they must not reach other tests."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model() -> NeuroTrailsLlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NeuroTrailsLlamaConfig(
        vocab_size=320, **shape, num_ensemble_heads=2, num_head_layers=1, pad_token_id=1, eos_token_id=0
    )
    return NeuroTrailsLlamaForCausalLM(config)


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> MakeTrainer:
    """`make_trainer(name, model=..., sparsity=..., callbacks=..., **training arguments)`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = [row["text"] for row in load_documents(str(corpus_dir), "train")]
    tokens = tokenizer(texts, truncation=True, max_length=16, return_token_type_ids=False)
    data = datasets.Dataset.from_dict(dict(tokens))

    def make(
        name: str = "run",
        model: NeuroTrailsLlamaForCausalLM | None = None,
        sparsity: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **arguments: Any,
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "max_grad_norm": 0.0,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 3,
        }
        if callbacks is None:
            callbacks = [SparsifierCallback(SparsityConfig(**SPARSITY | (sparsity or {})))]
        return Trainer(
            model=model or make_model(),
            args=TrainingArguments(**defaults | arguments),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=callbacks,
        )

    return make


def callback_of(trainer: Trainer) -> SparsifierCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SparsifierCallback))


def masks_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return callback_of(trainer).sparsifier.masks


def assert_zero_outside_masks(trainer: Trainer) -> None:
    for name, mask in masks_of(trainer).items():
        assert not trainer.model.get_parameter(name)[~mask].any(), name


def test_the_loss_falls_while_the_network_stays_sparse(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=40, logging_steps=10, learning_rate=3e-2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [10, 20, 30, 40]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert {entry["density"] for entry in history} == {0.5}
    explored = [entry["explored"] for entry in history]
    assert explored == sorted(explored)
    assert 0.5 < explored[0] < explored[-1] <= 1
    assert_zero_outside_masks(trainer)
    assert callback_of(trainer).sparsifier.steps == 40


def test_callbacks_that_follow_see_the_density(make_trainer: MakeTrainer) -> None:
    class Record(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seen.append(dict(logs))

    seen: list[dict[str, Any]] = []
    make_trainer(callbacks=[SparsifierCallback(SparsityConfig(**SPARSITY)), Record()], max_steps=2).train()
    assert [logs["density"] for logs in seen if "loss" in logs] == [0.5]


def test_accumulation_equals_one_large_batch(make_trainer: MakeTrainer) -> None:
    large = make_trainer("large")
    small = make_trainer("small", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for trainer in (large, small):
        trainer.train()
    for name, mask in masks_of(large).items():
        assert torch.equal(mask, masks_of(small)[name]), name
    for name, weight in large.model.state_dict().items():
        torch.testing.assert_close(weight, small.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"method": "neurotrails_llm", "update_interval": 3}], ids=["rigl", "llm"])
@pytest.mark.parametrize("stop", [2, 6])
def test_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, tmp_path: Path, fields: dict[str, Any], stop: int
) -> None:
    whole = make_trainer("whole", sparsity=fields)
    whole.train()
    # The checkpoint may lie anywhere.
    shutil.move(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "elsewhere")
    resumed = make_trainer("resumed", sparsity=fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    states = [callback_of(trainer).sparsifier.state_dict() for trainer in (whole, resumed)]
    torch.testing.assert_close(states[0]["masks"], states[1]["masks"], rtol=0, atol=0)
    torch.testing.assert_close(states[0]["explored"], states[1]["explored"], rtol=0, atol=0)
    optimizers = [torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt") for name in ("whole", "resumed")]
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=0, atol=0)


def test_bf16_keeps_float32_weights(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(bf16=True, max_steps=4)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert_zero_outside_masks(trainer)


def test_a_sparse_checkpoint_is_fine_tuned_with_its_own_masks(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer("first")
    first.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-8")
    trained = copy.deepcopy(model.state_dict())
    # A learning rate of nothing shows what sparsifying alone does.
    second = make_trainer(
        "second", model, {"method": "static", "mask_init": "magnitude"}, learning_rate=0.0, max_steps=2
    )
    second.train()
    torch.testing.assert_close(second.model.state_dict(), trained, rtol=0, atol=0)
    for name, mask in masks_of(first).items():
        assert int(masks_of(second)[name].sum()) == int(mask.sum()), name
        assert masks_of(second)[name][trained[name] != 0].all(), name


def test_a_second_training_starts_from_the_present_weights(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2, sparsity={"mask_init": "magnitude"})
    trainer.train()
    first = callback_of(trainer).sparsifier
    trainer.train()
    assert callback_of(trainer).sparsifier is not first
    state = trainer.optimizer.state_dict()["param_groups"][0]["sparsifier"]
    assert state["steps"] == callback_of(trainer).sparsifier.steps == 2


def test_clipping_by_the_weights_that_exist(make_trainer: MakeTrainer) -> None:
    config = SparsityConfig(**SPARSITY | {"method": "static"})
    model = make_model()
    trainer = make_trainer(
        model=model,
        callbacks=[SparsifierCallback(config, max_grad_norm=1e-3)],
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=1,
    )
    start = copy.deepcopy(model.state_dict())
    trainer.train()
    moved = [
        (model.get_parameter(name).detach() - start[name]).mul(masks_of(trainer).get(name, 1)).norm()
        for name, _ in model.named_parameters()
    ]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-3, rel=1e-3)


class TestMistakes:
    @pytest.mark.parametrize(
        ("engine", "message"),
        [
            ({"distributed_type": DistributedType.DEEPSPEED}, "distributed_type=DEEPSPEED.*use DDP"),
            ({"distributed_type": DistributedType.FSDP}, "distributed_type=FSDP.*leave the engine out"),
            ({"mixed_precision": "fp16"}, "mixed_precision='fp16'.*bf16"),
        ],
    )
    def test_engines(self, make_trainer: MakeTrainer, engine: dict[str, Any], message: str) -> None:
        state = SimpleNamespace(**{"distributed_type": DistributedType.NO, "mixed_precision": "no", **engine})
        trainer = make_trainer()
        with pytest.raises(ValueError, match=message):
            callback_of(trainer).on_train_begin(
                trainer.args, trainer.state, trainer.control, optimizer=SimpleNamespace(accelerator_state=state)
            )

    def test_clipping_twice(self, make_trainer: MakeTrainer) -> None:
        callback = SparsifierCallback(SparsityConfig(**SPARSITY), max_grad_norm=1.0)
        with pytest.raises(ValueError, match=r"max_grad_norm=0.5 in TrainingArguments and 1.0"):
            make_trainer(callbacks=[callback], max_grad_norm=0.5).train()

    def test_resuming_a_dense_run(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        make_trainer("dense", callbacks=[], max_steps=2).train()
        with pytest.raises(ValueError, match=r"step 2 holds no masks"):
            make_trainer("sparse").train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-2"))

    def test_resuming_another_configuration(self, make_trainer: MakeTrainer, tmp_path: Path) -> None:
        make_trainer("run", max_steps=4).train()
        checkpoint = str(tmp_path / "run" / "checkpoint-2")
        with pytest.raises(ValueError, match=r"these fields differ: density"):
            make_trainer("other", max_steps=4, sparsity={"density": 0.4}).train(resume_from_checkpoint=checkpoint)
        with pytest.raises(ValueError, match=r"total_steps=6"):
            make_trainer("longer", max_steps=6).train(resume_from_checkpoint=checkpoint)


def test_the_recipe_fine_tunes_a_sparse_checkpoint(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    corpus_dir: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_trainer("trained").train()
    checkpoint = tmp_path / "trained" / "checkpoint-8"
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(checkpoint)
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    training = {"output_dir": tmp_path / "tuned", "max_steps": 20, "learning_rate": 0.03, "logging_steps": 5}
    quiet = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True}
    options = [f"--training.{name}={value}" for name, value in (training | quiet).items()]
    sparsity = ["--sparsity.density=0.5", "--sparsity.update_interval=5"]
    source = [f"--model={checkpoint}", f"--train={corpus_dir}", "--max_length=16"]
    monkeypatch.setattr("sys.argv", [str(RECIPE), *source, *sparsity, *options])
    runpy.run_path(str(RECIPE), run_name="__main__")

    state = json.loads((tmp_path / "tuned" / "checkpoint-20" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for model in (before, after):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        assert sum(int(p.count_nonzero()) for p in matrices) <= 0.5 * sum(p.numel() for p in matrices)


def test_the_recipe_names_a_field_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(RECIPE), "--model=a", "--train=b", "--sparsity={}", "--training.max_step=3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stop.value.code == 2
    assert "finetune_trainer.py: error: training={'max_step': 3}: no fields" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_recipe_resumes_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path, processes: int
) -> None:
    make_trainer("trained", save_steps=8).train()
    checkpoint = tmp_path / "trained" / "checkpoint-8"
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(checkpoint)
    training = {"max_steps": 8, "logging_steps": 2, "save_steps": 2, "learning_rate": 0.03, "warmup_steps": 3}
    quiet = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True}

    def finetune(folder: Path, **fields: Any) -> None:
        options = {"output_dir": folder, "per_device_train_batch_size": 4, **training, **quiet, **fields}
        source = [f"--model={checkpoint}", f"--train={corpus_dir}", "--max_length=16"]
        sparsity = ["--sparsity.density=0.5", "--sparsity.update_interval=2", "--sparsity.stop_fraction=1.0"]
        launch(
            processes, RECIPE, *source, *sparsity, *(f"--training.{name}={value}" for name, value in options.items())
        )

    def left(folder: Path) -> dict[str, Any]:
        state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
        optimizer = torch.load(folder / "checkpoint-8" / "optimizer.pt")
        assert sorted(path.name for path in folder.glob("checkpoint-8/rng_state*")) == (
            ["rng_state.pth"] if processes == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
        )
        return {
            "log": state["log_history"],
            "optimizer": optimizer,
            "weights": load_file(folder / "model.safetensors"),
        }

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune(whole)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-6", "checkpoint-8"))
    finetune(resumed, resume_from_checkpoint=resumed / "checkpoint-4")
    assert_equal(left(resumed), left(whole))


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        launch(processes, TWO_PROCESSES, tmp_path / f"of_{processes}", 8 // processes)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("of_1_0", "of_2_0", "of_2_1"))
    for masks in two:
        torch.testing.assert_close(masks, one, rtol=0, atol=0)
