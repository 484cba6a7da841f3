# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What holds for all image classifiers: heads, votes, losses, batch norm, formats, errors."""

import inspect
import itertools
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy, one_hot
from transformers import Trainer, TrainingArguments
from vision_models import (
    CLASSES,
    FAMILIES,
    LABELS,
    MIDDLE,
    SPLITS,
    make_classifier,
    make_config,
    make_images,
    single_network,
)

from nt_transformers.models.neurotrails_resnet import modeling_neurotrails_resnet
from nt_transformers.models.neurotrails_vit import modeling_neurotrails_vit
from nt_transformers.models.neurotrails_wide_resnet import modeling_neurotrails_wide_resnet


every_family = pytest.mark.parametrize("family", FAMILIES)
every_split = pytest.mark.parametrize(("family", "head_depth"), SPLITS)
middle_split = pytest.mark.parametrize(("family", "head_depth"), MIDDLE)


@pytest.mark.parametrize(
    "helper",
    [
        "NeuroTrailsVisionModelOutput",
        "NeuroTrailsImageClassifierOutput",
        "_vote",
        "_check_classes",
        "_check_pixel_values",
        "_check_labels",
        "_head_losses",
    ],
)
def test_helpers_that_every_folder_repeats_stay_the_same(helper):
    folders = (modeling_neurotrails_resnet, modeling_neurotrails_wide_resnet, modeling_neurotrails_vit)
    assert len({inspect.getsource(getattr(folder, helper)) for folder in folders}) == 1


def test_methods_that_every_classifier_repeats_stay_the_same():
    methods = [family.classifier.get_output_layers for family in FAMILIES.values()]
    assert len({inspect.getsource(method) for method in methods}) == 1


@middle_split
@pytest.mark.parametrize("soft", [False, True])
def test_the_trainers_loss_is_the_mean_over_images(family, head_depth, soft, tmp_path):
    model = make_classifier(family, head_depth)
    images, generator = make_images(), torch.Generator().manual_seed(0)
    labels = torch.arange(len(images)) % CLASSES
    if soft:
        labels = torch.rand(len(images), CLASSES, generator=generator).softmax(-1)
    options = {"learning_rate": 1e-9, "max_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(images)}
    arguments = TrainingArguments(str(tmp_path), **options, **batches, save_strategy="no")
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def collate(part):
        return {name: torch.stack([row[name] for row in part]) for name in part[0]}

    # Batch norms see one image at a time, as they do in accumulation.
    alone = [model.train()(image[None], labels=label[None]).loss for image, label in zip(images, labels, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(alone).mean().item(), rel=1e-3)


@every_split
def test_the_input_embeddings_are_what_sees_the_images(family, head_depth):
    model = make_classifier(family, head_depth)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(make_images())
    assert len(seen) == 1
    assert torch.equal(seen[0], make_images())


@every_split
def test_every_part_of_every_head_starts_from_its_own_draw(family, head_depth):
    model = FAMILIES[family].classifier(make_config(family, head_depth))
    heads = [dict(head.named_parameters()) for head in model.base_model.heads]
    for head, classifier in zip(heads, model.classifiers, strict=True):
        head["classifier"] = classifier.weight
    for first, second in itertools.combinations(heads, 2):
        for name, weight in first.items():
            if weight.ndim in (2, 4):
                assert not torch.isclose(weight, second[name], rtol=1e-6).flatten(1).all(1).any(), name


@every_split
def test_heads_share_no_weight_and_no_running_statistic(family, head_depth):
    model = make_classifier(family, head_depth)
    heads = [[*head.parameters(), *head.buffers()] for head in model.base_model.heads]
    addresses = [{tensor.data_ptr() for tensor in head} for head in heads]
    assert len(set().union(*addresses)) == sum(len(head) for head in heads)


@every_split
def test_only_what_is_kept_is_built(family, head_depth):
    def parameters(**overrides):
        with torch.device("meta"):
            model = FAMILIES[family].classifier(make_config(family, head_depth, **overrides))
        heads = [*model.base_model.heads, model.classifiers]
        return model.num_parameters(), sum(p.numel() for part in heads for p in part.parameters())

    (single, in_head), (ensemble, in_heads) = parameters(num_ensemble_heads=1), parameters()
    assert in_heads == 3 * in_head
    assert ensemble == single + 2 * in_head
    if head_depth == FAMILIES[family].depth:
        assert ensemble == 3 * single


@every_split
def test_each_head_is_the_single_network_of_backbone_and_head(family, head_depth):
    model = make_classifier(family, head_depth)
    head_logits = model(make_images(), output_head_logits=True).head_logits
    assert head_logits.shape == (3, 4, CLASSES)
    for m in range(3):
        single = single_network(model, m)
        for vote in ("probs", "logits"):
            single.config.vote = vote
            torch.testing.assert_close(single(make_images()).logits, head_logits[m], rtol=1e-5, atol=1e-6)


@middle_split
def test_mean_probability_vote(family, head_depth):
    out = make_classifier(family, head_depth)(make_images(), output_head_logits=True)
    expected = out.head_logits.double().softmax(-1).mean(0)
    torch.testing.assert_close(out.logits.double().softmax(-1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits.double().exp(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - out.head_logits.double().mean(0).softmax(-1)).abs().max() > 1e-3


@middle_split
def test_mean_logits_vote(family, head_depth):
    out = make_classifier(family, head_depth, vote="logits")(make_images(), output_head_logits=True)
    torch.testing.assert_close(out.logits, out.head_logits.mean(0), rtol=1e-5, atol=1e-5)


@middle_split
def test_probability_vote_keeps_extreme_logits_finite(family, head_depth):
    model = make_classifier(family, head_depth)
    with torch.no_grad():
        for parameter in model.classifiers.parameters():
            parameter *= 1e4
    out = model(make_images(), output_head_logits=True)
    expected = out.head_logits.double().log_softmax(-1).logsumexp(0) - torch.tensor(3.0).double().log()
    torch.testing.assert_close(out.logits.double(), expected, rtol=1e-5, atol=1e-5)


@middle_split
@pytest.mark.parametrize(("choice", "heads"), [(2, [0, 1]), ([1], [1]), ([2, 0], [2, 0])])
def test_active_heads_choose_who_votes(family, head_depth, choice, heads):
    model = make_classifier(family, head_depth)
    every = model(make_images(), labels=LABELS, output_head_logits=True)
    model.active_heads = choice
    some = model(make_images(), labels=LABELS, output_head_logits=True)
    assert model.active_heads == model.base_model.active_heads == heads
    torch.testing.assert_close(some.head_logits, every.head_logits[heads], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.head_losses, every.head_losses[heads], rtol=1e-5, atol=1e-6)
    expected = every.head_logits[heads].softmax(-1).mean(0)
    torch.testing.assert_close(some.logits.softmax(-1), expected, rtol=1e-5, atol=1e-5)


@every_split
def test_inactive_heads_are_never_touched(family, head_depth):
    model = make_classifier(family, head_depth).train()
    model.active_heads = [2]
    for m in (0, 1):
        model.base_model.heads[m].to("meta")
        model.classifiers[m].to("meta")
    model(make_images(), labels=LABELS).loss.backward()
    assert all(
        (parameter.grad is None) == (re.search(r"(heads|classifiers)\.[01]\.", name) is not None)
        for name, parameter in model.named_parameters()
    )


@every_family
@pytest.mark.parametrize("choice", [0, -1, 4, [], [3], [-1], [1, 1], [0.5], "0"])
def test_impossible_active_heads_are_refused(family, choice):
    model = make_classifier(family, 1)
    with pytest.raises(ValueError, match=r"active_heads=.*3 heads"):
        model.active_heads = choice
    assert model.active_heads == [0, 1, 2]


@middle_split
def test_the_loss_is_the_mean_of_the_heads_cross_entropies(family, head_depth):
    out = make_classifier(family, head_depth)(make_images(), labels=LABELS, output_head_logits=True)
    expected = torch.stack([cross_entropy(logits, LABELS) for logits in out.head_logits])
    torch.testing.assert_close(out.head_losses, expected)
    torch.testing.assert_close(out.loss, expected.mean())
    assert (out.loss - cross_entropy(out.logits, LABELS)).abs() > 1e-3


@middle_split
def test_labels_may_be_probabilities(family, head_depth):
    model = make_classifier(family, head_depth)
    certain = one_hot(LABELS, CLASSES)
    mixed = 0.3 * certain + 0.7 * certain.flip(0)
    losses = [model(make_images(), labels=labels).loss for labels in (certain.float(), LABELS, LABELS.flip(0))]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(model(make_images(), labels=mixed).loss, 0.3 * losses[1] + 0.7 * losses[2])


@middle_split
def test_ignored_labels_and_accumulated_batches(family, head_depth):
    model = make_classifier(family, head_depth)
    some = model(make_images()[:2], labels=LABELS[:2]).loss
    labels = torch.where(torch.arange(4) < 2, LABELS, -100)
    torch.testing.assert_close(model(make_images(), labels=labels).loss, some)
    torch.testing.assert_close(model(make_images(), labels=labels, num_items_in_batch=8).loss, some / 4)


@every_split
def test_each_head_learns_from_its_own_loss_alone(family, head_depth):
    model = make_classifier(family, head_depth).train()
    losses = model(make_images(), labels=LABELS).head_losses
    for m in range(3):
        model.zero_grad()
        losses[m].backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            owner = re.search(r"(?:heads|classifiers)\.(\d)\.", name)
            if owner is not None and int(owner[1]) != m:
                assert parameter.grad is None or not parameter.grad.any(), name
    model.zero_grad()
    model(make_images(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        # Softmax does not see what all keys have in common.
        assert "k_proj.bias" in name or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("family", "head_depth"), [split for split in SPLITS if split[0] != "vit"])
def test_batch_norm_learns_in_training_and_only_there(family, head_depth):
    def statistics():
        return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}

    model = make_classifier(family, head_depth)
    before = statistics()
    model(make_images(), labels=LABELS).loss.backward()
    torch.testing.assert_close(statistics(), before, rtol=0, atol=0)
    model.train().active_heads = [0, 2]
    model(make_images())
    after = statistics()
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer) == (".heads.1." in name), name
    for name in before:
        if ".heads.0." in name:
            assert not torch.equal(after[name], after[name.replace(".heads.0.", ".heads.2.")]), name


@every_split
def test_output_as_a_tuple_begins_with_loss_and_logits(family, head_depth):
    model = make_classifier(family, head_depth)
    out = model(make_images(), labels=LABELS)
    for as_tuple in (
        model(make_images(), labels=LABELS, return_dict=False),
        make_classifier(family, head_depth, return_dict=False)(make_images(), labels=LABELS),
    ):
        assert torch.equal(as_tuple[0], out.loss)
        assert torch.equal(as_tuple[1], out.logits)


@every_split
def test_base_model_returns_the_mean_of_the_heads(family, head_depth):
    out = make_classifier(family, head_depth).base_model(make_images())
    assert out.head_hidden_states.shape == (3, *out.last_hidden_state.shape)
    torch.testing.assert_close(out.last_hidden_state, out.head_hidden_states.mean(0))
    if family != "vit":
        torch.testing.assert_close(out.pooler_output[..., 0, 0], out.last_hidden_state.flatten(2).mean(2))


@every_split
def test_hidden_states_are_recorded_when_asked_for(family, head_depth):
    model = make_classifier(family, head_depth)
    assert model(make_images()).hidden_states is None
    asked = model(make_images(), output_hidden_states=True).hidden_states
    configured = make_classifier(family, head_depth, output_hidden_states=True)(make_images()).hidden_states
    torch.testing.assert_close(asked, configured, rtol=0, atol=0)
    single = single_network(model, 0)(make_images(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(asked[: len(single)], single)
    if head_depth == 0:
        assert len(asked) == len(single)


@middle_split
def test_images_may_be_channels_last(family, head_depth):
    model = make_classifier(family, head_depth).train()
    expected = model(make_images(), labels=LABELS).loss
    model = make_classifier(family, head_depth).train().to(memory_format=torch.channels_last)
    loss = model(make_images().to(memory_format=torch.channels_last), labels=LABELS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)


@middle_split
def test_mixed_precision_and_half_weights(family, head_depth):
    model = make_classifier(family, head_depth)
    expected = model(make_images(), labels=LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(make_images(), labels=LABELS)
    mixed.loss.backward()
    half = model.to(torch.bfloat16)(make_images(), labels=LABELS)
    for out in (mixed, half):
        assert (out.logits.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
        assert (out.logits - expected.logits).norm() < 0.1 * expected.logits.norm()
        torch.testing.assert_close(out.loss, expected.loss, rtol=0.1, atol=0.1)


@pytest.mark.slow
@middle_split
def test_compiles_as_one_graph(family, head_depth):
    model = make_classifier(family, head_depth)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out, expected = compiled(make_images(), labels=LABELS), model(make_images(), labels=LABELS)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)


class TestErrors:
    @every_family
    @pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 4, 8, 8), (3, 8, 8), (4, 8, 8, 3)])
    def test_wrong_channels(self, family, shape):
        with pytest.raises(ValueError, match=rf"pixel_values: shape {re.escape(str(shape))}.*num_channels=3"):
            make_classifier(family, 1)(torch.zeros(shape))

    @every_family
    def test_no_images(self, family):
        with pytest.raises(ValueError, match="pixel_values"):
            make_classifier(family, 1)()

    @every_family
    @pytest.mark.parametrize("label", [-1, CLASSES, 1000])
    def test_labels_out_of_range(self, family, label):
        with pytest.raises(ValueError, match=rf"labels: {label} .*num_labels=5"):
            make_classifier(family, 1)(make_images(), labels=torch.tensor([0, label, 1, -100]))

    @every_family
    @pytest.mark.parametrize("labels", [LABELS[:3], LABELS.float(), torch.zeros(4, 4), LABELS[:, None]])
    def test_labels_of_another_shape(self, family, labels):
        with pytest.raises(ValueError, match=r"labels: shape .*batch=4.*num_labels=5"):
            make_classifier(family, 1)(make_images(), labels=labels)

    @every_family
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"num_ensemble_heads": 0}, "num_ensemble_heads=0"),
            ({"head_depth": -1}, "num_head_.*=-1"),
            ({"head_depth": 7}, "num_head_.*=7.*num_"),
            ({"vote": "majority"}, "vote='majority'.*probs.*logits"),
            ({"num_ensemble_heads": 1.5}, "num_ensemble_heads"),
        ],
    )
    def test_config_values(self, family, overrides, message):
        with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
            make_config(family, **{"head_depth": 1, **overrides})

    @every_family
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"num_labels": 1}, "num_labels=1"),
            ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification'"),
        ],
    )
    def test_what_is_not_a_choice_among_classes(self, family, overrides, message):
        with pytest.raises(ValueError, match=message):
            make_classifier(family, 1, **overrides)
