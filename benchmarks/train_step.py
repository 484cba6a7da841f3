# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training step (forward, backward, Adam) of NeuroTrails against that of stock LLaMA with the same FLOPs.

    python benchmarks/train_step.py [--quick] [--json FILE]

NeuroTrails has hidden size 256, 8 layers, 5 of them in each of 3 heads, vocabulary 4096; a step takes 8 x 256 tokens.
The stock `LlamaForCausalLM` has the same widths and as many layers as bring its FLOPs nearest to NeuroTrails' (20;
its parameters nearly match as well, 17.9M to 18.4M), and what is left of the difference, 2 %, is divided out:

    neurotrails_over_llama_same_flops = (neurotrails / its FLOPs) / (llama / its FLOPs)

The mask: the same NeuroTrails step with the sparsifier (density 0.9, no topology update) over the step without.

    masked_over_unmasked = neurotrails_masked / neurotrails

Stock LLaMA has one output layer, NeuroTrails three: its extra softmaxes count against it, FLOPs counting only matrix
products. The stock single network of 8 layers is timed as well, scaled by its FLOPs in the same way.
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


BATCH, SEQUENCE = 8, 256
HEADS, HEAD_LAYERS, LAYERS = 3, 5, 8
WIDTHS = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}


def forward_flops(layers: int, output_layers: int) -> int:
    """Floating-point operations of a forward pass for one token, matrix products only, attention causal."""
    hidden = WIDTHS["hidden_size"]
    projections = 4 * hidden**2 + 3 * hidden * WIDTHS["intermediate_size"]
    attention = SEQUENCE * hidden  # scores and values, each over SEQUENCE / 2 positions on average
    return 2 * (layers * (projections + attention) + output_layers * hidden * WIDTHS["vocab_size"])


def llama(layers: int) -> LlamaForCausalLM:
    """Stock LLaMA of the benchmark's widths."""
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, num_hidden_layers=layers))


def training_step(
    model: PreTrainedModel, tokens: torch.Tensor, sparsity: SparsityConfig | None = None, **forward_kwargs: bool
) -> Callable[[], None]:
    """A function that trains `model`, sparse if so configured, for one step on `tokens` [batch, seq]."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4, fused=True)
    sparsifier = Sparsifier(model, optimizer, sparsity, total_steps=1000) if sparsity else None

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False, **forward_kwargs).loss.backward()
        optimizer.step()
        if sparsifier:
            sparsifier.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time the three models in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    tokens = torch.randint(WIDTHS["vocab_size"], (BATCH, SEQUENCE))
    config = NeuroTrailsLlamaConfig(
        **WIDTHS, num_hidden_layers=LAYERS, num_ensemble_heads=HEADS, num_head_layers=HEAD_LAYERS
    )
    neurotrails, masked = NeuroTrailsLlamaForCausalLM(config), NeuroTrailsLlamaForCausalLM(config)
    layers_run = LAYERS + (HEADS - 1) * HEAD_LAYERS
    flops = forward_flops(layers_run, HEADS)
    depth = min(range(layers_run, 2 * layers_run), key=lambda layers: abs(forward_flops(layers, 1) - flops))

    seconds = time_interleaved(
        {
            "neurotrails": training_step(neurotrails, tokens, skip_logits=True),
            "neurotrails_masked": training_step(masked, tokens, SparsityConfig(method="static"), skip_logits=True),
            "llama": training_step(llama(depth), tokens),
            "llama_single": training_step(llama(LAYERS), tokens),
        },
        rounds=7 if args.quick else 25,
        warmup=2,
    )
    relative = {
        "llama_same_flops": seconds["llama"] * flops / forward_flops(depth, 1),
        "llama_single_scaled": seconds["llama_single"] * flops / forward_flops(LAYERS, 1),
    }
    report(
        {
            "masked_over_unmasked": seconds["neurotrails_masked"] / seconds["neurotrails"],
            **{f"neurotrails_over_{name}": seconds["neurotrails"] / value for name, value in relative.items()},
            **{f"{name}_s": value for name, value in seconds.items()},
            "llama_layers": depth,
            "forward_gflops_per_step": flops * BATCH * SEQUENCE / 1e9,
        },
        args,
    )


if __name__ == "__main__":
    main()
