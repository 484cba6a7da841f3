# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Time of a topology update per weight, from one million to 300 million weights: linear if it stays the same.

    python benchmarks/scaling.py [--quick] [--json FILE]

NeuroTrails LLaMA of growing depth, then width, the largest of LLaMA-130M's shape with 3 heads; no tensor has less than
65,536 weights. The update is the published one at its largest: half of the active weights dropped by soft magnitude,
as many grown by gradient.

    update_ns_per_weight_spread = slowest / fastest of update_ns_per_weight_*

`small_tensors` is left out of it: a million weights in 58 tensors, where each tensor's fixed cost shows.
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


# Vocabulary, hidden size, intermediate size, layers, heads, layers of a head.
SHAPES = {
    "1m": (512, 256, 688, 1, 1, 1),
    "4m": (512, 256, 688, 2, 3, 1),
    "18m": (4096, 256, 688, 8, 3, 5),
    "75m": (8192, 512, 1376, 8, 3, 5),
    "300m": (32000, 768, 2048, 12, 3, 8),
    "small_tensors": (512, 96, 256, 4, 3, 2),
}
SPARSITY = SparsityConfig(method="neurotrails_llm", update_interval=1, drop_schedule="constant")


def updater(size: str) -> tuple[Callable[[], object], int]:
    """A function that updates the topology of a network of that size, and how many weights it masks."""
    vocabulary, hidden, intermediate, layers, heads, head_layers = SHAPES[size]
    config = NeuroTrailsLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=4,
        num_hidden_layers=layers,
        num_ensemble_heads=heads,
        num_head_layers=head_layers,
    )
    model = NeuroTrailsLlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimizer, SPARSITY, total_steps=1000)
    return sparsifier.step, sparsifier.summary().numel


def main() -> None:
    """Time the updates of all sizes in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    updates = {size: updater(size) for size in SHAPES}
    seconds = time_interleaved({size: step for size, (step, _) in updates.items()}, rounds=3 if args.quick else 11)
    nanoseconds = {size: seconds[size] / updates[size][1] * 1e9 for size in SHAPES}
    large = [value for size, value in nanoseconds.items() if size != "small_tensors"]
    report(
        {
            "update_ns_per_weight_spread": max(large) / min(large),
            **{f"update_ns_per_weight_{size}": value for size, value in nanoseconds.items()},
            **{f"weights_{size}": updates[size][1] for size in SHAPES},
        },
        args,
    )


if __name__ == "__main__":
    main()
