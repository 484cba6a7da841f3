# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Images that the input pipeline prepares for training a second, against those that the training step consumes.

    python benchmarks/image_pipeline.py [--quick] [--json FILE]

PNG images of 32 x 32 pixels (noise, the hardest to decode), padded, cropped, mirrored and normalised in batches of 128
as for CIFAR, in the training process (no workers) and in 2 workers. The network is the one of
`recipes/configs/cifar10_wrn10_2_cpu.yaml`, Wide ResNet 10-2 with 2 of 3 blocks in each of 3 heads; the published one,
Wide ResNet 28-10, takes some hundred times as long. Both sides have the machine to themselves, in turn.

    pipeline_over_model = images a second of the pipeline with workers / of the training step
"""

import argparse
import io
import itertools
from collections.abc import Callable

import datasets
import numpy as np
import torch
from harness import parse_args, report, time_interleaved
from PIL import Image

from nt_transformers import NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetForImageClassification
from nt_transformers.data.image_batches import TrainingBatches, training_loader
from nt_transformers.data.images import ImageDataConfig, TableImages
from nt_transformers.sparsity import Sparsifier, SparsityConfig


BATCH, IMAGES = 128, 2048


def encoded_images() -> TableImages:
    """A table of PNG images, as the hub's CIFAR is."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": rows, "label": [i % 10 for i in range(IMAGES)]}, features=features)
    return TableImages(table, "noise", "image", "label")


def training_step(batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that trains the network for one step, SGD and sparsifier included."""
    config = NeuroTrailsWideResNetConfig(
        depth=10, widen_factor=2, num_head_blocks=2, id2label={i: str(i) for i in range(10)}
    )
    model = NeuroTrailsWideResNetForImageClassification(config).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    sparsifier = Sparsifier(model, optimizer, SparsityConfig(method="neurotrails_vision"), total_steps=10_000)
    pixel_values = batch["pixel_values"].contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model(pixel_values=pixel_values, labels=batch["labels"]).loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time the three in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    batches = TrainingBatches(encoded_images(), ImageDataConfig(), batch_size=BATCH)
    starts = itertools.count(step=BATCH)
    # Enough for a worker's share to outweigh its start.
    ahead = 24 if args.quick else 96

    def with_workers() -> None:
        for _ in itertools.islice(training_loader(batches, num_workers=2), ahead):
            pass

    seconds = time_interleaved(
        {
            "training_step": training_step(batches[0]),
            "pipeline_no_workers": lambda: batches[next(starts)],
            "pipeline_2_workers": with_workers,
        },
        rounds=5 if args.quick else 15,
    )
    seconds["pipeline_2_workers"] /= ahead
    rates = {f"{name}_images_per_s": BATCH / value for name, value in seconds.items()}
    report(
        {
            "pipeline_over_model": seconds["training_step"] / seconds["pipeline_2_workers"],
            "pipeline_no_workers_over_model": seconds["training_step"] / seconds["pipeline_no_workers"],
            **rates,
        },
        args,
    )


if __name__ == "__main__":
    main()
