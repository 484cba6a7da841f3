# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What every training run is told, whatever the network and the data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..sparsity import SparsityConfig
from ..validation import check, check_types


Tracker = Literal["tensorboard", "trackio", "wandb"]

# Fields that may differ between a run and its resumption: they do not touch what is computed.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "per_device_batch_size",
        "activation_checkpointing",
        "headwise_backward",
        "compile",
        "report_to",
        "run_name",
        "logging_steps",
        "eval_steps",
        "checkpoint_steps",
        "keep_last",
        "keep_every",
        "on_non_finite",
        "data.on_bad_record",
        "data.skip_damaged_images",
        "data.num_workers",
        "license",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    }
)


@dataclass(kw_only=True)
class TrainingConfig:
    """A training run.

    Args:
        output_dir: Folder of the run: metrics and checkpoints while it trains, a Hub checkpoint when it is done.
        sparsity: Which weights exist and how that changes.
        max_steps: Optimizer steps.
        global_batch_size: Examples of one optimizer step, over all processes and accumulation steps.
        per_device_batch_size: Examples of one forward pass on one process; the rest of the global batch accumulates.
        optimizer: Update rule. `adam` couples weight decay to the gradient, `adamw` does not; `sgd` has momentum.
        learning_rate: Peak learning rate.
        lr_schedule: How the learning rate falls after the warm-up. `multistep` multiplies it by `lr_decay` at each of
            `lr_milestones`.
        warmup_ratio: Share of the steps over which the learning rate rises from zero.
        min_lr_ratio: Learning rate at the end, as a share of the peak (`constant` and `multistep` ignore it).
        lr_milestones: Shares of all steps at which `multistep` lowers the learning rate.
        lr_decay: Factor of `multistep` at each milestone.
        momentum: Momentum of `sgd`.
        nesterov: Whether it is Nesterov's.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_epsilon: Term added to the denominator.
        weight_decay: Applied to matrices only, never to norms and biases.
        max_grad_norm: Bound on the norm of the gradient of the active weights; null for none.
        mixed_precision: `bf16` computes in bfloat16 over float32 master weights; null takes what accelerate is set to.
        seed: Of the initialisation and the order of the data, and of the topology unless `sparsity.seed` is given.
        logging_steps: Steps between two lines of metrics.
        eval_steps: Steps between two evaluations on held-out data; null for one at the end only.
        checkpoint_steps: Steps between two checkpoints; null for none.
        keep_last: How many of the newest checkpoints are kept.
        keep_every: Checkpoints of steps that are multiples of this are kept as well; null for none.
        on_non_finite: What to do when a loss or gradient is NaN or infinite: `stop`, or `skip` the batch. The step
            counts only once a batch is finite.
        resume_from_checkpoint: A checkpoint folder, or `latest`: the newest complete one of `output_dir`, if any.
        overwrite_output_dir: Delete the run that `output_dir` holds and start anew.
        report_to: Trackers that get the metrics besides `metrics.jsonl`, one or a list.
        run_name: Name of the run in the trackers; null takes the name of `output_dir`.
        license: Licence of the trained weights, for the model card.
        push_to_hub: Upload the trained model to the Hub.
        hub_model_id: Repository to push to, `name` or `organisation/name`; null takes the name of `output_dir`.
        hub_private_repo: Whether a new repository is private; null leaves it to the account's settings.
    """

    free_on_resume: ClassVar[frozenset[str]] = FREE_ON_RESUME

    output_dir: str
    sparsity: SparsityConfig
    max_steps: int
    global_batch_size: int = 512
    per_device_batch_size: int = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1.5e-3
    lr_schedule: Literal["cosine", "linear", "constant", "multistep"] = "cosine"
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1
    lr_milestones: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    lr_decay: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "bf16"] | None = None
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    checkpoint_steps: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    on_non_finite: Literal["stop", "skip"] = "stop"
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    report_to: Tracker | list[Tracker] = field(default_factory=list)
    run_name: str | None = None
    license: str = "apache-2.0"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("output_dir", "resume_from_checkpoint", "run_name"):
            check(getattr(self, name) != "", name, "", "name one, or leave the field out")
        check(0 <= self.seed < 2**32, "seed", self.seed, "give a number from 0 up to 2**32 - 1")
        for name in ("max_steps", "global_batch_size", "per_device_batch_size", "logging_steps", "keep_last"):
            value = getattr(self, name)
            check(value >= 1, name, value, "give a whole number of at least 1")
        for name in ("eval_steps", "checkpoint_steps", "keep_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "give a whole number of at least 1, or null")
        for name in ("warmup_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            check(0 <= value <= 1, name, value, "give a share between 0 and 1")
        shares = all(0 < share < 1 for share in self.lr_milestones)
        check(shares, "lr_milestones", self.lr_milestones, "give shares of training between 0 and 1")
        check(0 < self.lr_decay < 1, "lr_decay", self.lr_decay, "give a factor between 0 and 1")
        for name in ("adam_beta1", "adam_beta2", "momentum"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "give a number from 0 up to, not including, 1")
        check(self.momentum > 0 or not self.nesterov, "nesterov", self.nesterov, "needs a momentum above 0")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "give a positive number")
        check(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "give a positive number")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give zero or a positive number")
        check(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "give a positive number, or null for no clipping",
        )
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if self.sparsity.seed is None:
            self.sparsity = dataclasses.replace(self.sparsity, seed=self.seed)

    def accumulation_steps(self, num_processes: int) -> int:
        """Forward passes of one process in one optimizer step.

        Raises:
            ValueError: the global batch cannot be shared out evenly.
        """
        parallel = self.per_device_batch_size * num_processes
        check(
            self.global_batch_size % parallel == 0,
            "global_batch_size",
            self.global_batch_size,
            f"make it a multiple of per_device_batch_size x processes, {self.per_device_batch_size} x {num_processes}",
        )
        return self.global_batch_size // parallel

    def identity(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the one it continues, as `{dotted name: value}`."""
        flat = flatten(dataclasses.asdict(self))
        return {name: value for name, value in flat.items() if name not in self.free_on_resume}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
