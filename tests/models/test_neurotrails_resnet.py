# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ResNet against the stock one."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification
from vision_models import LABELS, make_classifier, make_images, randomize

from nt_transformers import NeuroTrailsResNetConfig, NeuroTrailsResNetForImageClassification


RESNET_18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "num_head_blocks": 5}
RESNET_34 = RESNET_18 | {"depths": [3, 4, 6, 3]}


@pytest.mark.parametrize(
    ("overrides", "millions"),
    [
        ({"num_ensemble_heads": 1}, 25.6),
        ({}, 74.3),
        ({"num_head_blocks": 16}, 76.8),
        (RESNET_18 | {"num_ensemble_heads": 1}, 11.69),
        (RESNET_34 | {"num_ensemble_heads": 1}, 21.80),
    ],
)
def test_parameter_counts_are_the_published_ones(overrides, millions):
    with torch.device("meta"):
        config = NeuroTrailsResNetConfig(num_labels=1000, **overrides)
        model = NeuroTrailsResNetForImageClassification(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=2e-3)


STOCK = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 3], "num_labels": 5}


@pytest.mark.parametrize("head_blocks", range(6))
@pytest.mark.parametrize(
    "options",
    [
        {"layer_type": "basic"},
        {"layer_type": "bottleneck"},
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True, "downsample_in_first_stage": True},
        {"layer_type": "basic", "hidden_act": "gelu", "num_channels": 3, "embedding_size": 16},
    ],
)
def test_one_head_is_stock_resnet_bit_for_bit(head_blocks, options):
    torch.manual_seed(0)
    stock = randomize(ResNetForImageClassification(ResNetConfig(**{**STOCK, **options}))).eval()
    model = NeuroTrailsResNetForImageClassification.from_dense(stock, 1, head_blocks)
    theirs, ours = (
        network(make_images(40), labels=LABELS, output_hidden_states=True, return_dict=True)
        for network in (stock, model)
    )
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=0)
    base_theirs, base_ours = stock.base_model(make_images(40)), model.base_model(make_images(40))
    torch.testing.assert_close(base_ours.last_hidden_state, base_theirs.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(base_ours.pooler_output, base_theirs.pooler_output)


@pytest.mark.slow
def test_resnet_50_is_the_stock_one_of_its_size():
    torch.manual_seed(0)
    stock = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    model = NeuroTrailsResNetForImageClassification.from_dense(stock, 3, 10)
    with torch.no_grad():
        output = model(make_images(224, batch=1), output_head_logits=True)
        expected = stock(make_images(224, batch=1)).logits
        assert model.base_model(make_images(224, batch=1)).last_hidden_state.shape == (1, 2048, 7, 7)
    torch.testing.assert_close(output.head_logits, expected.expand(3, -1, -1), rtol=1e-4, atol=1e-4)


def test_the_features_are_the_average_of_every_position():
    model = make_classifier("resnet", 2)
    out = model.base_model(make_images(14))
    assert out.last_hidden_state.shape[2:] == (7, 7)
    expected = out.head_hidden_states[1].flatten(2).mean(2) @ model.classifiers[1].weight.T + model.classifiers[1].bias
    torch.testing.assert_close(model(make_images(14), output_head_logits=True).head_logits[1], expected)


@pytest.mark.parametrize(("stem_type", "sizes"), [("imagenet", [16, 16, 8]), ("cifar", [64, 64, 32])])
def test_stems(stem_type, sizes):
    model = make_classifier("resnet", 3, num_ensemble_heads=1, stem_type=stem_type)
    maps = model(make_images(64), output_hidden_states=True).hidden_states
    assert [feature_map.shape[-1] for feature_map in maps] == sizes
    (name,) = (name for name in model.state_dict() if "stem" in name and name.endswith("convolution.weight"))
    assert model.state_dict()[name].shape[-1] == {"imagenet": 7, "cifar": 3}[stem_type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stem_type": "tiny"}, "stem_type='tiny'.*imagenet.*cifar"),
        ({"depths": [3, 4], "num_head_blocks": 2}, r"depths=\[3, 4\].*hidden_sizes"),
        ({"depths": [3, 4, 0, 3], "num_head_blocks": 2}, "depths=.*at least 1"),
        ({"num_head_blocks": 17}, "num_head_blocks=17.*num_blocks=16"),
    ],
)
def test_bad_shapes_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        NeuroTrailsResNetConfig(**overrides)
