# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Metrics of every head and vote by lm-eval's filters: one set of responses, one set of metrics for each member."""

from collections.abc import Iterable
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from .language_model import Answer, EnsembleAnswer


PER_HEAD_OUTPUT_TYPES = ("loglikelihood", "multiple_choice")


@register_filter("ensemble_member")
class EnsembleMember(Filter):
    """Takes what one member of the ensemble answered.

    Args:
        member: its name in `EnsembleAnswer.members`.
    """

    def __init__(self, member: str) -> None:
        self.member = member

    def apply(self, resps: Iterable[list[EnsembleAnswer]], docs: list[dict[str, Any]]) -> list[Answer]:
        """The member's answer to each request."""
        return [responses[0].members[self.member] for responses in resps]


class PerHeadTaskManager(TaskManager):
    """lm-eval's `TaskManager` whose tasks are also evaluated for members of a `NeuroTrailsLM(per_head=True)`.

    lm-eval then reports the metrics of a member under its name as filter, and the model's own as before.

    Args:
        members: some or all of `NeuroTrailsLM.members`; may be set until tasks are loaded.
        kwargs: see `lm_eval.tasks.TaskManager`.
    """

    def __init__(self, members: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.members = list(members)

    def load(self, task_list: Any) -> Any:
        """As `TaskManager.load`.

        Raises:
            ValueError: there are members, and a task whose requests are not log-likelihoods of given answers.
        """
        loaded = super().load(task_list)
        for name, task in loaded["tasks"].items():
            if self.members and task.OUTPUT_TYPE not in PER_HEAD_OUTPUT_TYPES:
                raise ValueError(
                    f"per_head: the task {name!r} is of type {task.OUTPUT_TYPE}; only "
                    f"{' and '.join(PER_HEAD_OUTPUT_TYPES)} tasks can be scored per head: leave it or per_head out."
                )
            task._filters += [
                build_filter_ensemble(member, [("ensemble_member", {"member": member})]) for member in self.members
            ]
        return loaded
