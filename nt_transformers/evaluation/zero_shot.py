# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot results of a checkpoint on lm-eval's tasks."""

import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager

import nt_transformers
from nt_transformers.data import load_tokenizer

from .language_model import NeuroTrailsLM
from .members import PerHeadTaskManager
from .offline import check_data, write_tasks


SUITES = {
    "published": ("boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande"),
    "mmlu": ("mmlu",),
}
# lm-eval's default; standard errors of accuracies need none.
BOOTSTRAP_ITERS = 100_000


def evaluate_zero_shot(
    model: str,
    tasks: Sequence[str],
    *,
    per_head: bool = False,
    offline: Path | None = None,
    batch_size: int | str = 8,
    limit: int | float | None = None,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any] | None:
    """Evaluates a language model with lm-eval, without examples in the prompt.

    Args:
        model: folder or hub id of a checkpoint, with its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags.
        per_head: also evaluate every head and both votes, in the same pass.
        offline: folder made by `nt_transformers.evaluation.prepare` to take the data from, instead of the hub.
        batch_size: inputs at a time, or "auto".
        limit: only so many documents of each task, or this share of them.
        device: by default the accelerator if there is one.
        dtype: of the weights; by default that of the checkpoint.
        trust_remote_code: run code that comes with the checkpoint; not needed for the models of this package.

    Returns:
        What lm-eval returns, with `model` and the versions of packages; `results[task]["acc,head_0"]` is the accuracy
        of head 0, `["acc_stderr,head_0"]` its standard error, `["acc,none"]` that of the model's own vote. In a run of
        several processes None but in the first.

    Raises:
        ValueError: unknown task, no offline data for it, no tokenizer, a batch size below 1, `per_head` for a model
            without heads or for a task of another kind than choice.
    """
    if batch_size != "auto" and int(batch_size) < 1:
        raise ValueError(f'batch_size={batch_size}: give the number of inputs at a time, 1 or more, or "auto".')
    load_tokenizer(model)  # raises where there is none
    if offline is not None:
        check_data(offline, tasks)
    with tempfile.TemporaryDirectory() as folder:
        if offline is not None:
            write_tasks(offline, Path(folder))
        manager = PerHeadTaskManager(include_path=folder, include_defaults=offline is None)
        _check_tasks(tasks, manager)
        lm = NeuroTrailsLM(
            model,
            per_head=per_head,
            batch_size=batch_size,
            device=device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if per_head:
            manager.members = lm.members
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=0,
            batch_size=batch_size,
            device=str(lm.device),
            limit=limit,
            # As many for all members together as lm-eval draws for one result: they would dominate the run.
            bootstrap_iters=BOOTSTRAP_ITERS // (1 + len(manager.members)),
            log_samples=False,
            task_manager=manager,
        )
    if results is None:
        return None
    versions = {module.__name__: module.__version__ for module in (nt_transformers, lm_eval, transformers, torch)}
    return {"model": model, **results, "package_versions": versions}


def _check_tasks(tasks: Sequence[str], manager: TaskManager) -> None:
    if not tasks:
        raise ValueError("tasks: name at least one.")
    for name in tasks:
        if name not in manager.task_index:
            similar = get_close_matches(name, manager.all_tasks, n=5)
            hint = f"did you mean {', '.join(similar)}? " if similar else ""
            raise ValueError(f"tasks: lm-eval has no {name!r}: {hint}`lm_eval ls tasks` lists what there is.")
