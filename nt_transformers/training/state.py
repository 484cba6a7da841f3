# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds of network, optimizer and random generators.

Weights and optimizer state are whole in a checkpoint, on whatever engine they were trained: one process, DDP and FSDP2
resume each other's. What is called collective has to be called by all processes.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..sparsity.sharding import distribute, own_part, whole


def own_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers, tied ones once."""
    names = network.state_dict().keys()
    yield from network.named_parameters()
    yield from ((name, buffer) for name, buffer in network.named_buffers() if name in names)


def whole_weights(network: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The tensors of `own_tensors` in the memory of the main process, nothing on the others; collective."""
    weights = {}
    for name, tensor in own_tensors(network):
        gathered = whole(tensor.detach())
        if accelerator.is_main_process:
            weights[name] = gathered.cpu().contiguous()
    return weights


@torch.no_grad()
def load_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies what `whole_weights` returned into the network, sharded or not."""
    for name, tensor in own_tensors(network):
        own_part(tensor).copy_(own_part(distribute(weights[name], tensor)))


def whole_optimizer_state(network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, whole on the main process, nothing on the others; collective."""
    return get_optimizer_state_dict(
        network, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_optimizer_state(network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continues from what `whole_optimizer_state` returned; every process gives all of it."""
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))


def unsharded(network: Any, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The network with its whole weights, as a model that is no longer sharded; one that is not is returned itself."""
    if not isinstance(network, FSDPModule):
        return network
    with torch.device("meta"):
        # A sharded model's class builds the class that it was before.
        plain = type(network)(network.config)
    plain.load_state_dict(weights, assign=True)
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
