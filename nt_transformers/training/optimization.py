# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Optimizers and learning-rate schedules."""

import math

import torch
from torch import nn

from .config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig, *, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; weight decay on matrices and convolutions only.

    `sharded` says that the parameters are, or will be, sharded by FSDP2.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        # DTensor has no fused SGD.
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=not sharded,
        )
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return optimizer_class(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Rises linearly to the peak over the warm-up, then falls to `min_lr_ratio` of it at `max_steps`; `multistep` falls
    by `lr_decay` at each milestone.
    """
    warmup_steps = round(config.warmup_ratio * config.max_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    if config.lr_schedule == "multistep":
        passed = sum(step > round(share * config.max_steps) for share in config.lr_milestones)
        return config.learning_rate * config.lr_decay**passed
    progress = (step - warmup_steps) / max(1, config.max_steps - warmup_steps)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.lr_schedule]
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
