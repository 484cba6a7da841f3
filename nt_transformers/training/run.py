# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What every recipe does around the loop: start trackers, train, and sum the run up, with what it cost."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..analysis import ModelCost
from ..sparsity.sparsifier import SparsitySummary
from .config import TrainingConfig
from .loop import Task, TrainingLoop
from .state import unsharded, whole_weights


def run_training(
    config: TrainingConfig, task: Task, accelerator: Accelerator
) -> tuple[PreTrainedModel, SparsitySummary, dict[str, Any]]:
    """Trains `task` to the end.

    Returns:
        The trained network, whole on the main process, its topology, and the final figures of `summary.json`: what was
        trained on,
        sizes, the last evaluation, and the configuration.

    Raises:
        ValueError: as `TrainingLoop`; nothing has been trained or overwritten then.
        Interrupted, NonFiniteError, CheckpointError: see `TrainingLoop.run`.
    """
    loop = TrainingLoop(config, task, accelerator)
    if config.report_to:
        run_name = config.run_name or Path(config.output_dir).name
        accelerator.init_trackers(run_name, config={key: str(value) for key, value in config.identity().items()})
    loop.run()
    weights = whole_weights(loop.network, accelerator)
    network = unsharded(loop.network, weights) if accelerator.is_main_process else loop.network
    topology = loop.sparsifier.summary()
    summary = {
        "steps": loop.step,
        task.items: loop.items,
        "parameters": network.num_parameters(),
        "active_parameters": network.num_parameters() - (topology.numel - topology.nonzeros),
        "density": topology.density,
        "explored": topology.explored,
        **loop.last_evaluation,
        "config": config.identity(),
    }
    return network, topology, summary


def cost_figures(config: TrainingConfig, cost: ModelCost, item: str, positions: int) -> dict[str, Any]:
    """FLOPs for `summary.json`: of an `item` (token, image), and of training on all `positions`.

    The latter is None for `gmp`: while it prunes, its cost changes from step to step.
    """
    training = cost.training(config.sparsity.dense_gradient_interval)
    return {
        f"forward_flops_per_{item}": cost.forward,
        f"training_flops_per_{item}": training,
        "training_flops": None if config.sparsity.method == "gmp" else training * positions,
    }
