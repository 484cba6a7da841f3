# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How quickly a compressed checkpoint is there, over the dense one.

    python benchmarks/loading.py [--quick] [--json FILE]

NeuroTrails of LLaMA-130M, random weights in bfloat16, density 0.2. Files are mapped into memory: `from_pretrained`
reads little of a dense file, the first token all of it. So both are timed: `from_pretrained` alone (`load`), and with
one token after it (`first_token`); from files that the system holds in its cache (`warm`), and from the disk (`cold`,
Linux only). Each figure is the time of the dense checkpoint over that of the compressed one: above 1 is quicker.
`bf16_once` is bf16 without `fast_decoding`, whose first token makes no slices.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import SIZES, parse_args, report, time_interleaved
from transformers import AutoModelForCausalLM

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.inference import compress, products
from nt_transformers.inference.matrix import Values


DENSITY = 0.2
# Type of the values, and whether the model decodes fast.
COMPRESSED: dict[str, tuple[Values, bool]] = {
    "bf16": ("bf16", True),
    "bf16_once": ("bf16", False),
    "int8": ("int8", True),
}


def save_models(folder: Path, size: str) -> None:
    """The same model dense and compressed, each in a folder of its own."""
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES[size])).to(torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(torch.rand(module.weight.shape) < DENSITY)
    model.save_pretrained(folder / "dense")
    for name, (values, fast_decoding) in COMPRESSED.items():
        dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
        compress(dense, values, fast_decoding=fast_decoding).save_pretrained(folder / name)


def loader(folder: Path, first_token: bool) -> Callable[[], None]:
    def load() -> None:
        products._timed_sliced.clear()  # as in a new process
        model = AutoModelForCausalLM.from_pretrained(folder)
        if first_token:
            with torch.inference_mode():
                model(torch.ones(1, 1, dtype=torch.long))

    return load


def drop_from_cache(folder: Path) -> None:
    """Lets the system forget the files of a folder."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    args = parse_args(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_models(folder, "small" if args.quick else "llama_130m")
        for cache in ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",):
            for what in ("load", "first_token"):
                seconds = time_interleaved(
                    {name: loader(folder / name, what == "first_token") for name in ("dense", *COMPRESSED)},
                    rounds=5 if args.quick else 11,
                    setup=(lambda: drop_from_cache(folder)) if cache == "cold" else None,
                )
                figures |= {f"{what}_{cache}_{name}": seconds["dense"] / seconds[name] for name in COMPRESSED}
    report(figures, args)


if __name__ == "__main__":
    main()
