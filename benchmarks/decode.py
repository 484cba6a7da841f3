# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of compressed NeuroTrails on the CPU against dense networks, at LLaMA-350M size.

    python benchmarks/decode.py [--quick] [--json FILE]

Random weights, greedy. NeuroTrails has 24 layers, 16 of them in each of 3 heads, and all heads vote. The dense
networks: one LLaMA of 24 layers in torch (bfloat16 and float32; the faster counts), the same on this library's dense
kernel (bfloat16), the full ensemble of three in torch (bfloat16), and NeuroTrails itself in torch (`uncompressed`,
bfloat16 and float32; the faster counts). Figures are ratios of tokens/s of `generate`, batch 1, context of 128:

    neurotrails_<density>_<values>_over_dense_single     over the faster of the two in torch
    neurotrails_<density>_<values>_over_tuned_single     over the one on this library's kernel
    neurotrails_<density>_<values>_over_full_ensemble
    neurotrails_0.2_bf16_kept_once_over_...              the same without `fast_decoding`
    context_<tokens>_neurotrails_...                     the same after 512 and 2048 tokens, density 0.2
    batch8_0.2_<values>_over_uncompressed                8 texts at a time
    prefill_512_0.2_<values>_over_uncompressed           a text of 512 tokens, without generation
    bandwidth_share_<density>_<values>                   bytes per token / time of the linear layers, one after the
                                                         other in one parallel region, over the read bandwidth measured
                                                         in turn
    resident_memory_0.2_<values>_output_<sparse|dense>   bytes of all weights over the bytes in dense bfloat16, without
                                                         `fast_decoding`
    resident_memory_0.2_<values>_fast_decoding           the same with it, output layers sparse

What torch computes in bfloat16 far more slowly than in float32 (batches and prompts, without AVX-512) is left out.
"""

import argparse
import time
from collections.abc import Iterable
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from bandwidth import READ_BYTES, multiplying, reading
from harness import parse_args, report, time_interleaved
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.initialization import no_init_weights

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.inference import SparseLinear, compress
from nt_transformers.inference.matrix import Values


SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CASES: list[tuple[float, Values]] = [(0.2, "bf16"), (0.2, "int8"), (0.1, "bf16"), (0.5, "bf16"), (0.9, "bf16")]
UNCOMPRESSED = ("uncompressed_bf16", "uncompressed_fp32")
SINGLES = ("dense_single_bf16", "dense_single_fp32")


class Stopwatch(BaseStreamer):
    """Notes when each token arrives; `BaseStreamer` takes batches as they come."""

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
    with no_init_weights():
        model = NeuroTrailsLlamaForCausalLM._from_config(config, dtype=dtype).eval()
    # Drawing every weight would take longer than the measurement: all matrices repeat the same millions.
    pool = (0.02 * torch.randn(1 << 22) * (torch.rand(1 << 22) < density)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(len(pool)):
                part.copy_(pool[: len(part)])
    return model


def networks(cases: list[tuple[float, Values]]) -> dict[str, PreTrainedModel]:
    """What is compared, by name."""
    models: dict[str, Any] = {
        "dense_single_fp32": network(1, 16, 1.0, torch.float32),
        "dense_single_bf16": network(1, 16, 1.0, torch.bfloat16),
        "tuned_single": compress(network(1, 16, 1.0, torch.bfloat16)),
        "full_ensemble": network(3, 24, 1.0, torch.bfloat16),
        "uncompressed_bf16": network(3, 16, 0.2, torch.bfloat16),
        "uncompressed_fp32": network(3, 16, 0.2, torch.float32),
    }
    for density, values in cases:
        models[f"neurotrails_{density}_{values}"] = compress(network(3, 16, density, torch.bfloat16), values)
    models["neurotrails_0.2_bf16_kept_once"] = compress(network(3, 16, 0.2, torch.bfloat16), fast_decoding=False)
    return models


@torch.inference_mode()
def prefill(model: PreTrainedModel, context: torch.Tensor) -> None:
    """Computes the key-value cache of a text."""
    model(input_ids=context, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def decode(model: PreTrainedModel, context: torch.Tensor, cache: Cache, tokens: int) -> list[float]:
    """Seconds for each of `tokens` decoded tokens; the cache of the context is left as it was."""
    stopwatch = Stopwatch()
    cache.crop(context.shape[1] - 1 - cache.get_seq_length())
    model.generate(
        context,
        attention_mask=torch.ones_like(context),
        past_key_values=cache,
        max_new_tokens=tokens + 1,
        do_sample=False,
        streamer=stopwatch,
    )
    return stopwatch.seconds()


def random_cache(model: PreTrainedModel, shape: tuple[int, int]) -> Cache:
    """The key-value cache of some texts [batch, tokens], which takes no time to compute: of random numbers."""
    config, cache = cast(NeuroTrailsLlamaConfig, model.config), DynamicCache()
    for layer in range(config.num_backbone_layers + config.num_ensemble_heads * config.num_head_layers):
        states = torch.randn(2, shape[0], config.num_key_value_heads, shape[1], config.head_dim).to(model.dtype)
        cache.update(*states, layer)
    return cache


def contenders(tokens: int) -> list[str]:
    """NeuroTrails in torch, in the types that are not far slower than the other: some processors lack bfloat16."""
    x, weight = (
        torch.randn(tokens, SHAPE["hidden_size"]),
        torch.randn(SHAPE["intermediate_size"], SHAPE["hidden_size"]),
    )
    types = dict(zip(UNCOMPRESSED, (torch.bfloat16, torch.float32), strict=True))
    products = {
        name: partial(torch.nn.functional.linear, x.to(dtype), weight.to(dtype)) for name, dtype in types.items()
    }
    seconds = time_interleaved(products, 5)
    return [name for name in UNCOMPRESSED if seconds[name] < 2 * min(seconds.values())]


def decoding_seconds(
    models: dict[str, PreTrainedModel], names: Iterable[str], shape: tuple[int, int], tokens: int, rounds: int
) -> dict[str, float]:
    """Median seconds per token of the models `names`, in turn, after contexts of [batch, tokens]."""
    context = torch.randint(SHAPE["vocab_size"], shape)
    caches = {name: random_cache(models[name], shape) for name in names}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for round_index in range(rounds + 1):
        for name, cache in caches.items():
            seconds = decode(models[name], context, cache, tokens)
            if round_index > 0:
                times[name] += seconds
    return {name: median(seconds) for name, seconds in times.items()}


def decoding_ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Tokens/s of every NeuroTrails over those of the dense networks."""
    figures = {}
    dense = {
        "dense_single": min(seconds[name] for name in SINGLES),
        "tuned_single": seconds["tuned_single"],
        "full_ensemble": seconds["full_ensemble"],
    }
    for name in seconds:
        if name.startswith("neurotrails"):
            figures |= {f"{name}_over_{other}": slow / seconds[name] for other, slow in dense.items()}
    return figures


def prefill_seconds(models: dict[str, PreTrainedModel], names: Iterable[str], rounds: int) -> dict[str, float]:
    """Median seconds for a text of 512 tokens."""
    context = torch.randint(SHAPE["vocab_size"], (1, 512))
    return time_interleaved({name: partial(prefill, models[name], context) for name in names}, rounds)


def sparse_layers(model: PreTrainedModel) -> list[SparseLinear]:
    """The compressed layers of a model."""
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def bandwidth_share(layers: list[SparseLinear], rounds: int, args: argparse.Namespace) -> tuple[float, float]:
    """Bytes per second of the layers over those of reading a buffer in turn; the seconds to read a gigabyte."""
    functions = {"read": reading(args.threads), "multiply": multiplying(layers, args.threads)}
    seconds = time_interleaved(functions, rounds)
    bytes_read = sum(layer.kernel.bytes_read for layer in layers)
    reading_seconds = seconds["read"] / READ_BYTES
    return bytes_read / seconds["multiply"] * reading_seconds, 1e9 * reading_seconds


def weight_bytes(model: PreTrainedModel, *, fast_decoding: bool = False) -> int:
    """Bytes of parameters and buffers, and of what the kernels keep besides, with the weights kept twice or once."""
    tensors = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    kernels = [layer.kernel for layer in sparse_layers(model)]
    return tensors + sum(kernel.extra_bytes if fast_decoding else kernel.index.nbytes for kernel in kernels)


def main() -> None:
    """Measure everything with all networks in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    rounds = 1 if args.quick else 3
    models = networks(CASES[:2] if args.quick else CASES)
    sparse = [name for name in models if name.startswith("neurotrails")]
    ours = [name for name in sparse if name.endswith(("_0.2_bf16", "_0.2_int8"))]
    others = [*SINGLES, "tuned_single", "full_ensemble"]

    seconds = decoding_seconds(models, [*others, *sparse], (1, 128), 8 if args.quick else 12, rounds)
    figures = decoding_ratios(seconds)
    for length in () if args.quick else (512, 2048):
        longer = decoding_seconds(models, [*others, *ours], (1, length), 8, rounds)
        figures |= {f"context_{length}_{name}": value for name, value in decoding_ratios(longer).items()}
        seconds |= {f"context_{length}_{name}": value for name, value in longer.items()}
    batch = decoding_seconds(models, [*contenders(8), *ours], (8, 128), 4, rounds)
    prefill = prefill_seconds(models, [*contenders(512), *ours], 1 if args.quick else 3)
    for prefix, measured in (("batch8", batch), ("prefill_512", prefill)):
        slow = min(measured[name] for name in UNCOMPRESSED if name in measured)
        for name in ours:
            figures[f"{name.replace('neurotrails', prefix)}_over_uncompressed"] = slow / measured[name]
        seconds |= {f"{prefix}_{name}": value for name, value in measured.items()}

    for name in sparse:
        label = name.replace("neurotrails", "bandwidth_share")
        figures[label], seconds[f"{label}_reading"] = bandwidth_share(sparse_layers(models[name]), 5 * rounds, args)
    dense_bytes = weight_bytes(models["uncompressed_bf16"])
    for name in ours:
        label = name.replace("neurotrails", "resident_memory")
        figures[f"{label}_output_sparse"] = weight_bytes(models[name]) / dense_bytes
        figures[f"{label}_fast_decoding"] = weight_bytes(models[name], fast_decoding=True) / dense_bytes
    partly = compress(network(3, 16, 0.2, torch.bfloat16), output_layers=False)
    figures["resident_memory_0.2_bf16_output_dense"] = weight_bytes(partly) / dense_bytes
    report({**figures, **{f"{k}_s": value for k, value in seconds.items()}}, args)


if __name__ == "__main__":
    main()
