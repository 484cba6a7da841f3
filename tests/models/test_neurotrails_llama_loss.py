# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Losses and gradients, with logits and without, against a slow reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nt_transformers.models.neurotrails_llama.loss_neurotrails_llama import (
    NeuroTrailsLlamaOutputLayer,
    fused_causal_lm_losses,
)


@pytest.fixture
def labels(tokens):
    labels = tokens.clone()
    labels[0, 6:] = -100
    labels[1, :3] = -100
    return labels


def slow_head_losses(head_logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Each head's mean of -log p(next token) over the labels that count, one token at a time."""
    losses = []
    for logits in head_logits.double():
        terms = [
            -logits[b, t].log_softmax(-1)[labels[b, t + 1]].item()
            for b in range(labels.shape[0])
            for t in range(labels.shape[1] - 1)
            if labels[b, t + 1] != -100
        ]
        losses.append(sum(terms) / len(terms))
    return losses


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_loss_is_the_mean_of_the_heads_own_cross_entropies(make_model, tokens, labels, heads, skip_logits):
    model = make_model(num_ensemble_heads=heads)
    expected = slow_head_losses(model(tokens, output_head_logits=True).head_logits, labels)
    out = model(tokens, labels=labels, skip_logits=skip_logits)
    assert out.head_losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(expected) / heads, rel=1e-5)
    assert (out.logits is None) == skip_logits


def gradients(model: torch.nn.Module, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*args, **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float) -> None:
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert (second[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_gradients_are_those_of_the_path_with_logits(make_model, tokens, labels, head_layers, tied):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=tied)
    plain = gradients(model, tokens, labels=labels)
    lean = gradients(model, tokens, labels=labels, skip_logits=True)
    assert_same_gradients(plain, lean, rtol=1e-5)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_number_of_items_in_the_batch_divides_the_sum(make_model, tokens, labels, count):
    model = make_model()
    kwargs = {"labels": labels, "num_items_in_batch": count}
    counted = (labels[:, 1:] != -100).sum().item()
    for skip_logits in (False, True):
        mean = model(tokens, labels=labels).head_losses
        summed = model(tokens, skip_logits=skip_logits, **kwargs).head_losses
        torch.testing.assert_close(summed, mean * counted / 7)
    assert_same_gradients(
        gradients(model, tokens, **kwargs), gradients(model, tokens, skip_logits=True, **kwargs), 1e-5
    )


def test_labels_shifted_by_the_caller(make_model, tokens, labels):
    model = make_model()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    for skip_logits in (False, True):
        given = model(tokens, labels=labels, shift_labels=shifted, skip_logits=skip_logits)
        torch.testing.assert_close(given.loss, model(tokens, labels=labels).loss)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_bfloat16_is_as_exact_as_the_path_with_logits(make_model, tokens, labels, autocast):
    model = make_model().to(torch.bfloat16)
    exact = gradients(model.float(), tokens, labels=labels)
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, lean = (model(tokens, labels=labels, skip_logits=skip) for skip in (False, True))
        plain_gradients, lean_gradients = (
            gradients(model, tokens, labels=labels, skip_logits=skip) for skip in (False, True)
        )
    assert lean.loss.dtype == torch.float32
    torch.testing.assert_close(lean.head_losses, plain.head_losses, rtol=1e-6, atol=0)
    for name, gradient in exact.items():
        lean_gradient, plain_gradient = lean_gradients[name], plain_gradients[name]
        assert lean_gradient.dtype == plain_gradient.dtype
        assert (lean_gradient - gradient).norm() < 1.5 * (plain_gradient - gradient).norm(), name


@pytest.mark.parametrize("frozen", ["lm_heads", "model"])
def test_frozen_weights_get_no_gradient(make_model, tokens, labels, frozen):
    model = make_model()
    model.get_submodule(frozen).requires_grad_(False)
    assert_same_gradients(
        gradients(model, tokens, labels=labels), gradients(model, tokens, labels=labels, skip_logits=True), rtol=1e-5
    )


def test_loss_of_many_chunks_equals_the_loss_in_one_piece():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 700, 8, generator=generator, requires_grad=True)
    output_layer = NeuroTrailsLlamaOutputLayer(8, 50, bias=False)
    weight = output_layer.weight
    labels = torch.randint(50, (3, 700), generator=generator)
    fused = fused_causal_lm_losses(hidden, [output_layer], labels)
    plain = F.cross_entropy((hidden[0, :, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(fused[0], plain)
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    for actual, reference in zip(torch.autograd.grad(3 * fused[0], [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("change", ["resized", "replaced"])
def test_lean_path_after_the_output_layers_have_changed(make_model, tokens, labels, change):
    model = make_model()
    if change == "resized":
        model.resize_token_embeddings(70, mean_resizing=False)
    else:
        model.set_output_embeddings(torch.nn.Linear(32, 61, bias=False))
    assert_same_gradients(
        gradients(model, tokens, labels=labels), gradients(model, tokens, labels=labels, skip_logits=True), rtol=1e-5
    )


def test_a_second_backward_pass_is_refused_rather_than_wrong(make_model, tokens):
    loss = make_model()(tokens, labels=tokens, skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_evaluation_without_gradients_gives_the_same_loss(make_model, tokens, labels):
    model = make_model()
    expected = model(tokens, labels=labels, skip_logits=True).head_losses
    with torch.no_grad():
        assert torch.equal(model(tokens, labels=labels, skip_logits=True).head_losses, expected)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("skip_logits", [False, True])
def test_lean_path_never_holds_the_logits(make_model, skip_logits):
    vocab_size, batch, sequence = 2000, 40, 32
    model = make_model(vocab_size=vocab_size)
    tokens = torch.randint(vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(0))
    parameters = set(map(id, model.parameters()))
    saved = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), LargestTensor() as largest:
        model(tokens, labels=tokens, skip_logits=skip_logits).loss.backward()
    logits_of_one_head = vocab_size * batch * sequence
    if skip_logits:
        assert largest.elements < logits_of_one_head / 2
        assert max(saved) < logits_of_one_head / 2
    else:  # the instruments see what they are looking for
        assert largest.elements >= logits_of_one_head
        assert max(saved) >= logits_of_one_head


@pytest.mark.parametrize(
    "kwargs",
    [{"labels": False}, {"output_head_logits": True}, {"logits_to_keep": 1}, {"logits_to_keep": torch.ones(1)}],
)
def test_skipping_logits_refuses_what_needs_them(make_model, tokens, kwargs):
    kwargs = {"labels": tokens, **kwargs}
    if kwargs["labels"] is False:
        del kwargs["labels"]
    with pytest.raises(ValueError, match="skip_logits=True"):
        make_model()(tokens, skip_logits=True, **kwargs)


@pytest.mark.parametrize("head_layers", [2, 4])
def test_activation_checkpointing_leaves_gradients_alone(make_model, tokens, head_layers):
    model = make_model(num_head_layers=head_layers).train()
    plain = gradients(model, tokens, labels=tokens, skip_logits=True)
    model.activation_checkpointing_enable()
    assert_same_gradients(plain, gradients(model, tokens, labels=tokens, skip_logits=True), rtol=1e-6)
