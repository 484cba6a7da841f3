# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Losses, gradients and weights that are NaN or infinite, found before they spread."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn

from ..sparsity.sharding import own_part


logger = get_logger(__name__)

# So many batches in a row are not to blame: the weights are.
MAX_SKIPPED_IN_A_ROW = 10


class NonFiniteError(ArithmeticError):
    """A loss, gradient or weight is NaN or infinite."""


class NonFiniteGuard:
    """Decides what becomes of a step whose loss or gradient is not finite, on all processes alike.

    Args:
        policy: `stop` raises. `skip` goes on with the next batch, until `MAX_SKIPPED_IN_A_ROW` are skipped in a row.
    """

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.policy = policy
        self.skipped = 0
        self._in_a_row = 0

    def passed(self) -> None:
        """A step was finite."""
        self._in_a_row = 0

    def failed(self, step: int, positions: tuple[Any, Any], culprits: str) -> None:
        """A step was not; every process has to call this.

        Args:
            step: The optimizer step that would have been taken.
            positions: In the data, before and after the step.
            culprits: What is not finite on this process; see `describe`.

        Raises:
            NonFiniteError: training cannot go on.
        """
        self.skipped += 1
        self._in_a_row += 1
        everywhere = dict.fromkeys(filter(None, gather_object([culprits])))
        message = f"step {step}, data from {positions[0] or 'the start'} to {positions[1]}: {'; '.join(everywhere)}"
        if self.policy == "stop":
            raise NonFiniteError(
                f"{message}. Nothing was changed by this step. Lower learning_rate or set max_grad_norm and resume an "
                "earlier checkpoint, or pass over such batches with on_non_finite=skip."
            )
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message}; {MAX_SKIPPED_IN_A_ROW} batches in a row. Resume an earlier checkpoint with a lower "
                "learning_rate or with max_grad_norm."
            )
        logger.warning(f"skipping a batch: {message}")


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value of the tensors, as far as this process holds them, is NaN or infinite."""
    # A sum is finite only if all of its terms are, and takes a tenth of the time of isfinite.
    sums = [own_part(tensor).sum().float() for tensor in tensors if tensor.is_floating_point()]
    return not sums or bool(torch.stack(sums).isfinite().all())


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def describe(head_losses: torch.Tensor, gradients: Mapping[str, torch.Tensor]) -> str:
    """Which heads' losses [heads] and which gradients are not finite."""
    parts = [f"loss {float(loss)} of head {head}" for head, loss in enumerate(head_losses) if not loss.isfinite()]
    names = [name for name, gradient in gradients.items() if not all_finite([gradient])]
    if names:
        heads = sorted({match[1] for name in names if (match := re.search(r"heads\.(\d+)\.", name))}, key=int)
        where = f" (head {', '.join(heads)})" if heads else ""
        parts.append(f"gradient of {_some(names)}{where}")
    return "; ".join(parts)


def describe_state(weights: Mapping[str, torch.Tensor], optimizer_state: Mapping[Any, dict[str, Any]]) -> str:
    """Which weights are not finite, or whether the optimizer's moments are not; empty if all are."""
    moments = [
        v for state in optimizer_state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim
    ]
    if not all_finite(weights.values()):
        return _some(name for name, weight in weights.items() if not all_finite([weight]))
    return "" if all_finite(moments) else "moments of the optimizer"


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 4))
    return ", ".join(first[:3]) + (" and others" if len(first) > 3 else "")
