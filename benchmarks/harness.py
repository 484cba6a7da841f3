# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What every benchmark shares: interleaved timing, ratios of medians, and the `--json FILE` report.

A machine's speed drifts while a benchmark runs. Timing the candidates in turn, round after round, lets all of them
meet the same drift, so that the ratio of their medians is steadier than either median alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers


# NeuroTrails at two sizes: 18.4M weights, and 296.5M as published.
SIZES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_ensemble_heads": 3,
        "num_head_layers": 5,
    },
    "llama_130m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "num_ensemble_heads": 3,
        "num_head_layers": 8,
    },
}


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line after adding the options that all benchmarks take, and set the number of threads."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one flat JSON object")
    parser.add_argument("--quick", action="store_true", help="a rougher answer within a minute")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    setup: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median seconds per call of each function, called in turn.

    Args:
        functions: what to time, by name.
        rounds: timed calls of each function.
        warmup: untimed calls of each function beforehand.
        setup: called before every call, outside the timing.

    Returns:
        The median duration of each function in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for round_index in range(warmup + rounds):
        # What ran before leaves its traces in caches and allocator: no function always follows the same one.
        random.Random(round_index).shuffle(order)
        for name in order:
            function = functions[name]
            if setup is not None:
                setup()
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(durations) for name, durations in seconds.items()}


def report(figures: Mapping[str, float], args: argparse.Namespace) -> None:
    """Print the figures with what is needed to repeat them, and write them to `args.json` if it is given."""
    print(f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}")
    print(f"machine: {_processor()}, {torch.get_num_threads()} threads, {platform.system()} {platform.release()}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}")
    if args.json is not None:
        args.json.write_text(json.dumps(dict(figures), indent=2) + "\n")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
