# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The one training loop of all recipes, on accelerate.

Notable:
- the loss is the mean over all items (tokens, images) of the global batch, however it is split over processes and
  accumulation steps;
- the sparsifier sees the gradient of the whole global batch;
- the data position travels with each batch, so a checkpoint resumes bit for bit on one process.
"""

import contextlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from ..analysis import topology_figures
from ..sparsity import Sparsifier
from .checkpoint import (
    find_damage,
    list_checkpoints,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from .config import TrainingConfig
from .metrics import MetricsLog
from .optimization import build_optimizer, learning_rate


Batch = dict[str, Any]
Position = dict[str, int]


class Task(Protocol):
    """What the loop trains: one kind of network on one kind of data."""

    model: nn.Module

    def batches(self, position: Position | None) -> Iterator[Batch]:
        """Endless micro-batches for this process; each holds the model's inputs and `position`, the place in the data
        after it. Given such a `position`, the batches that follow it."""

    def count_items(self, batch: Batch) -> int:
        """How many items (predicted tokens, images) the loss of `batch` averages over."""

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the items of `batch` divided by `num_items`: the loss (scalar) and each head's own, [heads]."""

    def evaluate(self) -> dict[str, Any]:
        """Figures on held-out data, the same on every process."""


class TrainingLoop:
    """Trains `task.model` as `config` says and leaves metrics and checkpoints in `config.output_dir`.

    Args:
        config: The run.
        task: Model, data, loss and evaluation.
        accelerator: Device, precision and processes.

    Raises:
        ValueError: the batch does not divide, `output_dir` holds another run, or the checkpoint to resume is damaged
            or belongs to another configuration.
    """

    def __init__(self, config: TrainingConfig, task: Task, accelerator: Accelerator) -> None:
        self.config = config
        self.task = task
        self.accelerator = accelerator
        self.accumulation_steps = config.accumulation_steps(accelerator.num_processes)
        self.output_dir = Path(config.output_dir)
        self.step = 0
        self.items = 0
        self.position: Position | None = None
        self.last_evaluation: dict[str, Any] = {}

        checkpoint = self._find_resume_point()
        self.model, self.optimizer = accelerator.prepare(task.model, build_optimizer(task.model, config))
        self.network = accelerator.unwrap_model(self.model)
        self.sparsifier = Sparsifier(
            self.network, self.optimizer.optimizer, config.sparsity, total_steps=config.max_steps
        )
        self._reset_window()
        if checkpoint is not None:
            self._resume(checkpoint)
        self.metrics = MetricsLog(self.output_dir / "metrics.jsonl", accelerator, last_step=self.step)

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    def run(self) -> None:
        """Trains to `max_steps`; evaluates, writes checkpoints and metrics on the way."""
        batches = self.task.batches(self.position)
        progress = tqdm(
            total=self.config.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        self.network.train()
        self.window_start = time.perf_counter()
        while self.step < self.config.max_steps:
            self._optimizer_step([next(batches) for _ in range(self.accumulation_steps)])
            progress.update()
            if self._due(self.config.logging_steps):
                progress.set_postfix(self._log_window())
            last = self.step == self.config.max_steps
            if last or self._due(self.config.eval_steps):
                self._evaluate()
            if self.config.checkpoint_steps and (last or self._due(self.config.checkpoint_steps)):
                self._save()
        progress.close()

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _optimizer_step(self, micro_batches: list[Batch]) -> None:
        self.position = micro_batches[-1].pop("position")
        local_items = sum(self.task.count_items(batch) for batch in micro_batches)
        num_items = self.accelerator.reduce(torch.tensor(local_items, device=self.accelerator.device), "sum")
        for index, batch in enumerate(micro_batches):
            batch.pop("position", None)
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                inputs = send_to_device(batch, self.accelerator.device, non_blocking=True)
                loss, head_losses = self.task.loss(self.model, inputs, num_items.clamp(min=1))
                # Data-parallel engines average gradients over processes; the loss is already a share of the whole.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            self._add_to_window(loss, head_losses)

        self.step += 1
        self.items += int(num_items)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        if self.config.max_grad_norm is not None or self._due(self.config.logging_steps):
            self.grad_norm = self.sparsifier.clip_grad_norm_(self.config.max_grad_norm or math.inf)
        self.optimizer.step()
        self.sparsifier.step()
        self.optimizer.zero_grad()

    def _reset_window(self) -> None:
        """Starts a new stretch of steps over which the logged losses are averaged."""
        self.window_losses = torch.zeros(0, device=self.accelerator.device)
        self.window_steps_start = self.step
        self.window_items_start = self.items
        self.window_start = time.perf_counter()

    def _add_to_window(self, loss: torch.Tensor, head_losses: torch.Tensor) -> None:
        losses = torch.cat((loss.detach().reshape(1), head_losses.detach())).float()
        self.window_losses = losses if self.window_losses.numel() == 0 else self.window_losses + losses

    def _log_window(self) -> dict[str, str]:
        steps = self.step - self.window_steps_start
        seconds = time.perf_counter() - self.window_start
        losses = (self.accelerator.reduce(self.window_losses, "sum") / steps).tolist()
        metrics = {
            "step": self.step,
            "loss": losses[0],
            "head_losses": losses[1:],
            "learning_rate": learning_rate(self.step, self.config),
            "grad_norm": float(self.grad_norm),
            "tokens": self.items,
            "density": self.sparsifier.density,
            "explored": self.sparsifier.explored,
            "seconds": round(seconds, 3),
            "tokens_per_second": round((self.items - self.window_items_start) / seconds, 1),
        }
        self.metrics.write(metrics)
        self._reset_window()
        return {"loss": f"{losses[0]:.3f}", "tok/s": f"{metrics['tokens_per_second']:.0f}"}

    def _evaluate(self) -> None:
        start = time.perf_counter()
        self.network.eval()
        self.last_evaluation = {**self.task.evaluate(), **topology_figures(self.sparsifier)}
        self.network.train()
        self.metrics.write({"step": self.step, "tokens": self.items, **self.last_evaluation})
        self.window_start += time.perf_counter() - start

    def _save(self) -> None:
        start = time.perf_counter()
        if self.accelerator.is_main_process:
            weights = {name: value.detach().contiguous() for name, value in _own_tensors(self.network)}
            training = {
                "optimizer": self.optimizer.state_dict(),
                "sparsifier": self.sparsifier.state_dict(),
                "random": _random_states(),
            }
            state = {
                "step": self.step,
                "items": self.items,
                "position": self.position,
                "window": {
                    "losses": self.window_losses.tolist(),
                    "steps_start": self.window_steps_start,
                    "items_start": self.window_items_start,
                },
                "config": self.config.identity(),
            }
            save_checkpoint(self.checkpoints, self.step, weights, training, state)
            rotate_checkpoints(self.checkpoints, self.config.keep_last)
        self.accelerator.wait_for_everyone()
        self.window_start += time.perf_counter() - start

    def _find_resume_point(self) -> Path | None:
        """The checkpoint to continue from; clears or protects what `output_dir` already holds."""
        if self.config.resume_from_checkpoint == "latest":
            for folder in reversed(list_checkpoints(self.checkpoints)):
                damage = find_damage(folder)
                if damage is None:
                    return folder
                self.accelerator.print(f"skipping {folder}: {damage}")
            return None
        if self.config.resume_from_checkpoint is not None:
            return Path(self.config.resume_from_checkpoint)
        if self.accelerator.is_main_process:
            self._make_room()
        self.accelerator.wait_for_everyone()
        return None

    def _make_room(self) -> None:
        if (self.output_dir / "metrics.jsonl").exists() and not self.config.overwrite_output_dir:
            raise ValueError(
                f"output_dir={self.config.output_dir!r}: it already holds a run; continue it with "
                "resume_from_checkpoint=latest, replace it with overwrite_output_dir=true, or name another folder"
            )
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.output_dir / "metrics.jsonl").unlink(missing_ok=True)

    def _resume(self, folder: Path) -> None:
        weights, training, state = load_checkpoint(folder)
        self._check_same_run(folder, state["config"])
        for name, value in _own_tensors(self.network):
            value.data.copy_(weights[name])
        self.optimizer.load_state_dict(training["optimizer"])
        self.sparsifier.load_state_dict(training["sparsifier"])
        _restore_random_states(training["random"])
        self.step, self.items, self.position = state["step"], state["items"], state["position"]
        self.window_losses = torch.tensor(state["window"]["losses"], device=self.accelerator.device)
        self.window_steps_start = state["window"]["steps_start"]
        self.window_items_start = state["window"]["items_start"]
        self.accelerator.print(f"resuming {folder} at step {self.step} of {self.config.max_steps}")

    def _check_same_run(self, folder: Path, saved: dict[str, Any]) -> None:
        own = json.loads(json.dumps(self.config.identity()))
        different = [
            f"{name}: {saved.get(name)!r} there, {own.get(name)!r} here"
            for name in sorted(saved.keys() | own.keys())
            if saved.get(name) != own.get(name)
        ]
        if different:
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r}: it belongs to another configuration; "
                f"give the same values or start a new run ({'; '.join(different)})"
            )


def _own_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers, tied ones once."""
    names = network.state_dict().keys()
    yield from network.named_parameters()
    yield from ((name, buffer) for name, buffer in network.named_buffers() if name in names)


def _random_states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "python": random.getstate(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])
