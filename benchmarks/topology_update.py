# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""One topology update of all tensors against one forward-backward pass of 8 x 256 tokens.

    python benchmarks/topology_update.py [--size small|llama_130m] [--quick] [--json FILE]

NeuroTrails has hidden size 256, 8 layers, 5 of them in each of 3 heads, vocabulary 4096: 18.4M weights; or the shape
of LLaMA-130M, 296.5M weights. The update is the published one at its largest: half of the active weights dropped by
soft magnitude, as many grown by gradient.

    update_over_forward_backward = update / forward_backward
"""

import argparse

import torch
from harness import SIZES, parse_args, report, time_interleaved

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


BATCH, SEQUENCE = 8, 256
SPARSITY = SparsityConfig(method="neurotrails_llm", update_interval=1, drop_schedule="constant")


def main() -> None:
    """Time both in turn, an optimizer step before each, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="the network (default: %(default)s)")
    args = parse_args(parser)
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SIZES[args.size])
    tokens = torch.randint(config.vocab_size, (BATCH, SEQUENCE))
    model = NeuroTrailsLlamaForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    sparsifier = Sparsifier(model, optimizer, SPARSITY, total_steps=1000)

    def forward_backward() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False, skip_logits=True, headwise_backward=True).loss.backward()

    seconds = time_interleaved(
        {"forward_backward": forward_backward, "update": sparsifier.step},
        rounds=(5 if args.quick else 25) if args.size == "small" else (2 if args.quick else 7),
        warmup=2 if args.size == "small" else 1,
        setup=optimizer.step,
    )
    weights = sparsifier.summary().numel
    report(
        {
            "update_over_forward_backward": seconds["update"] / seconds["forward_backward"],
            **{f"{name}_s": value for name, value in seconds.items()},
            "update_ns_per_weight": seconds["update"] / weights * 1e9,
            "weights": weights,
        },
        args,
    )


if __name__ == "__main__":
    main()
