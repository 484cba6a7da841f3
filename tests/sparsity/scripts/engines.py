# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains the same network by one process alone, by DDP with accumulation, and by FSDP2; saves what became of it.

Usage: torchrun --nproc_per_node 2 engines.py FOLDER. Everything is float64, where another order of summation cannot
change which weights are chosen.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nt_transformers.sparsity import Sparsifier, SparsityConfig


STEPS, RESUMED = 10, 5
METHODS: dict[str, dict[str, Any]] = {
    "rigl": {},
    "neurotrails_llm": {},
    "neurotrails_vision": {},
    "set": {},
    "gmp": {},
    "momentum": {"method": "rigl", "growth": "momentum", "mask_init": "soft_magnitude"},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "neurotrails_vision": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
}


def make_network() -> nn.Sequential:
    """Shapes that two processes cannot share evenly; of the last weight, one row, the second gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3),
        nn.Flatten(),
        nn.Linear(7 * 4, 24),
        nn.ReLU(),
        nn.Linear(24, 9),
        nn.ReLU(),
        nn.Linear(9, 1),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randn(8, 1, generator=generator)


class Run:
    """One run on one engine: `alone` takes the whole batch in every process, the others share it."""

    def __init__(self, engine: str, method: str, state: dict[str, Any] | None = None) -> None:
        self.engine = engine
        self.network = make_network()
        if state is not None:
            self.network.load_state_dict(state["network"])
        self.model: nn.Module = self.network
        if engine == "ddp":
            self.model = DistributedDataParallel(self.network)
        elif engine == "fsdp":
            for layer in (self.network[2], self.network[4]):
                fully_shard(layer)
            fully_shard(self.network)
        make_optimizer = OPTIMIZERS.get(method, lambda p: torch.optim.Adam(p, lr=1e-2))
        self.optimizer = make_optimizer(self.network.parameters())
        given = {"method": method, "density": 0.4, "update_interval": 2, "stop_fraction": 1.0, **METHODS[method]}
        topology = None if state is None else state["sparsifier"]
        self.sparsifier = Sparsifier(
            self.model, self.optimizer, SparsityConfig(**given), total_steps=STEPS, state=topology
        )

    def train(self, steps: range) -> dict[str, Any]:
        trace: dict[str, list[Any]] = {"masks": [], "norms": []}
        for step in steps:
            self._backward(*batch(step))
            trace["norms"].append(self.sparsifier.clip_grad_norm_(0.5))
            self.optimizer.step()
            self.sparsifier.step()
            self.optimizer.zero_grad()
            trace["masks"].append(self.sparsifier.state_dict()["masks"])
        weights = {name: whole(parameter) for name, parameter in self.network.named_parameters()}
        return {**trace, "weights": weights, "explored": self.sparsifier.explored, "state": self.state()}

    def state(self) -> dict[str, Any]:
        network = {name: whole(tensor) for name, tensor in self.network.state_dict().items()}
        return {"network": network, "sparsifier": self.sparsifier.state_dict()}

    def _backward(self, images: Tensor, targets: Tensor) -> None:
        shares = [slice(0, 8)]
        if self.engine != "alone":
            start = 4 * dist.get_rank()
            shares = [slice(start, start + 2), slice(start + 2, start + 4)]
        for share in shares:
            with nullcontext() if share is shares[-1] else self._no_sync():
                error = (self.model(images[share]) - targets[share]).square().sum() / 8
                # The engines average over processes.
                (error * (1 if self.engine == "alone" else dist.get_world_size())).backward()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        if self.engine == "ddp":
            with self.model.no_sync():
                yield
        else:
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


@contextmanager
def gathered_together() -> Iterator[list[set[torch.Size]]]:
    """Notes, whenever a whole tensor is gathered, the shapes of all that are alive."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    shapes: list[set[torch.Size]] = []
    full_tensor = DTensor.full_tensor

    def noted(self: DTensor, **kwargs: Any) -> Tensor:
        result = full_tensor(self, **kwargs)
        if result.ndim > 0:
            alive.add(result)
            shapes.append({tensor.shape for tensor in alive})
        return result

    DTensor.full_tensor = noted
    try:
        yield shapes
    finally:
        DTensor.full_tensor = full_tensor


def sharded_update() -> dict[str, Any]:
    """What an update of a sharded network gathers, and how the masks lie."""
    run = Run("fsdp", "rigl")
    run._backward(*batch(0))
    run.sparsifier.step()
    with gathered_together() as shapes:
        run.sparsifier.step()
    parameters = dict(run.network.named_parameters())
    parts = {
        name: (mask.to_local().shape, parameters[name].to_local().shape, mask.shape)
        for name, mask in run.sparsifier.masks.items()
    }
    return {"gathered_together": shapes, "parts": parts}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"update": sharded_update()}
    for method in METHODS:
        for engine in ("alone", "ddp", "fsdp"):
            results[f"{method} {engine}"] = Run(engine, method).train(range(STEPS))
    # Without an optimizer state: SET's choices do not need it, and plain SGD has none.
    OPTIMIZERS["set"] = lambda p: torch.optim.SGD(p, lr=0.05)
    results["uninterrupted"] = Run("alone", "set").train(range(STEPS))
    state = Run("alone", "set").train(range(RESUMED))["state"]
    results["resumed"] = Run("fsdp", "set", state).train(range(RESUMED, STEPS))
    torch.save(results, Path(sys.argv[1]) / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
