# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Plans against what can be counted by hand and against the memory of real training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nt_transformers.data import TextDataConfig
from nt_transformers.models import NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import LlamaArguments, TextTrainingConfig, parse_arguments
from nt_transformers.training.plan import Hardware, measure_step


def run_config(model: dict[str, Any] | None = None, **options: Any) -> TextTrainingConfig:
    shape = {
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_ensemble_heads": 3,
        "num_head_layers": 2,
    }
    defaults: dict[str, Any] = {"max_steps": 100, "global_batch_size": 8, "per_device_batch_size": 4}
    return TextTrainingConfig(
        output_dir="unused",
        model=LlamaArguments(**shape | (model or {})),
        data=TextDataConfig(train="unused", tokenizer="unused", sequence_length=16),
        sparsity=SparsityConfig(method="neurotrails_llm", density=0.5),
        **defaults | options,
    )


def test_counts_of_a_run() -> None:
    config = run_config()
    plan = config.plan(Hardware(num_processes=1, flops_per_second=1e9, utilisation=0.5))
    network = NeuroTrailsLlamaForCausalLM(config.model.outline("unused"))
    norms = sum(p.numel() for p in network.parameters() if p.ndim == 1)
    assert plan.parameters == network.num_parameters()
    assert plan.active_parameters == norms + round(0.5 * (plan.parameters - norms))
    assert plan.items == 100 * 8 * 16
    assert plan.seconds == pytest.approx(plan.items * plan.flops / 0.5e9)
    assert plan.memory.weights == plan.memory.gradients == 4 * plan.parameters
    assert plan.memory.optimizer == 8 * plan.parameters
    assert plan.memory.masks == 2 * (plan.parameters - norms)


def test_sharding_shares_out_everything_but_activations() -> None:
    shared, whole = (run_config().plan(Hardware(num_processes=2, sharding=kind)) for kind in ("fsdp2", "ddp"))
    for name in ("weights", "gradients", "optimizer", "masks"):
        assert getattr(shared.memory, name) == getattr(whole.memory, name) // 2
    assert shared.memory.activations >= whole.memory.activations
    assert whole.memory.buffers == whole.memory.gradients


def test_checkpointing_is_planned_with_less_memory_and_more_flops() -> None:
    plans = [
        run_config({"num_hidden_layers": 8, "num_head_layers": 4}, activation_checkpointing=kind).plan(Hardware())
        for kind in ("none", "heads", "all")
    ]
    none, heads, everything = [plan.flops for plan in plans]
    assert none < heads < everything < none * 4 / 3
    activations = [plan.memory.activations for plan in plans]
    assert activations == sorted(activations, reverse=True)


def test_a_plan_of_another_number_of_processes_has_to_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="global_batch_size=8: make it a multiple"):
        run_config().plan(Hardware(num_processes=3))


@pytest.mark.parametrize(("field", "value"), [("num_processes", 0), ("flops_per_second", 0), ("utilisation", 1.5)])
def test_hardware_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"hardware.{field}={value}"):
        Hardware(**{field: value})


def test_recipes_print_the_plan_and_stop(capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[2] / "recipes" / "configs" / "llama_130m.yaml"
    arguments = ["--config", str(config), "--plan", "--hardware.num_processes", "8"]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(TextTrainingConfig, "A recipe.", arguments)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "296.5 M" in printed
    assert "266.9 M" in printed


def test_the_launcher_says_how_many_processes_and_how_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (Hardware().num_processes, Hardware().sharding, Hardware().shards) == (4, "fsdp2", 4)


def test_measured_memory_of_one_linear_layer() -> None:
    class Layer(torch.nn.Linear):
        def tie_weights(self) -> None:
            pass

    def step(network: Any) -> torch.Tensor:
        return network(torch.ones(10, 100)).square().sum()

    memory = measure_step(Layer(100, 50, bias=False, device="meta"), step, run_config(), micro_batches=1)  # type: ignore[arg-type]
    # Input 1000, output 500, its square and the gradients of both at most; the weight's gradient 5000.
    assert 4 * 6500 <= memory.total <= 4 * 8000
    assert 4 * 1500 <= memory.activations <= 4 * 8000


TRAIN = """
import json, sys, torch
from nt_transformers.models import NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier
from nt_transformers.training.optimization import build_optimizer
from tests.training.test_plan import run_config

def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
config = run_config(**json.loads(sys.argv[1]))
before = peak()
model = NeuroTrailsLlamaForCausalLM(config.model.outline("unused")).train()
config.prepare(model)
optimizer = build_optimizer(model, config)
sparsifier = Sparsifier(model, optimizer, config.sparsity, total_steps=100)
tokens = torch.randint(500, (config.per_device_batch_size, config.data.sequence_length))
for _ in range(2):
    config.loss(model, alone=True, input_ids=tokens, labels=tokens)[0].backward()
    optimizer.step()
    sparsifier.step()
    optimizer.zero_grad()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"per_device_batch_size": 96, "headwise_backward": False}, {"per_device_batch_size": 192}],
    ids=["plain", "headwise"],
)
def test_planned_memory_is_what_training_takes(options: dict[str, Any]) -> None:
    shape = {"hidden_size": 320, "intermediate_size": 860, "num_hidden_layers": 6, "num_head_layers": 4}
    given = {"model": shape, "global_batch_size": options["per_device_batch_size"], **options}
    planned = run_config(**given).plan(Hardware(num_processes=1)).memory.total
    command = [sys.executable, "-c", TRAIN, json.dumps(given)]
    root = Path(__file__).parents[2]
    # Lets glibc return what is freed, which it would keep in part.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    run = subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True, text=True)
    measured = int(run.stdout)
    assert planned == pytest.approx(measured, rel=0.15)
