# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""ViT against the stock one."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from vision_models import CLASSES, FAMILIES, LABELS, make_classifier, make_images, randomize

from nt_transformers import NeuroTrailsViTConfig, NeuroTrailsViTForImageClassification


@pytest.mark.parametrize(
    ("hidden", "attention_heads", "millions"), [(192, 3, 5.72), (384, 6, 22.05), (768, 12, 86.57)]
)
def test_parameter_counts_are_those_of_deit(hidden, attention_heads, millions):
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": attention_heads}
    with torch.device("meta"):
        config = NeuroTrailsViTConfig(num_labels=1000, num_ensemble_heads=1, **sizes)
        model = NeuroTrailsViTForImageClassification(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=2e-3)


def make_stock(**overrides):
    torch.manual_seed(0)
    config = ViTConfig(**{**FAMILIES["vit"].shape, "num_labels": CLASSES, **overrides})
    return randomize(ViTForImageClassification(config)).eval()


@pytest.mark.parametrize("head_layers", [0, 1, 3, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_head_is_stock_vit_bit_for_bit(head_layers, attention):
    stock = make_stock(attn_implementation=attention)
    model = NeuroTrailsViTForImageClassification.from_dense(stock, 1, head_layers)
    options = {"labels": LABELS, "output_hidden_states": True, "output_attentions": attention == "eager"}
    theirs, ours = stock(make_images(), **options), model(make_images(), **options)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(ours.attentions, theirs.attentions, rtol=0, atol=0)


@pytest.mark.slow
def test_deit_ti_is_the_stock_one_of_its_size():
    stock = make_stock(
        hidden_size=192, intermediate_size=768, num_hidden_layers=12, image_size=224, patch_size=16, num_labels=1000
    )
    model = NeuroTrailsViTForImageClassification.from_dense(stock, 3, 8)
    output, expected = (network(make_images(224, batch=2)).logits for network in (model, stock))
    torch.testing.assert_close(output.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("head_layers", "layers"), [(0, 4), (2, 8), (4, 12)])
def test_hidden_states_and_attentions_list_backbone_then_heads(head_layers, layers):
    model = make_classifier("vit", head_layers, attn_implementation="eager")
    out = model(make_images(), output_hidden_states=True, output_attentions=True)
    assert [hidden.shape for hidden in out.hidden_states] == [(4, 5, 24)] * (1 + layers)
    assert [attention.shape for attention in out.attentions] == [(4, 3, 5, 5)] * layers


@pytest.mark.parametrize("head_layers", [2, 4])
@pytest.mark.parametrize("size", [12, 16])
def test_position_embeddings_are_interpolated_as_in_stock_vit(head_layers, size):
    stock = make_stock()
    model = NeuroTrailsViTForImageClassification.from_dense(stock, 2, head_layers, vote="logits")
    expected = stock(make_images(size), interpolate_pos_encoding=True).logits
    output = model(make_images(size), interpolate_pos_encoding=True).logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_layers", [2, 4])
def test_attention_mask_hides_tokens_as_in_stock_vit(head_layers):
    stock = make_stock()
    model = NeuroTrailsViTForImageClassification.from_dense(stock, 2, head_layers, vote="logits")
    mask = torch.tensor([[1, 1, 0, 1, 0]]).expand(4, -1)
    expected = stock(make_images(), attention_mask=mask).logits
    torch.testing.assert_close(model(make_images(), attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(make_images()).logits, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 3, 12, 12), (4, 3, 8, 12)])
def test_wrong_image_size_is_named(shape):
    with pytest.raises(ValueError, match=rf"{shape[2]} x {shape[3]}.*image_size=8.*interpolate_pos_encoding"):
        make_classifier("vit", 2)(torch.zeros(shape))


def test_images_need_not_be_square():
    model = make_classifier("vit", 2, image_size=[8, 12])
    assert model(torch.zeros(2, 3, 8, 12)).logits.shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"12 x 8.*image_size=\[8, 12\]"):
        model(torch.zeros(2, 3, 12, 8))


@pytest.mark.parametrize("head_layers", [2, 4])
def test_patch_embeddings_can_be_replaced_in_every_head(head_layers):
    model = make_classifier("vit", head_layers)
    before = model(make_images(), output_head_logits=True).head_logits
    embeddings = make_classifier("vit", head_layers, initializer_range=0.5).get_input_embeddings()
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    after = model(make_images(), output_head_logits=True).head_logits
    assert (after - before).abs().amax((1, 2)).gt(1e-3).all()


@pytest.mark.parametrize("head_layers", [2, 4])
def test_activation_checkpointing_gives_the_same_gradients(head_layers):
    plain, checkpointed = (make_classifier("vit", head_layers).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(make_images(), labels=LABELS).loss.backward()
    for (name, expected), (_, parameter) in zip(
        plain.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
