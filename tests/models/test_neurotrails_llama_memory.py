# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What trades memory for time leaves losses and gradients alone, and does save memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.launching import launch


def gradients(model: torch.nn.Module, tokens: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Head losses and gradients by name after a training step's forward and backward pass."""
    model.zero_grad()
    output = model(tokens, labels=tokens, skip_logits=True, use_cache=False, **kwargs)
    output.loss.backward()
    return output.head_losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: tuple[torch.Tensor, dict[str, Any]], second: tuple[torch.Tensor, dict[str, Any]]) -> None:
    torch.testing.assert_close(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        assert (second[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_layers", [0, 2, 4])
def test_headwise_gradients_are_those_of_one_backward_pass(make_model, tokens, head_layers, tied):
    model = make_model(num_head_layers=head_layers, tie_word_embeddings=tied).train()
    assert_same(gradients(model, tokens), gradients(model, tokens, headwise_backward=True))


def test_headwise_gradients_of_some_heads_with_padding(make_model, tokens):
    model = make_model().train()
    model.active_heads = [2, 0]
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :4] = 0
    kwargs = {"attention_mask": attention_mask, "num_items_in_batch": 11}
    assert_same(gradients(model, tokens, **kwargs), gradients(model, tokens, headwise_backward=True, **kwargs))


@pytest.mark.parametrize("frozen", ["lm_heads", "model.heads", "model.layers", "model"])
def test_headwise_gradients_with_frozen_parts(make_model, tokens, frozen):
    model = make_model().train()
    model.get_submodule(frozen).requires_grad_(False)
    assert_same(gradients(model, tokens), gradients(model, tokens, headwise_backward=True))


def test_headwise_gradients_accumulate(make_model, tokens):
    model = make_model().train()
    whole = gradients(model, tokens, num_items_in_batch=18, headwise_backward=True)[1]
    model.zero_grad()
    for row in tokens.split(1):
        model(row, labels=row, skip_logits=True, headwise_backward=True, num_items_in_batch=18).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_headwise_gradients_under_autocast(make_model, tokens):
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses, plain = gradients(model, tokens)
        headwise_losses, headwise = gradients(model, tokens, headwise_backward=True)
    exact = gradients(model, tokens)[1]
    assert torch.equal(losses, headwise_losses)
    for name, gradient in exact.items():
        assert headwise[name].dtype == plain[name].dtype
        assert (headwise[name] - gradient).norm() < 1.5 * (plain[name] - gradient).norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_headwise_gradients_under_data_parallelism(processes):
    output = launch(processes, Path(__file__).parent / "scripts" / "headwise_ddp.py")
    assert float(output) < 1e-5


def test_headwise_loss_without_gradients(make_model, tokens):
    model = make_model()
    with torch.no_grad():
        plain, headwise = (
            model(tokens, labels=tokens, skip_logits=True, headwise_backward=flag) for flag in (False, True)
        )
    torch.testing.assert_close(plain.head_losses, headwise.head_losses)
    assert not headwise.loss.requires_grad


def test_headwise_backward_refuses_logits(make_model, tokens):
    with pytest.raises(ValueError, match="headwise_backward=True: .* skip_logits=True"):
        make_model()(tokens, labels=tokens, headwise_backward=True)


@pytest.mark.parametrize("heads_only", [False, True])
@pytest.mark.parametrize("headwise_backward", [False, True])
def test_checkpointing_leaves_gradients_alone(make_model, tokens, heads_only, headwise_backward):
    model = make_model().train()
    plain = gradients(model, tokens)
    model.activation_checkpointing_enable(heads_only=heads_only)
    assert_same(plain, gradients(model, tokens, headwise_backward=headwise_backward))


class _Saved:
    """A tensor saved for the backward pass, counted as long as it is alive."""

    alive = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        _Saved.alive += tensor.nbytes
        _Saved.peak = max(_Saved.peak, _Saved.alive)

    def __del__(self) -> None:
        _Saved.alive -= self.tensor.nbytes


@contextmanager
def count_saved(model: torch.nn.Module) -> Iterator[type[_Saved]]:
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    _Saved.alive = _Saved.peak = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Saved:
        return tensor if tensor.data_ptr() in weights else _Saved(tensor)

    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved
    ):
        yield _Saved


def peak_of_saved_activations(model: torch.nn.Module, tokens: torch.Tensor, **kwargs: Any) -> int:
    """Bytes of activations, at their peak in a forward and backward pass."""
    with count_saved(model) as saved:
        model(tokens, labels=tokens, skip_logits=True, use_cache=False, **kwargs).loss.backward()
    return saved.peak


def test_headwise_backward_holds_the_activations_of_one_head(make_model):
    tokens = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(0))
    one = peak_of_saved_activations(make_model(num_ensemble_heads=1).train(), tokens)
    four = make_model(num_ensemble_heads=4).train()
    assert peak_of_saved_activations(four, tokens, headwise_backward=True) < 1.2 * one
    assert peak_of_saved_activations(four, tokens) > 2 * one


def test_checkpointing_holds_less_the_more_of_the_network_it_covers(make_model):
    tokens = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(0))
    peaks = [peak_of_saved_activations(make_model().train(), tokens)]
    for heads_only in (True, False):
        model = make_model().train()
        model.activation_checkpointing_enable(heads_only=heads_only)
        peaks.append(peak_of_saved_activations(model, tokens))
    none, heads, everything = peaks
    assert everything < 0.6 * heads < 0.6 * 0.7 * none


# Compiling looks at the gradients of the layers' inputs, which have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("headwise_backward", [False, True])
def test_compiled_layers_give_the_same_gradients(make_model, tokens, headwise_backward):
    model = make_model().train()
    plain = gradients(model, tokens)
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.compile()
    assert_same(plain, gradients(model, tokens, headwise_backward=headwise_backward))
