# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Tensors of which each process may hold a part only (DTensor, as FSDP2 makes them).

Masks and other tensors are laid out over the processes as their parameter is. Where the parameter is whole, its part
is the parameter itself, and nothing is copied or sent. What is called collective has to be called by all processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_parts(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each process gives its part, laid out as `like` and of its shape."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, laid out as `like`."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank nothing is sent: every process takes its part of what it has.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def largest_magnitude(tensor: Tensor) -> float:
    """The largest magnitude of all elements, infinite if one of them is not a number; collective."""
    part = own_part(tensor.detach())
    # Not by abs(), whose copy of a large tensor takes ten times as long on CPU.
    lowest, highest = torch.aminmax(part) if part.numel() > 0 else (part.new_zeros(()), part.new_zeros(()))
    largest = torch.maximum(-lowest, highest)
    # Maxima over processes may lose a NaN.
    return float(_reduce(largest.nan_to_num(nan=math.inf, posinf=math.inf), tensor, "max"))


def total(value: int, like: Tensor) -> int:
    """The sum of what each process has counted in its part of a tensor laid out as `like`; collective."""
    return int(_reduce(torch.tensor(value, device=like.device), like, "sum"))


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all elements of all tensors, which may be laid out differently; collective."""
    layouts: dict[object, Tensor] = {}
    squares: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        layouts[layout] = tensor
        squares[layout].append(torch.linalg.vector_norm(own_part(tensor), dtype=_at_least_float32(tensor)).square())
    sums = [_reduce(torch.stack(squares[layout]).sum(), tensor, "sum") for layout, tensor in layouts.items()]
    return torch.stack(sums).sum().sqrt() if sums else torch.zeros(())


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reduce(value: Tensor, like: Tensor, operation: str) -> Tensor:
    """Combines the values that processes got from their parts; processes with the same part count once."""
    if not isinstance(like, DTensor):
        return value
    placements = [Replicate() if placement.is_replicate() else Partial(operation) for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements).full_tensor()
