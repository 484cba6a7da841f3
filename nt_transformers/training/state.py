# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds of network, optimizer and random generators.

Weights and optimizer state are whole in a checkpoint, on whatever engine they were trained: one process, DDP and FSDP2
resume each other's. What is called collective has to be called by all processes.

The helpers of `torch.distributed.checkpoint` would not resume bit for bit: they take a step to create an optimizer's
state, return its tuples as lists, and hold tied weights twice.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ..sparsity.sharding import distribute, own_part, whole


def own_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers, tied ones once."""
    names = network.state_dict().keys()
    yield from network.named_parameters()
    yield from ((name, buffer) for name, buffer in network.named_buffers() if name in names)


def share_buffers(network: nn.Module) -> None:
    """Gives all processes the main one's buffers, such as running means, which each counts by itself; collective."""
    for buffer in network.buffers():
        buffer.copy_(broadcast(buffer))


def whole_weights(network: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The tensors of `own_tensors` in the memory of the main process, nothing on the others; collective."""
    weights = {name: _for_main_process(tensor, accelerator) for name, tensor in own_tensors(network)}
    return weights if accelerator.is_main_process else {}


@torch.no_grad()
def load_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies what `whole_weights` returned into the network, sharded or not."""
    for name, tensor in own_tensors(network):
        own_part(tensor).copy_(own_part(distribute(weights[name], tensor)))


def whole_optimizer_state(optimizer: Optimizer, accelerator: Accelerator) -> dict[str, Any]:
    """`optimizer.state_dict()` in the memory of the main process, nothing on the others; collective."""
    state = tree_map_only(torch.Tensor, lambda t: _for_main_process(t, accelerator), optimizer.state_dict())
    return state if accelerator.is_main_process else {}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continues from what `whole_optimizer_state` returned; every process gives all of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: _moment(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _moment(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of `value` that belongs to the parameter, laid out as it: another order of memory rounds otherwise."""
    moment = distribute(value, parameter)
    if moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(moment)


def _for_main_process(tensor: torch.Tensor, accelerator: Accelerator) -> Any:
    gathered = whole(tensor.detach())
    return gathered.cpu().contiguous() if accelerator.is_main_process else None


def unsharded(network: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The network with its whole weights, as a model that is no longer sharded; one that is not is returned itself."""
    if FSDPModule not in type(network).__mro__:
        return network
    with torch.device("meta"):
        # A sharded model's class builds the class that it was before.
        plain = type(network)(network.config)
    plain.load_state_dict(weights, assign=True)
    if plain.can_generate():
        plain.generation_config = network.generation_config
    return plain


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that this process may draw from."""
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Goes back to `random_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])
