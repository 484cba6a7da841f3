# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What every recipe does around the loop: set accelerate up, train, and sum the run up."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from .config import TrainingConfig
from .loop import Task, TrainingLoop


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Device, precision, processes and trackers of a run.

    Raises:
        ValueError: the precision is none that sparse training supports.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision!r}: sparse training is supported in float32 (no) and bf16"
        )
    return accelerator


def run_training(
    config: TrainingConfig, task: Task, accelerator: Accelerator
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains `task` to the end.

    Returns:
        The trained network, and the final figures of `summary.json`: what was trained on, sizes, the last evaluation,
        and the configuration.

    Raises:
        ValueError: as `TrainingLoop`; nothing has been trained or overwritten then.
    """
    loop = TrainingLoop(config, task, accelerator)
    if config.report_to:
        run_name = config.run_name or Path(config.output_dir).name
        accelerator.init_trackers(run_name, config={key: str(value) for key, value in config.identity().items()})
    loop.run()
    accelerator.end_training()
    network = accelerator.unwrap_model(loop.model)
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
    return network, summary
