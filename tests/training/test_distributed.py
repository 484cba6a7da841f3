# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training on two processes, by DDP and by FSDP2: the same as on one, resumed bit for bit."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nt_transformers.training import train_language_model
from nt_transformers.training.metrics import TIMING_FIELDS


SCRIPT = Path(__file__).parent / "scripts" / "text_runs.py"
RUNS = runpy.run_path(str(SCRIPT))
ENGINES = ("ddp", "fsdp")
DATA = tuple(RUNS["DATA"])
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, tokenizer_dir: Path) -> Path:
    """Folder of the runs of the script."""
    folder = tmp_path_factory.mktemp("runs")
    launch(2, SCRIPT, folder, corpus_dir, tokenizer_dir)
    return folder


@pytest.fixture
def train_alone(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> Any:
    """Trains on one process with batches twice as large, and returns the folder."""

    def train(data: str, folder: Path = tmp_path / "alone") -> Path:
        train_language_model(
            RUNS["config"](
                folder, str(corpus_dir), str(tokenizer_dir), data, per_device_batch_size=4, mixed_precision="no"
            )
        )
        return folder

    return train


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in lines]


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Everything that a checkpoint holds but the folder's own name."""
    folder = folder / "checkpoints" / f"step_{step}"
    return {
        "weights": load_file(folder / "model.safetensors"),
        "training": torch.load(folder / "training.pt"),
        "state": json.loads((folder / "state.json").read_text()),
    }


def assert_equal(left: Any, right: Any) -> None:
    """Bit for bit, however nested."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            assert_equal(ours, theirs)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_run(ours: Path, theirs: Path, first: int = 2) -> None:
    """The same to float tolerance, the masks exactly."""
    for step in range(first, 9, 2):
        left, right = checkpoint(ours, step), checkpoint(theirs, step)
        for part in ("masks", "explored"):
            assert_equal(left["training"]["sparsifier"][part], right["training"]["sparsifier"][part])
        torch.testing.assert_close(left["weights"], right["weights"], rtol=1e-3, atol=1e-4)
        assert left["state"]["position"] == right["state"]["position"]
    torch.testing.assert_close(metrics(ours), metrics(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs: Path, train_alone: Any, engine: str, data: str) -> None:
    """Evaluation figures, logged losses and data positions included."""
    alone = train_alone(data)
    masks = [str(checkpoint(alone, step)["training"]["sparsifier"]["masks"]) for step in (2, 4, 6)]
    assert len(set(masks)) == 3, "the topology changes"
    assert_same_run(runs / f"{engine}_{data}", alone)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Path, engine: str, data: str) -> None:
    whole, resumed = runs / f"{engine}_{data}", runs / f"{engine}_{data}_resumed"
    assert metrics(resumed) == metrics(whole)
    for step in (6, 8):
        assert_equal(checkpoint(resumed, step), checkpoint(whole, step))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("data", DATA)
def test_one_process_resumes_the_run_of_two_and_says_what_is_not_exact(
    runs: Path, train_alone: Any, tmp_path: Path, engine: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RUNS["copy_checkpoints"](runs / f"{engine}_{data}", tmp_path / "alone")
    train_alone(data)
    output = capsys.readouterr().out
    assert "step_4 at step 4 of 8" in output
    assert (
        "{'processes': 2, 'per_device_batch_size': 2}, now by {'processes': 1, 'per_device_batch_size': 4}" in output
    )
    assert "rounded in another order" in output
    assert_same_run(tmp_path / "alone", runs / f"{engine}_{data}", first=6)


@pytest.mark.parametrize("data", DATA)
def test_both_engines_leave_the_same_hub_checkpoint(runs: Path, data: str) -> None:
    ddp, fsdp = (runs / f"{engine}_{data}" for engine in ENGINES)
    names = {path.name for path in ddp.iterdir()}
    assert {path.name for path in fsdp.iterdir()} == names
    for name in names - {"model.safetensors", "README.md", "summary.json", "metrics.jsonl", "checkpoints"}:
        assert (fsdp / name).read_bytes() == (ddp / name).read_bytes(), name
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (fsdp, ddp))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_processes_evaluate_with_the_running_means_of_the_first(runs: Path) -> None:
    first, second = (torch.load(runs / f"buffers_{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    assert first["running_mean"].tolist() == pytest.approx([0.45, 0.55, 0.65])


def test_sharded_bf16_keeps_float32_weights(runs: Path) -> None:
    folder = runs / "fsdp_padded_bf16"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    losses, exact = ([line["loss"] for line in metrics(f) if "loss" in line] for f in (folder, runs / "fsdp_padded"))
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.02)
    assert torch.tensor(losses).bfloat16().tolist() != losses, "sums of losses are float32"
