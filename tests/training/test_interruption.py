# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Signals stop a run after a step with everything saved; numbers that are not finite never get into a checkpoint."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from runs import read_metrics
from test_text import RunConfig

from nt_transformers.training import Interrupted, NonFiniteError, TextTask, interruption, train_language_model
from nt_transformers.training.checkpoint import find_damage, list_checkpoints, load_checkpoint


MICRO_BATCHES = 2  # of an optimizer step in these runs


def before_loss(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    """Lets `action` happen just before the loss of micro-batch number `call` (from 1) is computed."""
    calls = iter(range(1, 10**6))
    original = TextTask.loss

    def loss(self: TextTask, *arguments: Any) -> Any:
        if next(calls) == call:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(TextTask, "loss", loss)


def break_losses(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool], head: int = 1) -> None:
    """Makes the loss of one head NaN in the micro-batches (from 1) for which `broken` is true."""
    calls = iter(range(1, 10**6))
    original = TextTask.loss

    def loss(self: TextTask, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, head_losses = original(self, *arguments)
        if broken(next(calls)):
            factor = torch.ones_like(head_losses)
            factor[head] = torch.nan
            head_losses = head_losses * factor
            total = head_losses.mean()
        return total, head_losses

    monkeypatch.setattr(TextTask, "loss", loss)


def steps(config: Any) -> list[str]:
    return [folder.name for folder in list_checkpoints(Path(config.output_dir) / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = run_config(output_dir=str(tmp_path / "whole"))
    train_language_model(whole)
    config = run_config(resume_from_checkpoint="latest", data={"num_workers": 1})
    former = signal.getsignal(number)
    before_loss(monkeypatch, 2 * MICRO_BATCHES + 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stop:
        train_language_model(config)
    monkeypatch.undo()
    assert stop.value.code == 75
    assert signal.getsignal(number) == former
    assert steps(config) == ["step_2", "step_3"]
    assert not (Path(config.output_dir) / "summary.json").exists()

    train_language_model(config)
    assert read_metrics(config.output_dir) == read_metrics(whole.output_dir)
    weights = [(Path(run.output_dir) / "model.safetensors").read_bytes() for run in (whole, config)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    program = f"""
        import os, runpy, time
        module = runpy.run_path({interruption.__file__!r})
        with module["StopSignals"]() as signals:
            os.kill(os.getpid(), {number.value})
            assert signals.received
            os.kill(os.getpid(), {number.value})
            print("the echo of a launcher is no second signal", flush=True)
            time.sleep(module["ECHO_SECONDS"] + 0.1)
            os.kill(os.getpid(), {number.value})
            time.sleep(60)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)
    assert run.returncode == -number
    assert run.stdout == "the echo of a launcher is no second signal\n"
    assert f"{number.name}: stopping after a step; once more ends at once" in run.stderr


def test_a_non_finite_loss_stops_with_step_place_and_head(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, lambda call: call == 4 * MICRO_BATCHES + 1)
    config = run_config()
    position = r"\{'epoch': 0, 'shard': 0, 'document': %d, 'token': 0, 'skipped_records': 0\}"
    culprits = r"loss nan of head 1; gradient of model\..* and others \(head 1\)"
    with pytest.raises(NonFiniteError, match=rf"step 5, data from {position % 32} to {position % 40}: {culprits}"):
        train_language_model(config)
    assert steps(config) == ["step_2", "step_4"]
    assert find_damage(Path(config.output_dir) / "checkpoints" / "step_4") is None


def test_skipping_passes_over_the_batch_and_counts_it(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, lambda call: call == 4 * MICRO_BATCHES + 1)
    config = run_config(on_non_finite="skip")
    summary = train_language_model(config)
    assert summary["steps"] == 8
    assert [line["skipped_batches"] for line in read_metrics(config.output_dir) if "loss" in line] == [0, 1]
    weights, _, state = load_checkpoint(Path(config.output_dir) / "checkpoints" / "step_8")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert state["position"]["document"] == 9 * 8

    monkeypatch.undo()
    resumed = run_config(resume_from_checkpoint=str(tmp_path / "run/checkpoints/step_6"))
    train_language_model(resumed)
    assert [line["skipped_batches"] for line in read_metrics(config.output_dir) if "loss" in line] == [0, 1]


def test_skipping_gives_up_when_no_batch_is_finite(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    break_losses(monkeypatch, lambda call: call > 4 * MICRO_BATCHES)
    config = run_config(on_non_finite="skip")
    with pytest.raises(NonFiniteError, match="10 batches in a row"):
        train_language_model(config)
    assert steps(config) == ["step_2", "step_4"]


def test_poisoned_weights_never_replace_a_good_checkpoint(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(keep_last=1, sparsity={"method": "static"})
    original = torch.optim.Adam.step
    calls = iter(range(1, 10**6))

    def step(self: torch.optim.Adam, closure: Any = None) -> Any:
        result = original(self, closure)
        if next(calls) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.inf)
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(NonFiniteError, match="step 4: .*embed_tokens.* not finite. No checkpoint was written of it"):
        train_language_model(config)
    assert steps(config) == ["step_2"]
    assert not (Path(config.output_dir) / "model.safetensors").exists()


TWO_PROCESSES = """
import os, signal, sys
from nt_transformers.data import TextDataConfig
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import *
from nt_transformers.training.text import TextTask

corpus, tokenizer, output_dir, trouble = sys.argv[1:]
rank, calls, original = int(os.environ["RANK"]), 0, TextTask.loss

def loss(self, *arguments):
    global calls
    calls += 1
    total, heads = original(self, *arguments)
    if calls == 3 and rank == 1:
        if trouble == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            total, heads = total * float("nan"), heads * float("nan")
    return total, heads

TextTask.loss = loss
model = LlamaArguments(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_head_layers=1
)
config = TextTrainingConfig(
    output_dir=output_dir, max_steps=6, global_batch_size=8, per_device_batch_size=4, model=model,
    data=TextDataConfig(train=corpus, tokenizer=tokenizer, sequence_length=16, eval_tokens=100, num_workers=0),
    sparsity=SparsityConfig(update_interval=2), checkpoint_steps=100, logging_steps=1, on_non_finite="skip",
)
try:
    train_language_model(config)
    print(f"rank {rank} finished", flush=True)
except Interrupted as stop:
    print(f"rank {rank} stopped with {stop.code}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["signal", "nan"])
def test_two_processes_act_alike(corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path, trouble: str) -> None:
    """What only one of them meets: a signal, a loss that is not finite."""
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    printed = launch(2, script, corpus_dir, tokenizer_dir, tmp_path / "run", trouble)
    checkpoints = [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")]
    skipped = [line["skipped_batches"] for line in read_metrics(str(tmp_path / "run")) if "loss" in line]
    if trouble == "signal":
        assert all(f"rank {rank} stopped with 75" in printed for rank in (0, 1))
        assert checkpoints == ["step_3"]
        assert skipped == [0, 0, 0]
    else:
        assert all(f"rank {rank} finished" in printed for rank in (0, 1))
        assert checkpoints == ["step_6"]
        assert skipped == [0, 0, 1, 1, 1, 1]
