# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Small image classifiers of the three families, and what their tests have in common."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ResNetForImageClassification, ViTForImageClassification

from nt_transformers import (
    NeuroTrailsResNetConfig,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsResNetModel,
    NeuroTrailsViTConfig,
    NeuroTrailsViTForImageClassification,
    NeuroTrailsViTModel,
    NeuroTrailsWideResNetConfig,
    NeuroTrailsWideResNetForImageClassification,
    NeuroTrailsWideResNetModel,
)


CLASSES = 5


@dataclass(frozen=True)
class Family:
    """The classes of a family, the shape of its small network, and the depth of that in blocks or layers."""

    config: type
    model: type
    classifier: type
    shape: dict[str, Any]
    depth: int
    head_depth: str = "num_head_blocks"
    stock: type | None = None


FAMILIES = {
    "resnet": Family(
        NeuroTrailsResNetConfig,
        NeuroTrailsResNetModel,
        NeuroTrailsResNetForImageClassification,
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 2], "stem_type": "cifar"},
        depth=4,
        stock=ResNetForImageClassification,
    ),
    "wide_resnet": Family(
        NeuroTrailsWideResNetConfig,
        NeuroTrailsWideResNetModel,
        NeuroTrailsWideResNetForImageClassification,
        {"depth": 16, "widen_factor": 1},
        depth=6,
    ),
    "vit": Family(
        NeuroTrailsViTConfig,
        NeuroTrailsViTModel,
        NeuroTrailsViTForImageClassification,
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 8,
            "patch_size": 4,
        },
        depth=4,
        head_depth="num_head_layers",
        stock=ViTForImageClassification,
    ),
}

# Every family with the split at the end, within a stage, at the first block, and without a backbone.
SPLITS = [(name, depth) for name, family in FAMILIES.items() for depth in (0, 1, family.depth - 1, family.depth)]
MIDDLE = [(name, family.depth // 2 + 1) for name, family in FAMILIES.items()]


def make_config(name: str, head_depth: int, **overrides: Any) -> Any:
    """The small configuration with 3 heads of `head_depth` blocks or layers."""
    family = FAMILIES[name]
    fields = {"num_labels": CLASSES, "num_ensemble_heads": 3, family.head_depth: head_depth}
    return family.config(**{**family.shape, **fields, **overrides})


def make_classifier(name: str, head_depth: int, **overrides: Any) -> Any:
    """A classifier in evaluation mode, the same for the same arguments, whose every weight and statistic matters."""
    torch.manual_seed(0)
    return randomize(FAMILIES[name].classifier(make_config(name, head_depth, **overrides))).eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Moves norms, biases and running statistics from their initial values, and the heads' votes apart."""
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
        if "classifier" in tensor_name:
            tensor.mul_(4)
    return model


def make_images(size: int = 8, batch: int = 4) -> Tensor:
    """[batch, 3, size, size], the same at every call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 4, 2, 2])


def single_network(model: Any, m: int) -> Any:
    """The same class with one head, which has the weights of the backbone and head `m`."""
    config = type(model.config)(**{**model.config.to_dict(), "num_ensemble_heads": 1})
    single = type(model)(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        if "heads." not in name and "classifiers." not in name:
            weights[name] = tensor
        elif f"heads.{m}." in name or f"classifiers.{m}." in name:
            weights[name.replace(f"heads.{m}.", "heads.0.").replace(f"classifiers.{m}.", "classifiers.0.")] = tensor
    single.load_state_dict(weights)
    return single.train(model.training)
