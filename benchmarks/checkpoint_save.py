# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How long a checkpoint holds up the training of LLaMA-130M, against writing the same bytes with safetensors.

    python benchmarks/checkpoint_save.py [--quick] [--folder DIR] [--json FILE]

The network is the published LLaMA-130M as a NeuroTrails (3 heads; 296.5M weights before masking); a checkpoint holds
weights, both moments of Adam, masks and random states, hashed, synced to the disk and renamed. The other side is one
`safetensors.torch.save_file` of the same tensors, which neither hashes nor syncs. Both write to `--folder` in turn.
The former checkpoint is deleted afterwards, untimed: training does not wait for it.

    checkpoint_over_safetensors = checkpoint / safetensors
    checkpoint_over_safetensors_synced = checkpoint / (safetensors and fsync)

`--quick` takes a quarter of the layers.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from harness import parse_args, report
from safetensors.torch import save_file

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.files import sync
from nt_transformers.sparsity import Sparsifier, SparsityConfig
from nt_transformers.training.checkpoint import rotate_checkpoints, save_checkpoint
from nt_transformers.training.nonfinite import describe_state


ROUNDS, QUICK_ROUNDS = 5, 3


def main() -> None:
    """Write both in turn and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder of temporary files)")
    args = parse_args(parser)
    layers, head_layers = (3, 2) if args.quick else (12, 8)
    config = NeuroTrailsLlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_hidden_layers=layers,
        num_head_layers=head_layers,
    )
    model = NeuroTrailsLlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    sparsifier = Sparsifier(model, optimizer, SparsityConfig(method="neurotrails_llm"), total_steps=1000)

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = dict(weights)
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors |= {f"mask.{name}": mask for name, mask in sparsifier.state_dict()["masks"].items()}

    seconds: dict[str, list[float]] = {"safetensors": [], "safetensors_synced": [], "checkpoint": []}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-") as name:
        root, file = Path(name), Path(name) / "all.safetensors"
        for step in range(QUICK_ROUNDS if args.quick else ROUNDS):
            start = time.perf_counter()
            save_file(tensors, file)
            seconds["safetensors"].append(time.perf_counter() - start)
            sync(file)
            seconds["safetensors_synced"].append(time.perf_counter() - start)
            file.unlink()

            start = time.perf_counter()
            assert not describe_state(weights, optimizer.state)
            training = {"optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
            folder = save_checkpoint(root, step, weights, training, {"step": step})
            seconds["checkpoint"].append(time.perf_counter() - start)
            rotate_checkpoints(root, keep_last=1, written=folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
    medians = {side: median(values) for side, values in seconds.items()}
    report(
        {
            "checkpoint_over_safetensors": medians["checkpoint"] / medians["safetensors"],
            "checkpoint_over_safetensors_synced": medians["checkpoint"] / medians["safetensors_synced"],
            **{f"{side}_s": value for side, value in medians.items()},
            "checkpoint_gb": size / 1e9,
        },
        args,
    )


if __name__ == "__main__":
    main()
