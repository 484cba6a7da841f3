# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Wide ResNet against its paper."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import unfold
from vision_models import make_classifier, make_images

from nt_transformers import NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetForImageClassification


@pytest.mark.parametrize(
    ("classes", "overrides", "millions"),
    [
        (100, {"num_ensemble_heads": 1}, 36.5),
        (100, {"num_ensemble_heads": 3, "num_head_blocks": 8}, 106.3),
        (100, {"num_ensemble_heads": 3, "num_head_blocks": 12}, 109.5),
        (10, {"num_ensemble_heads": 1, "depth": 40, "widen_factor": 4}, 8.9),
        (10, {"num_ensemble_heads": 1, "num_head_blocks": 4, "depth": 16, "widen_factor": 8}, 11.0),
    ],
)
def test_parameter_counts_are_the_published_ones(classes, overrides, millions):
    with torch.device("meta"):
        config = NeuroTrailsWideResNetConfig(num_labels=classes, **overrides)
        model = NeuroTrailsWideResNetForImageClassification(config)
    digits = 2e-3 if classes == 100 else 6e-3  # the paper gives its other sizes to one decimal
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=digits)


@pytest.mark.parametrize("head_blocks", [0, 3, 6])
def test_state_dict_keys_are_the_contract(head_blocks):
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    blocks = {f"backbone.blocks.{i}": i for i in range(6 - head_blocks)}
    blocks |= {f"heads.{m}.blocks.{i}": 6 - head_blocks + i for m in range(2) for i in range(head_blocks)}
    stems = ["backbone.stem"] if head_blocks < 6 else ["heads.0.stem", "heads.1.stem"]
    keys = {f"wide_resnet.{stem}.weight" for stem in stems}
    keys |= {f"wide_resnet.{block}.conv{i}.weight" for block in blocks for i in (1, 2)}
    keys |= {f"wide_resnet.{block}.norm{i}.{norm}" for block in blocks for i in (1, 2) for norm in norms}
    keys |= {f"wide_resnet.{block}.shortcut.weight" for block, i in blocks.items() if i in (0, 2, 4)}
    keys |= {f"wide_resnet.heads.{m}.norm.{norm}" for m in range(2) for norm in norms}
    keys |= {f"classifiers.{m}.{name}" for m in range(2) for name in ("weight", "bias")}
    model = make_classifier("wide_resnet", head_blocks, num_ensemble_heads=2, widen_factor=2)
    assert set(model.state_dict()) == keys


def convolution(images: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Every output pixel is the product of the weight with the patch around it."""
    side = weight.shape[-1]
    size = [-(-length // stride) for length in images.shape[2:]]
    patches = unfold(images, side, padding=side // 2, stride=stride)
    return (weight.flatten(1) @ patches).unflatten(2, size)


def paper(images: Tensor, weights: dict[str, Tensor], names: list[str], final: str) -> Tensor:
    """Logits of a Wide ResNet by Zagoruyko and Komodakis (2016), with pre-activation, from stem to classifier.

    Figure 1 (c, without dropout) and Table 1: conv1, three groups of n blocks B(3, 3), the second and third of which
    start with stride 2; blocks of BN-ReLU-conv; where the width changes, the shortcut is a 1x1 convolution of the
    block's first activation; BN, ReLU and average pooling at the end.
    """

    def activate(maps: Tensor, norm: str) -> Tensor:
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = weights[f"{norm}.bias"] - scale * weights[f"{norm}.running_mean"]
        return (maps * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    maps = convolution(images, weights[names[0].rpartition(".blocks")[0] + ".stem.weight"], 1)
    for i, name in enumerate(names):
        stride = 2 if i in (len(names) // 3, 2 * len(names) // 3) else 1
        activated = activate(maps, f"{name}.norm1")
        residual = maps
        if f"{name}.shortcut.weight" in weights:
            residual = convolution(activated, weights[f"{name}.shortcut.weight"], stride)
        maps = convolution(activated, weights[f"{name}.conv1.weight"], stride)
        maps = convolution(activate(maps, f"{name}.norm2"), weights[f"{name}.conv2.weight"], 1)
        maps = maps + residual
    features = activate(maps, final).flatten(2).mean(2)
    return features @ weights["classifiers.0.weight"].T + weights["classifiers.0.bias"]


@pytest.mark.parametrize(("depth", "widen_factor", "size"), [(10, 1, 8), (16, 2, 12), (22, 1, 9)])
def test_the_network_is_that_of_the_paper(depth, widen_factor, size):
    blocks = (depth - 4) // 2
    for head_blocks in (0, 1, blocks - 1, blocks):
        model = make_classifier(
            "wide_resnet", head_blocks, depth=depth, widen_factor=widen_factor, num_ensemble_heads=1
        ).double()
        split = blocks - head_blocks
        names = [f"wide_resnet.backbone.blocks.{i}" for i in range(split)]
        names += [f"wide_resnet.heads.0.blocks.{i}" for i in range(head_blocks)]
        images = make_images(size).double()
        expected = paper(images, model.state_dict(), names, "wide_resnet.heads.0.norm")
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 18}, r"depth=18.*6n \+ 4"),
        ({"depth": 4}, "depth=4"),
        ({"widen_factor": 0}, "widen_factor=0"),
        ({"num_channels": 0}, "num_channels=0"),
        ({"depth": 16, "num_head_blocks": 8}, "num_head_blocks=8.*num_blocks=6"),
    ],
)
def test_bad_shapes_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        NeuroTrailsWideResNetConfig(**overrides)
