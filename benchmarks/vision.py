# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Forward pass and training step of NeuroTrails ResNet-50 and ViT against stock models of the same FLOPs.

    python benchmarks/vision.py [--quick] [--json FILE]

NeuroTrails has the published split of ResNet-50 (10 of 16 blocks in each of 3 heads), and DeiT-Ti with 8 of 12 layers
in each of 3 heads; images are 128 x 128. The stock model has the blocks of the backbone and of all heads in one row;
what is left of the difference in FLOPs is divided out:

    resnet_train_over_stock_same_flops = (NeuroTrails' seconds / its FLOPs) / (stock seconds / its FLOPs)

FLOPs are those of convolutions and matrix products in a forward pass. A training step is forward, backward and SGD
with momentum, in train mode; the forward pass is in evaluation mode without gradients.
"""

import argparse
from collections.abc import Callable

import torch
from harness import parse_args, report, time_interleaved
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nt_transformers import (
    NeuroTrailsResNetConfig,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsViTConfig,
    NeuroTrailsViTForImageClassification,
)


IMAGE, CLASSES = 128, 1000
DEIT_TI = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "image_size": IMAGE}
BATCH = {"resnet": 4, "vit": 8}


def models(family: str) -> dict[str, PreTrainedModel]:
    """NeuroTrails and the stock model whose FLOPs are nearest."""
    if family == "resnet":
        return {
            "neurotrails": NeuroTrailsResNetForImageClassification(NeuroTrailsResNetConfig(num_labels=CLASSES)),
            "stock": ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, depths=[3, 6, 18, 9])),
        }
    return {
        "neurotrails": NeuroTrailsViTForImageClassification(NeuroTrailsViTConfig(num_labels=CLASSES, **DEIT_TI)),
        "stock": ViTForImageClassification(ViTConfig(num_labels=CLASSES, num_hidden_layers=4 + 3 * 8, **DEIT_TI)),
    }


def forward_flops(family: str) -> dict[str, int]:
    """Floating-point operations of a forward pass for one image."""
    flops = {}
    with torch.device("meta"):
        images = torch.empty(1, 3, IMAGE, IMAGE)
        for name, model in models(family).items():
            with FlopCounterMode(display=False) as counter:
                model(images)
            flops[name] = counter.get_total_flops()
    return flops


def forward_pass(model: PreTrainedModel, images: torch.Tensor) -> Callable[[], None]:
    """A function that predicts for `images`."""

    @torch.inference_mode()
    def run() -> None:
        model.eval()(images)

    return run


def training_step(model: PreTrainedModel, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that trains `model` for one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def run() -> None:
        model.train()(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    """Time both families in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    torch.manual_seed(0)
    figures = {}
    for family, batch in BATCH.items():
        images, labels = torch.randn(batch, 3, IMAGE, IMAGE), torch.randint(CLASSES, (batch,))
        flops = forward_flops(family)
        pair = models(family)
        runs = {f"forward_{name}": forward_pass(model, images) for name, model in pair.items()}
        runs |= {f"train_{name}": training_step(model, images, labels) for name, model in pair.items()}
        seconds = time_interleaved(runs, rounds=5 if args.quick else 25)
        for phase in ("forward", "train"):
            ratio = seconds[f"{phase}_neurotrails"] / seconds[f"{phase}_stock"]
            figures[f"{family}_{phase}_over_stock_same_flops"] = ratio * flops["stock"] / flops["neurotrails"]
        figures |= {f"{family}_{name}_s": value for name, value in seconds.items()}
        figures |= {f"{family}_{name}_gflops_per_image": value / 1e9 for name, value in flops.items()}
    report(figures, args)


if __name__ == "__main__":
    main()
