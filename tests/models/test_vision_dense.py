# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""From a dense image classifier to ensemble heads."""

import pytest
import torch
from transformers import AutoModelForImageClassification
from vision_models import CLASSES, FAMILIES, make_classifier, make_images, randomize

from nt_transformers.sparsity import Sparsifier, SparsityConfig


STOCK = {name: family for name, family in FAMILIES.items() if family.stock}
every_family = pytest.mark.parametrize("family", STOCK)


def make_dense(family, **overrides):
    """A stock classifier in evaluation mode, whose every weight and statistic matters."""
    torch.manual_seed(0)
    shape = {name: value for name, value in STOCK[family].shape.items() if name != "stem_type"}
    stock = STOCK[family].stock
    return randomize(stock(stock.config_class(**{**shape, "num_labels": CLASSES, **overrides}))).eval()


@every_family
@pytest.mark.parametrize("head_depth", [0, 1, 3, 4])
@pytest.mark.parametrize("vote", ["probs", "logits"])
def test_the_vote_is_the_dense_model(family, head_depth, vote):
    dense = make_dense(family)
    model = STOCK[family].classifier.from_dense(dense, 3, head_depth, vote=vote)
    assert not model.training
    assert model.config.vote == vote
    expected, output = dense(make_images()).logits, model(make_images(), output_head_logits=True)
    torch.testing.assert_close(output.logits.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.head_logits, expected.expand(3, -1, -1), rtol=1e-5, atol=1e-5)


@every_family
def test_labels_are_kept(family):
    names = {0: "cat", 1: "dog", 2: "frog"}
    model = STOCK[family].classifier.from_dense(make_dense(family, id2label=names, num_labels=3), 2, 2)
    assert model.config.id2label == names
    assert model(make_images()).logits.shape == (4, 3)


@every_family
def test_nothing_is_shared_and_the_global_generator_stays(family):
    dense = make_dense(family)
    before = dense(make_images()).logits
    state = torch.get_rng_state()
    model = STOCK[family].classifier.from_dense(dense, 2, 2, noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(dense(make_images()).logits, before)


@every_family
def test_noise_is_relative_to_each_heads_weight(family):
    dense = make_dense(family)
    model = STOCK[family].classifier.from_dense(dense, 2, 2, noise=0.1, seed=1)
    plain = STOCK[family].classifier.from_dense(dense, 2, 2).state_dict()
    for name, weight in model.state_dict().items():
        if ("heads." not in name and "classifiers." not in name) or "running" in name:
            assert torch.equal(weight, plain[name]), name
        elif weight.ndim in (2, 4) and weight.numel() > 300:
            assert float((weight - plain[name]).std() / plain[name].std()) == pytest.approx(0.1, rel=0.2), name
    again, other = (STOCK[family].classifier.from_dense(dense, 2, 2, noise=0.1, seed=seed) for seed in (1, 2))
    assert torch.equal(again(make_images()).logits, model(make_images()).logits)
    assert not torch.equal(other(make_images()).logits, model(make_images()).logits)


@every_family
def test_a_checkpoint_is_upcycled_in_the_dtype_asked_for_and_saved(family, tmp_path):
    dense = make_dense(family)
    dense.save_pretrained(tmp_path / "dense")
    model = STOCK[family].classifier.from_dense(tmp_path / "dense", 2, 4, vote="logits")
    expected = dense(make_images()).logits
    torch.testing.assert_close(model(make_images()).logits, expected, rtol=1e-5, atol=1e-5)
    half = STOCK[family].classifier.from_dense(str(tmp_path / "dense"), 2, 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "upcycled")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "upcycled")
    assert type(loaded) is STOCK[family].classifier
    torch.testing.assert_close(loaded(make_images()).logits, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_masks_set_equal_heads_apart(family):
    model = STOCK[family].classifier.from_dense(make_dense(family), 3, 3)
    config = SparsityConfig(method="static", density=0.5, mask_init="soft_magnitude")
    Sparsifier(model, torch.optim.SGD(model.parameters()), config, total_steps=10)
    first, *others = model(make_images(), output_head_logits=True).head_logits
    assert all((first - other).abs().max() > 1e-3 for other in others)


class TestIncompatible:
    @pytest.mark.parametrize(("family", "other"), [("resnet", "vit"), ("vit", "resnet")])
    def test_another_architecture(self, family, other, tmp_path):
        dense = make_dense(other)
        dense.save_pretrained(tmp_path)
        for source in (dense, tmp_path):
            with pytest.raises(ValueError, match=rf"model_type='{other}'.*only {STOCK[family].stock.__name__}"):
                STOCK[family].classifier.from_dense(source, 2, 1)

    @every_family
    def test_a_model_that_is_an_ensemble_or_has_no_classifier(self, family):
        for source in (make_classifier(family, 1), make_dense(family).base_model):
            with pytest.raises(ValueError, match=rf"model_type=.*only {STOCK[family].stock.__name__}"):
                STOCK[family].classifier.from_dense(source, 2, 1)

    @every_family
    def test_quantized(self, family):
        dense = make_dense(family)
        dense.config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(ValueError, match="quantization_config"):
            STOCK[family].classifier.from_dense(dense, 2, 1)

    @every_family
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [({"num_labels": 1}, "num_labels=1"), ({"problem_type": "regression"}, "problem_type='regression'")],
    )
    def test_not_a_choice_among_classes(self, family, overrides, message):
        with pytest.raises(ValueError, match=message):
            STOCK[family].classifier.from_dense(make_dense(family, **overrides), 2, 1)

    @every_family
    @pytest.mark.parametrize(
        ("heads", "depth", "options", "message"),
        [
            (0, 2, {}, "num_ensemble_heads=0"),
            (2, 5, {}, "num_head_.*=5"),
            (2, 2, {"vote": "borda"}, "vote='borda'"),
            (2, 2, {"noise": -0.1}, "noise=-0.1"),
            (2, 2, {"dtype": torch.bfloat16}, "dtype: options of loading"),
        ],
    )
    def test_arguments(self, family, heads, depth, options, message):
        with pytest.raises(ValueError, match=message):
            STOCK[family].classifier.from_dense(make_dense(family), heads, depth, **options)
