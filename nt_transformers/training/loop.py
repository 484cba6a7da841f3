# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The one training loop of all recipes, on accelerate.

Notable:
- the loss is the mean over all items (tokens, images) of the global batch, however it is split over processes and
  accumulation steps;
- the sparsifier sees the gradient of the whole global batch;
- the data position travels with each batch, so a checkpoint resumes bit for bit on as many processes as saved it;
- a checkpoint holds whole tensors: any engine, and any number of processes, resumes it.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import nn
from tqdm import tqdm

from ..analysis import topology_figures
from ..sparsity import Sparsifier
from .checkpoint import (
    CheckpointError,
    check_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
    rotate_checkpoints,
    save_checkpoint,
)
from .config import TrainingConfig
from .engine import check_shardable, name_sharded_units, root_gathered
from .export import remove_export
from .interruption import Interrupted, StopSignals
from .metrics import MetricsLog
from .nonfinite import NonFiniteError, NonFiniteGuard, all_finite, describe, describe_state, gradients
from .optimization import build_optimizer, learning_rate
from .state import (
    load_optimizer_state,
    load_weights,
    own_tensors,
    random_states,
    restore_random_states,
    share_buffers,
    whole_optimizer_state,
    whole_weights,
)
from .timing import PhaseTimer


Batch = dict[str, Any]
Position = dict[str, int]


class Task(Protocol):
    """What the loop trains: one kind of network on one kind of data."""

    model: nn.Module

    @property
    def items(self) -> Literal["tokens", "images"]:
        """What the loss averages over, as the metrics name it."""

    def batches(self, position: Position | None) -> Iterator[Batch]:
        """Endless micro-batches for this process; each holds the model's inputs and `position`, the place in the data
        after it. Given such a `position`, the batches that follow it."""

    def count_items(self, batch: Batch) -> int:
        """How many items the loss of `batch` averages over."""

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
        ValueError: the batch does not divide, the network cannot be sharded, `output_dir` holds another run, or the
            checkpoint to resume is damaged or belongs to another configuration.
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
        self.guard = NonFiniteGuard(config.on_non_finite)
        self.stopping = False
        self.rotation: Future[None] | None = None
        self.window_losses: torch.Tensor

        if accelerator.is_fsdp2:
            check_shardable(task.model, accelerator.mixed_precision)
            name_sharded_units(task.model)
        checkpoint = self._find_resume_point()
        optimizer = build_optimizer(task.model, config, sharded=accelerator.is_fsdp2)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
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
        """Trains to `max_steps`; evaluates, writes checkpoints and metrics on the way.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and a checkpoint saved.
            NonFiniteError: a loss, gradient or weight is NaN or infinite; no checkpoint holds it.
            CheckpointError: a checkpoint could not be written; earlier ones are untouched.
        """
        progress = tqdm(
            total=self.config.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with StopSignals() as self.signals, progress, ThreadPoolExecutor(max_workers=1) as self.background:
            batches = self.task.batches(self.position)
            self.network.train()
            self.timer = PhaseTimer(self.accelerator.device)
            self.window_start = time.perf_counter()
            while self.step < self.config.max_steps:
                with self.timer("data"):
                    micro_batches = [next(batches) for _ in range(self.accumulation_steps)]
                if self._optimizer_step(micro_batches):
                    progress.update()
                    self._after_step(progress)
                if self.stopping:
                    self._save()
                    raise Interrupted
            self._finish_rotation()

    def _after_step(self, progress: tqdm) -> None:
        last = self.step == self.config.max_steps
        if self._due(self.config.logging_steps):
            progress.set_postfix(self._log_window())
        if last or self._due(self.config.eval_steps):
            self._evaluate()
        due = self.config.checkpoint_steps is not None and (last or self._due(self.config.checkpoint_steps))
        if due and not self.stopping:
            self._save()
        elif last:
            self._check_weights()

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _optimizer_step(self, micro_batches: list[Batch]) -> bool:
        """Takes one step, or passes over a batch that is not finite; returns which."""
        start, self.position = self.position, micro_batches[-1].pop("position")
        local_items = sum(self.task.count_items(batch) for batch in micro_batches)
        num_items = self.accelerator.reduce(torch.tensor(local_items, device=self.accelerator.device), "sum")
        losses = self._forward_backward(micro_batches, num_items.clamp(min=1))
        if not self._agree_to_step(losses):
            culprits = describe(losses[1:], gradients(self.network))
            self.optimizer.zero_grad()
            self.guard.failed(self.step + 1, (start, self.position), culprits)
            return False

        self.guard.passed()
        self.window_losses = losses if self.window_losses.numel() == 0 else self.window_losses + losses
        self.step += 1
        self.items += int(num_items)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        with self.timer("optimizer"):
            if self.config.max_grad_norm is not None or self._due(self.config.logging_steps):
                self.grad_norm = self.sparsifier.clip_grad_norm_(self.config.max_grad_norm or math.inf)
            self.optimizer.step()
        with self.timer("sparsifier"):
            self.sparsifier.step()
        self.optimizer.zero_grad()
        return True

    def _forward_backward(self, micro_batches: list[Batch], num_items: torch.Tensor) -> torch.Tensor:
        """Leaves the gradient of the global batch in the parameters; returns this process's share of its loss and of
        each head's, [1 + heads]."""
        losses = []
        for index, batch in enumerate(micro_batches):
            batch.pop("position", None)
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                inputs = send_to_device(batch, self.accelerator.device, non_blocking=True)
                with self.timer("forward"):
                    loss, head_losses = self.task.loss(self.model, inputs, num_items)
                # Data-parallel engines average gradients over processes; the loss is already a share of the whole.
                with self.timer("backward"):
                    self.accelerator.backward(loss * self.accelerator.num_processes)
            # Comparable between runs, whatever of the heads' losses is minimized.
            losses.append(torch.cat((head_losses.detach().mean().reshape(1), head_losses.detach())).float())
        return torch.stack(losses).sum(0)

    def _agree_to_step(self, losses: torch.Tensor) -> bool:
        """Whether loss and gradient are finite on all processes; lets all of them know if one was told to stop."""
        finite = all_finite([losses, *gradients(self.network).values()])
        flags = torch.tensor([self.signals.received, not finite], device=self.accelerator.device, dtype=torch.int32)
        stopping, broken = self.accelerator.reduce(flags, "sum").tolist()
        self.stopping = stopping > 0
        return broken == 0

    def _reset_window(self) -> None:
        """Starts a new stretch of steps over which the logged losses are averaged."""
        self.window_losses = torch.zeros(0, device=self.accelerator.device)
        self.window_steps_start = self.step
        self.window_items_start = self.items
        self.window_start = time.perf_counter()

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
            self.task.items: self.items,
            "density": self.sparsifier.density,
            "explored": self.sparsifier.explored,
            "skipped_batches": self.guard.skipped,
            **self._skipped_records(),
            "seconds": round(seconds, 3),
            f"{self.task.items}_per_second": round((self.items - self.window_items_start) / seconds, 1),
            **self.timer.take_shares(),
        }
        self.metrics.write(metrics)
        self._reset_window()
        return {"loss": f"{losses[0]:.3f}", f"{self.task.items}/s": f"{metrics[f'{self.task.items}_per_second']:.0f}"}

    def _evaluate(self) -> None:
        start = time.perf_counter()
        self.network.eval()
        share_buffers(self.network)
        with self.timer("evaluation"), root_gathered(self.network):
            figures = self.task.evaluate()
        self.last_evaluation = {**figures, **topology_figures(self.sparsifier)}
        self.network.train()
        self.metrics.write({"step": self.step, self.task.items: self.items, **self.last_evaluation})
        self.window_start += time.perf_counter() - start

    def _skipped_records(self) -> dict[str, int]:
        """How many damaged records the data passed over so far, for data that count them."""
        position = self.position or {}
        return {key: position[key] for key in ("skipped_records",) if key in position}

    def _check_weights(self) -> None:
        """Raises a `NonFiniteError` on all processes if a weight or a moment of the optimizer is not finite."""
        culprits = describe_state(dict(own_tensors(self.network)), self.optimizer.state)
        broken = torch.tensor(int(bool(culprits)), device=self.accelerator.device)
        if self.accelerator.reduce(broken, "sum") > 0:
            raise NonFiniteError(
                f"step {self.step}: {culprits or 'on another process, weights'} not finite. No checkpoint was written "
                "of it. Lower learning_rate or set max_grad_norm and resume an earlier checkpoint."
            )

    def _save(self) -> None:
        start = time.perf_counter()
        self._check_weights()
        contents = self._snapshot()
        error = self._write_checkpoint(*contents) if self.accelerator.is_main_process else None
        failed = torch.tensor(int(error is not None), device=self.accelerator.device)
        # Also keeps the others from going on before the checkpoint is there.
        if self.accelerator.reduce(failed, "sum") > 0:
            raise error or CheckpointError(f"step {self.step}: the main process could not write the checkpoint")
        self.window_start += time.perf_counter() - start

    def _write_checkpoint(
        self, weights: dict[str, torch.Tensor], training: dict[str, Any], state: dict[str, Any]
    ) -> CheckpointError | None:
        self._finish_rotation()
        try:
            self.metrics.sync()
            folder = save_checkpoint(self.checkpoints, self.step, weights, training, state)
        except CheckpointError as error:
            return error
        # Old checkpoints are deleted while training goes on: large ones take a while.
        self.rotation = self.background.submit(
            rotate_checkpoints, self.checkpoints, self.config.keep_last, self.config.keep_every, written=folder
        )
        return None

    def _finish_rotation(self) -> None:
        if self.rotation is not None:
            self.rotation.result()
            self.rotation = None

    def _snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
        """What the main process is to save; every process has to call this."""
        share_buffers(self.network)
        process = {"random": random_states(self.accelerator.device), "window_losses": self.window_losses.tolist()}
        training = {
            "optimizer": whole_optimizer_state(self.optimizer.optimizer, self.accelerator),
            "sparsifier": self.sparsifier.state_dict(),
            "processes": gather_object([process]),
        }
        state = {
            "step": self.step,
            "items": self.items,
            "position": self.position,
            "skipped_batches": self.guard.skipped,
            "last_evaluation": self.last_evaluation,
            "window": {"steps_start": self.window_steps_start, "items_start": self.window_items_start},
            "batch_split": self._batch_split(),
            "config": self.config.identity(),
        }
        return whole_weights(self.network, self.accelerator), training, state

    def _batch_split(self) -> dict[str, int]:
        """How the global batch is shared out: what may change between a run and its resumption, at a price."""
        return {
            "processes": self.accelerator.num_processes,
            "per_device_batch_size": self.config.per_device_batch_size,
        }

    def _find_resume_point(self) -> Path | None:
        """The checkpoint to continue from; makes `output_dir`, clears or protects what it already holds."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir={self.config.output_dir!r}: it cannot be made ({error})") from error
        named = self.config.resume_from_checkpoint
        folder = None if named is None else self._whole_checkpoint(named)
        elsewhere = folder is None or folder.resolve().parent != self.checkpoints.resolve()
        if named != "latest" and elsewhere:
            if self.accelerator.is_main_process:
                self._make_room()
            self.accelerator.wait_for_everyone()
        return folder

    def _whole_checkpoint(self, name: str) -> Path | None:
        """The checkpoint of that name, or the `latest`, if there is one yet; its hashes have been compared."""
        # One process looks, so that all of them resume the same one and none reads it more than once.
        found: list[Path | ValueError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                if name == "latest":
                    # A run that was killed after its last checkpoint writes no other one.
                    remove_leftovers(self.checkpoints)
                    found = [newest_checkpoint(self.checkpoints, print)]
                else:
                    check_checkpoint(Path(name))
                    found = [Path(name)]
            except ValueError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def _make_room(self) -> None:
        if (self.output_dir / "metrics.jsonl").exists() and not self.config.overwrite_output_dir:
            raise ValueError(
                f"output_dir={self.config.output_dir!r}: it already holds a run; continue it with "
                "resume_from_checkpoint=latest, replace it with overwrite_output_dir=true, or name another folder"
            )
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.output_dir / "metrics.jsonl").unlink(missing_ok=True)
        remove_export(self.output_dir)

    def _resume(self, folder: Path) -> None:
        weights, training, state = load_checkpoint(folder, checked=True)
        self._check_same_run(folder, state["config"])
        load_weights(self.network, weights)
        load_optimizer_state(self.optimizer.optimizer, training["optimizer"])
        self.sparsifier.load_state_dict(training["sparsifier"])
        self.step, self.items, self.position = state["step"], state["items"], state["position"]
        self.guard.skipped, self.last_evaluation = state["skipped_batches"], state["last_evaluation"]
        self.window_steps_start = state["window"]["steps_start"]
        self.window_items_start = state["window"]["items_start"]
        self._resume_process(training["processes"])
        self.accelerator.print(f"resuming {folder} at step {self.step} of {self.config.max_steps}")
        if state["batch_split"] != self._batch_split():
            self.accelerator.print(
                f"the global batch was split by {state['batch_split']}, now by {self._batch_split()}: weights, masks, "
                "optimizer, schedules and data position continue exactly; sums over the batch are rounded in another "
                "order; random draws other than those of data and masks (dropout) and running statistics of batch "
                "norms are not those of the former run"
            )

    def _resume_process(self, processes: list[dict[str, Any]]) -> None:
        """Takes up what each process held for itself; for another number of processes the sums stay right."""
        rank, size = self.accelerator.process_index, len(processes)
        restore_random_states(processes[rank % size]["random"], self.accelerator.device)
        losses = torch.tensor([process["window_losses"] for process in processes], device=self.accelerator.device)
        if size == self.accelerator.num_processes:
            self.window_losses = losses[rank]
        else:
            self.window_losses = losses.sum(0) * self.accelerator.is_main_process

    def _check_same_run(self, folder: Path, saved: dict[str, Any]) -> None:
        own = json.loads(json.dumps(self.config.identity()))
        different = [
            f"{name}: {saved.get(name)!r} there, {own.get(name)!r} here"
            for name in sorted((saved.keys() | own.keys()) - self.config.free_on_resume)
            if saved.get(name) != own.get(name)
        ]
        if different:
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r}: it belongs to another configuration; "
                f"give the same values or start a new run ({'; '.join(different)})"
            )
