# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training step (forward, backward, Adam) of NeuroTrails against that of stock LLaMA with the same FLOPs.

    python benchmarks/train_step.py [--size small|llama_130m] [--quick] [--json FILE]

NeuroTrails has hidden size 256, 8 layers, 5 of them in each of 3 heads, vocabulary 4096 (or the shape of LLaMA-130M);
a step takes 8 x 256 tokens. The stock `LlamaForCausalLM` has the same widths and as many layers as bring its FLOPs
nearest to NeuroTrails' (20 at the small size, where its parameters nearly match as well, 17.9M to 18.4M), and what is
left of the difference, 2 %, is divided out:

    neurotrails_over_llama_same_flops = (neurotrails / its FLOPs) / (llama / its FLOPs)

Stock LLaMA has one output layer, NeuroTrails three: its extra softmaxes count against it, FLOPs counting only matrix
products. NeuroTrails steps as the recipes do on one process, with headwise backward. At the small size also, each over
that step:

- the mask: with the sparsifier (density 0.9, no topology update),
  masked_over_unmasked = neurotrails_masked / neurotrails;
- options: one backward pass for all heads (plain), activation checkpointing of the heads, bfloat16 autocast, an Adam
  that is not fused, and, unless --quick, compiled layers, with their compilation untimed;

and it over the full ensemble, stock models of the single network's depth trained in turn, one for each head, and over
the stock single network, scaled by its FLOPs.
"""

import argparse
from collections.abc import Callable

import torch
from harness import SIZES, parse_args, report, time_interleaved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig


BATCH, SEQUENCE = 8, 256


def forward_flops(shape: dict[str, int], layers: int, output_layers: int) -> int:
    """Floating-point operations of a forward pass for one token, matrix products only, attention causal."""
    hidden = shape["hidden_size"]
    projections = 4 * hidden**2 + 3 * hidden * shape["intermediate_size"]
    attention = SEQUENCE * hidden  # scores and values, each over SEQUENCE / 2 positions on average
    return 2 * (layers * (projections + attention) + output_layers * hidden * shape["vocab_size"])


def llama(shape: dict[str, int], layers: int) -> LlamaForCausalLM:
    """Stock LLaMA of these widths."""
    widths = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    return LlamaForCausalLM(LlamaConfig(**{name: shape[name] for name in widths}, num_hidden_layers=layers))


def training_step(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    sparsity: SparsityConfig | None = None,
    *,
    fused: bool = True,
    bf16: bool = False,
    **forward_kwargs: bool,
) -> Callable[[], None]:
    """A function that trains `model`, sparse if so configured, for one step on `tokens` [batch, seq]."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4, fused=fused)
    sparsifier = Sparsifier(model, optimizer, sparsity, total_steps=1000) if sparsity else None

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens, labels=tokens, use_cache=False, **forward_kwargs).loss
        loss.backward()
        optimizer.step()
        if sparsifier:
            sparsifier.step()
        optimizer.zero_grad()

    return step


def in_turn(steps: list[Callable[[], None]]) -> Callable[[], None]:
    """A function that calls one after the other."""

    def step() -> None:
        for single in steps:
            single()

    return step


def main() -> None:
    """Time the models in turn and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="the network (default: %(default)s)")
    args = parse_args(parser)
    torch.manual_seed(0)
    shape = SIZES[args.size]
    layers, heads = shape["num_hidden_layers"], shape["num_ensemble_heads"]
    tokens = torch.randint(shape["vocab_size"], (BATCH, SEQUENCE))
    layers_run = layers + (heads - 1) * shape["num_head_layers"]
    flops = forward_flops(shape, layers_run, heads)
    depth = min(range(layers_run, 2 * layers_run), key=lambda depth: abs(forward_flops(shape, depth, 1) - flops))

    def neurotrails() -> NeuroTrailsLlamaForCausalLM:
        return NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**shape))

    def neurotrails_step(
        model: NeuroTrailsLlamaForCausalLM | None = None,
        sparsity: SparsityConfig | None = None,
        headwise_backward: bool = True,
        **options: bool,
    ) -> Callable[[], None]:
        options |= {"skip_logits": True, "headwise_backward": headwise_backward}
        return training_step(model or neurotrails(), tokens, sparsity, **options)

    steps = {"neurotrails": neurotrails_step(), "llama": training_step(llama(shape, depth), tokens)}
    if args.size == "small":
        checkpointing = neurotrails()
        checkpointing.activation_checkpointing_enable(heads_only=True)
        steps |= {
            "neurotrails_masked": neurotrails_step(sparsity=SparsityConfig(method="static")),
            "neurotrails_plain": neurotrails_step(headwise_backward=False),
            "neurotrails_checkpointing_heads": neurotrails_step(checkpointing, headwise_backward=False),
            "neurotrails_bf16": neurotrails_step(bf16=True),
            "neurotrails_unfused_adam": neurotrails_step(fused=False),
            "separate_models": in_turn([training_step(llama(shape, layers), tokens) for _ in range(heads)]),
            "llama_single": training_step(llama(shape, layers), tokens),
        }
        if not args.quick:
            compiled = neurotrails()
            for module in compiled.modules():
                if isinstance(module, LlamaDecoderLayer):
                    module.compile()
            steps["neurotrails_compiled"] = neurotrails_step(compiled)
    rounds = (5 if args.quick else 15) if args.size == "small" else (2 if args.quick else 7)
    seconds = time_interleaved(steps, rounds=rounds)

    figures = {
        "neurotrails_over_llama_same_flops": seconds["neurotrails"]
        / (seconds["llama"] * flops / forward_flops(shape, depth, 1))
    }
    if args.size == "small":
        single = seconds["llama_single"] * flops / forward_flops(shape, layers, 1)
        figures |= {
            "masked_over_unmasked": seconds["neurotrails_masked"] / seconds["neurotrails"],
            "neurotrails_over_separate_models": seconds["neurotrails"] / seconds["separate_models"],
            "neurotrails_over_llama_single_scaled": seconds["neurotrails"] / single,
        }
        for option in ("plain", "checkpointing_heads", "bf16", "unfused_adam", "compiled"):
            if (name := f"neurotrails_{option}") in seconds:
                figures[f"{option}_over_neurotrails"] = seconds[name] / seconds["neurotrails"]
    figures |= {f"{name}_s": value for name, value in seconds.items()}
    report(figures | {"llama_layers": depth, "forward_gflops_per_step": flops * BATCH * SEQUENCE / 1e9}, args)


if __name__ == "__main__":
    main()
