# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Sparse training with `transformers.Trainer` and the trainers built on it, such as TRL's."""

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..sparsity import Sparsifier, SparsityConfig
from .engine import check_engine


# Key of the sparsifier's state in the first parameter group of a saved optimizer.
_STATE = "sparsifier"


class SparsifierCallback(TrainerCallback):
    """Makes a Trainer train sparse: `Trainer(..., callbacks=[SparsifierCallback(SparsityConfig(...))])`.

    The sparsifier is built when training begins, for the steps that Trainer will take, and steps after every optimizer
    step, when the gradients of the whole batch are still there. Its state is part of `optimizer.pt` in Trainer's
    checkpoints; a run that resumes one continues with the masks it had, bit for bit on one CPU process. Wherever
    Trainer logs its loss, `density` and `explored` (the share of weights that have ever existed) are added. Callbacks
    see them if they come later in the list: for a tracker set `report_to="none"` and give its callback after this one.

    Trainer clips by the norm of all gradients, those of removed weights included. To clip by the norm of the weights
    that exist, set `TrainingArguments(max_grad_norm=0)` and give `max_grad_norm` here.

    The loss has to be the model's own. TRL's SFTTrainer computes another, from one output layer only, and leaves the
    other heads without gradients: override its `compute_loss` by `transformers.Trainer.compute_loss`.

    Args:
        config: Which weights exist and how that changes. For a model that has been trained before, dense or sparse,
            set `mask_init="soft_magnitude"` or `"magnitude"`.
        max_grad_norm: Bound on the norm of the gradient of the weights that exist; None for none.

    Raises:
        ValueError: at the start of training, if Trainer uses DeepSpeed, FSDP or fp16, if both clip, or if it resumes a
            checkpoint that was not trained with this callback, or with another configuration.
    """

    sparsifier: Sparsifier
    """The sparsifier of the run, from the start of training on."""

    def __init__(self, config: SparsityConfig, max_grad_norm: float | None = None) -> None:
        self.config = config
        self.max_grad_norm = max_grad_norm
        self._state_hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wrapper: AcceleratedOptimizer = kwargs["optimizer"]
        self._check(args, wrapper.accelerator_state)
        optimizer = wrapper.optimizer
        saved = optimizer.param_groups[0].pop(_STATE, None)
        if state.global_step > 0 and saved is None:
            raise ValueError(
                f"resume_from_checkpoint: the checkpoint of step {state.global_step} holds no masks, being trained "
                'without SparsifierCallback; load its weights as a model and start anew, with mask_init="magnitude".'
            )
        self.sparsifier = Sparsifier(kwargs["model"], optimizer, self.config, total_steps=state.max_steps, state=saved)
        if self._state_hook is not None:
            self._state_hook.remove()
        self._state_hook = optimizer.register_state_dict_post_hook(self._add_state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.max_grad_norm is not None:
            self.sparsifier.clip_grad_norm_(self.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sparsifier.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" in logs:
            figures = {"density": self.sparsifier.density, "explored": self.sparsifier.explored}
            logs.update(figures)
            # Trainer has copied the logs into its history already.
            state.log_history[-1].update(figures)

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        # Optimizers load the options of parameter groups as they are, known or not.
        state_dict["param_groups"][0][_STATE] = self.sparsifier.state_dict()

    def _check(self, args: TrainingArguments, engine: AcceleratorState) -> None:
        if engine.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "distributed_type=FSDP: SparsifierCallback supports one process or data-parallel ones, each with the "
                "whole model; leave the engine out, or train with a recipe of this library."
            )
        check_engine(engine)
        if self.max_grad_norm is not None and args.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} in TrainingArguments and {self.max_grad_norm} in "
                "SparsifierCallback would both clip: set the one in TrainingArguments to 0."
            )
