# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Tokens per second of `generate` on the CPU: compressed NeuroTrails against dense networks, at LLaMA-350M size.

    python benchmarks/decode.py [--quick] [--json FILE] [--context 128]

Random weights, greedy, batch 1. NeuroTrails has 24 layers, 16 of them in each of 3 heads, and all heads vote. The
dense networks: one LLaMA of 24 layers in torch (bfloat16 and float32; the faster counts), the same on this library's
dense kernel (bfloat16), and the full ensemble of three (bfloat16, torch). Figures are ratios of tokens/s:

    neurotrails_<density>_<values>_over_dense_single     over the faster of the two in torch
    neurotrails_<density>_<values>_over_tuned_single     over the one on this library's kernel
    neurotrails_<density>_<values>_over_full_ensemble
    neurotrails_<density>_<values>_over_uncompressed     over the same NeuroTrails in torch, bfloat16 (density 0.2)
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from harness import parse_args, report
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.inference import compress


SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Stopwatch(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """From token to token; the first two arrivals are the prompt and the token of the prefill."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def network(heads: int, head_layers: int, density: float, dtype: torch.dtype) -> PreTrainedModel:
    """A network with random weights, of which the share `density` is not zero."""
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=heads, num_head_layers=head_layers)
    model = NeuroTrailsLlamaForCausalLM._from_config(config, dtype=dtype).eval()
    if density < 1:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(torch.rand_like(parameter) < density)
    return model


def decode(model: PreTrainedModel, context: torch.Tensor, tokens: int) -> list[float]:
    """Seconds for each of `tokens` decoded tokens."""
    stopwatch = Stopwatch()
    with torch.inference_mode():
        model.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=tokens + 1,
            do_sample=False,
            streamer=stopwatch,
        )
    return stopwatch.seconds()


def networks(densities: list[float], values: list[str]) -> dict[str, PreTrainedModel]:
    """What is compared, by name."""
    models: dict[str, Any] = {
        "dense_single_fp32": network(1, 16, 1.0, torch.float32),
        "dense_single_bf16": network(1, 16, 1.0, torch.bfloat16),
        "tuned_single": compress(network(1, 16, 1.0, torch.bfloat16)),
        "full_ensemble": network(3, 24, 1.0, torch.bfloat16),
        "uncompressed": network(3, 16, 0.2, torch.bfloat16),
    }
    for density in densities:
        for value in values:
            models[f"neurotrails_{density}_{value}"] = compress(network(3, 16, density, torch.bfloat16), value)
    return models


def main() -> None:
    """Decode with all networks in turn and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    args = parse_args(parser)
    models = networks([0.2] if args.quick else [0.1, 0.2, 0.5, 0.9], ["bf16", "int8"])
    context = torch.randint(SHAPE["vocab_size"], (1, args.context))
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_index in range(3 if args.quick else 6):
        for name, model in models.items():
            seconds = decode(model, context, tokens=6 if args.quick else 12)
            if round_index > 0:
                times[name] += seconds
    medians = {name: median(seconds) for name, seconds in times.items()}
    dense_single = min(medians["dense_single_fp32"], medians["dense_single_bf16"])
    figures = {}
    for name, seconds in medians.items():
        if name.startswith("neurotrails"):
            figures[f"{name}_over_dense_single"] = dense_single / seconds
            for other in ("tuned_single", "full_ensemble"):
                figures[f"{name}_over_{other}"] = medians[other] / seconds
            if "_0.2_" in name:
                figures[f"{name}_over_uncompressed"] = medians["uncompressed"] / seconds
    report({**figures, **{f"{name}_s": seconds for name, seconds in medians.items()}}, args)


if __name__ == "__main__":
    main()
