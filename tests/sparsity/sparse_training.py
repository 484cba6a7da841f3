# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A small convolutional network, its data and optimizers, and a training loop for the tests of the sparsifier."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from nt_transformers.sparsity import Sparsifier, SparsityConfig


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda parameters: Adam(parameters, lr=1e-2, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2),
}
METHODS: dict[str, dict[str, Any]] = {
    "rigl": {},
    "set": {},
    "momentum": {"method": "rigl", "growth": "momentum"},
    "static": {},
    "gmp": {},
    "neurotrails_llm": {},
    "neurotrails_vision": {},
}


def make_network(seed: int = 0) -> nn.Sequential:
    """Two 4-D weights, two 2-D weights, biases; images of [1, 8, 8] to 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 20),
            nn.ReLU(),
            nn.Linear(20, 5),
        )


def make_batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images and classes that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator)


def make_config(method: str, **fields: Any) -> SparsityConfig:
    """The configuration of one of `METHODS`, by default at density 0.4 and with an update every second step."""
    given = {"method": method, "density": 0.4, "update_interval": 2, **METHODS[method], **fields}
    return SparsityConfig(**given)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    images, classes = batch
    return nn.functional.cross_entropy(model(images), classes)


def train_step(model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None, step: int) -> None:
    """One step on the batch of that step; the gradients are left for the test to look at."""
    optimizer.zero_grad()
    loss_of(model, make_batch(step)).backward()
    optimizer.step()
    if sparsifier is not None:
        sparsifier.step()


class Bare(nn.Module):
    """Weights of the given shapes and no forward pass; the tests set the gradients."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=self.generator) for shape in shapes)
        self.draw_gradients()

    def draw_gradients(self) -> None:
        """New random gradients."""
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=self.generator)


def frozen_sgd(model: nn.Module, momentum: float = 0.0) -> SGD:
    """An optimizer whose steps change nothing but its momentum."""
    return SGD(model.parameters(), lr=0.0, momentum=momentum)
