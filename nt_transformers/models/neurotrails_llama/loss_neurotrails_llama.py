# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Losses of many heads in the memory of one.

- Output layer and cross-entropy are fused: one chunk of logits is alive at a time.
- A head's backward pass can follow its own forward pass at once: the activations of one head are alive at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# Each chunk of the fused loss passes over the whole weight gradient; fewer tokens would make that pass dominate.
_TOKENS_PER_CHUNK = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer without bias, summed over tokens, holding one chunk of logits at a time.

    Takes hidden states [tokens, hidden], weight [vocab, hidden] and targets [tokens]; returns a float32 scalar. The
    forward pass also computes the gradients, in the chunk's own buffer; the backward pass scales them. Like a linear
    layer it multiplies in the autocast dtype; softmax, loss and weight gradient are float32 (torch's own
    `linear_cross_entropy` ignores autocast, and returns the loss of bfloat16 inputs in bfloat16).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_grad: bool
    ) -> torch.Tensor:
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden_states) if needs_grad and ctx.needs_input_grad[0] else None
        grad_weight = None
        if needs_grad and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        loss = torch.zeros((), dtype=torch.float32, device=device)

        for start in range(0, len(targets), _TOKENS_PER_CHUNK):
            chunk = slice(start, start + _TOKENS_PER_CHUNK)
            hidden, target = hidden_states[chunk].to(dtype), targets[chunk, None]
            log_probs = torch.log_softmax(hidden @ matrix.T, -1, dtype=torch.float32)
            loss -= log_probs.gather(1, target).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = log_probs.exp_().scatter_add_(1, target, log_probs.new_full(target.shape, -1.0)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ matrix
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(grad_logits.T, hidden)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden

        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the weight gradient is as large as the output layer.
        grad_hidden, grad_weight = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


class NeuroTrailsLlamaOutputLayer(nn.Linear):
    """The output layer of one head, which also computes the loss that needs no logits.

    It does so in `forward` because engines that shard the weights (FSDP) gather them when a module is called.
    """

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """[..., hidden] to logits [..., vocab]; [tokens, hidden] and targets [tokens] to the cross-entropy's sum."""
        if targets is None:
            return super().forward(hidden_states)
        return _LinearCrossEntropy.apply(hidden_states, self.weight, targets, torch.is_grad_enabled())


def _summed_loss(lm_head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if isinstance(lm_head, NeuroTrailsLlamaOutputLayer):
        return lm_head(hidden_states, targets)
    # A layer that someone has put in its place.
    return nn.functional.cross_entropy(lm_head(hidden_states).float(), targets, reduction="sum")


def fused_causal_lm_losses(
    hidden_states: Sequence[torch.Tensor] | torch.Tensor,
    lm_heads: Sequence[nn.Module],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """transformers' causal LM loss of every head's linear output layer, without the logits.

    Args:
        hidden_states: [batch, seq, hidden] for each head.
        lm_heads: the output layer of each head.
        labels: [batch, seq]; position t is scored with label t + 1, unless `shift_labels` are given.
        num_items_in_batch: what the summed loss is divided by; by default the number of labels that count.

    Returns:
        [heads], in nats, float32.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    targets = shift_labels.flatten().to(hidden_states[0].device)
    positions = (targets != ignore_index).nonzero().squeeze(1)
    targets = targets[positions]
    sums = [
        _summed_loss(lm_head, hidden.flatten(0, 1)[positions], targets)
        for hidden, lm_head in zip(hidden_states, lm_heads, strict=True)
    ]
    return torch.stack(sums) / (len(targets) if num_items_in_batch is None else num_items_in_batch)


class _HeadwiseLoss(torch.autograd.Function):
    """A head's loss whose gradients are computed in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        head_loss: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            hidden_states = hidden_states.detach().requires_grad_(needed[0])
            loss = head_loss(hidden_states)
        inputs = [tensor for tensor, need in zip((hidden_states, *weights), needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(loss, inputs, allow_unused=True))
        ctx.save_for_backward(*(next(gradients) if need else None for need in needed))
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the gradients are as large as the head.
        return None, *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)


def headwise_loss(
    head_loss: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, weights: Iterable[torch.Tensor]
) -> torch.Tensor:
    """`head_loss(hidden_states)`, a scalar; with gradients enabled, differentiated before it is returned.

    To autograd and to data-parallel engines it is one operation on `hidden_states` and `weights`, whose gradients
    arrive in the backward pass as usual.

    Args:
        head_loss: uses the `weights` and no other tensors that need a gradient.
        hidden_states: of any shape.
        weights: those that take part; others that are given get no gradient.
    """
    # Tied weights come twice.
    weights = [weight for weight in dict.fromkeys(weights) if weight.requires_grad]
    if not torch.is_grad_enabled() or not (weights or hidden_states.requires_grad):
        return head_loss(hidden_states)
    return _HeadwiseLoss.apply(head_loss, hidden_states, *weights)


__all__ = ["NeuroTrailsLlamaOutputLayer", "fused_causal_lm_losses", "headwise_loss"]
