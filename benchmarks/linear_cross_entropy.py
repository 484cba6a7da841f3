# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Output layer and cross-entropy of one head, forward and backward: this library's, torch's, and with all logits.

    python benchmarks/linear_cross_entropy.py [--quick] [--json FILE]

2,040 tokens, hidden size 768, vocabulary 32000, in float32 and under bfloat16 autocast; 512 tokens at a time, in this
library and in `torch.nn.functional.linear_cross_entropy`, which autocast leaves alone: under it, once as it is, once
with inputs converted beforehand. `*_loss_error` is the relative error of the loss, against float64.

    ours_over_torch = ours / torch
    ours_bf16_over_torch_bf16_inputs = ours_bf16 / torch_bf16_inputs
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from nt_transformers.models.neurotrails_llama.loss_neurotrails_llama import NeuroTrailsLlamaOutputLayer


TOKENS, HIDDEN, VOCABULARY = 2040, 768, 32000
OPTIONS = LinearCrossEntropyOptions(batch_chunk_size=512)


def main() -> None:
    """Time all in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    layer = NeuroTrailsLlamaOutputLayer(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    losses: dict[str, float] = {}

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=OPTIONS)

    def step(name: str, loss: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = layer.weight.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss()
            value.backward()
            losses[name] = value.item()

        return run

    def ours() -> Tensor:
        return layer(hidden, targets)

    def theirs() -> Tensor:
        return chunked(hidden, layer.weight)

    def converted() -> Tensor:
        return chunked(hidden.bfloat16(), layer.weight.bfloat16())

    def all_logits() -> Tensor:
        return F.cross_entropy(layer(hidden).float(), targets, reduction="sum")

    candidates = {
        "ours": (ours, False),
        "torch": (theirs, False),
        "logits": (all_logits, False),
        "ours_bf16": (ours, True),
        "torch_bf16": (theirs, True),
        "torch_bf16_inputs": (converted, True),
        "logits_bf16": (all_logits, True),
    }
    steps = {name: step(name, *candidate) for name, candidate in candidates.items()}
    seconds = time_interleaved(steps, rounds=2 if args.quick else 9)
    exact = F.cross_entropy(hidden.double() @ layer.weight.double().T, targets, reduction="sum").item()
    report(
        {
            "ours_over_torch": seconds["ours"] / seconds["torch"],
            "ours_over_logits": seconds["ours"] / seconds["logits"],
            "ours_bf16_over_torch_bf16": seconds["ours_bf16"] / seconds["torch_bf16"],
            "ours_bf16_over_torch_bf16_inputs": seconds["ours_bf16"] / seconds["torch_bf16_inputs"],
            **{f"{name}_loss_error": abs(loss / exact - 1) for name, loss in losses.items()},
            **{f"{name}_s": value for name, value in seconds.items()},
        },
        args,
    )


if __name__ == "__main__":
    main()
