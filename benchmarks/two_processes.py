# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What the sparsifier adds to a training step on two processes, by DDP and by FSDP2.

    python benchmarks/two_processes.py [--quick] [--json FILE]

NeuroTrails has hidden size 256, 8 layers, 5 of them in each of 3 heads, vocabulary 4096: 18.4M weights. Each process
takes 4 x 256 tokens a step on one thread; gloo carries gradients, and under FSDP2 weights as well. The step is
forward, backward and Adam. The sparsifier masks after every step and updates the topology every 50, as published,
here at its largest: half of the active weights dropped by soft magnitude, as many grown by gradient.

    sparsifier_over_step_two_processes = (masking + (update - masking) / 50) / step, by DDP; ..._fsdp2 by FSDP2

Times are those of the slower process.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from harness import parse_args, report, time_interleaved
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


PROCESSES, BATCH, SEQUENCE, UPDATE_INTERVAL = 2, 4, 256, 50
MODEL = NeuroTrailsLlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_attention_heads=4,
    num_hidden_layers=8,
    num_head_layers=5,
    num_ensemble_heads=3,
)


def distributed(model: NeuroTrailsLlamaForCausalLM, engine: str) -> nn.Module:
    """The model as the engine wraps it; FSDP2 shards the units that the model names, as accelerate would."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules or module is model.get_input_embeddings():
            fully_shard(module)
    return fully_shard(model)


def measure(engine: str, rounds: int) -> dict[str, float]:
    """Seconds of a step without the sparsifier, of masking, and of masking with a topology update."""
    torch.manual_seed(0)
    tokens = torch.randint(MODEL.vocab_size, (BATCH, SEQUENCE))
    model = distributed(NeuroTrailsLlamaForCausalLM(MODEL).train(), engine)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    masking, updating = (
        Sparsifier(model, optimizer, SparsityConfig(method="neurotrails_llm", **fields), total_steps=1000)
        for fields in ({"stop_fraction": 0.0}, {"update_interval": 1, "drop_schedule": "constant"})
    )

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss.backward()
        optimizer.step()

    functions = {"step": step, "masking": masking.step, "update": updating.step}
    seconds = time_interleaved(functions, rounds=rounds, warmup=2, setup=dist.barrier)
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(seconds, slowest.tolist(), strict=True))


def work(rank: int, folder: str, rounds: int) -> None:
    """One process: measures both engines; the first leaves the figures in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results = {engine: measure(engine, rounds) for engine in ("ddp", "fsdp2")}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    """Start the processes and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, 3 if args.quick else 15), nprocs=PROCESSES)
        results = json.loads((Path(folder) / "results.json").read_text())
    ratios = {
        engine: (s["masking"] + (s["update"] - s["masking"]) / UPDATE_INTERVAL) / s["step"]
        for engine, s in results.items()
    }
    report(
        {
            "sparsifier_over_step_two_processes": ratios["ddp"],
            "sparsifier_over_step_two_processes_fsdp2": ratios["fsdp2"],
            **{f"{engine}_{name}_s": value for engine, s in results.items() for name, value in s.items()},
        },
        args,
    )


if __name__ == "__main__":
    main()
