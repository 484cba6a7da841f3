# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The metrics of a run: one JSON object a line, and whatever trackers the user asks for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator


# Fields that depend on the clock: all others of a resumed run equal those of an uninterrupted one.
TIMING_FIELDS = frozenset({"seconds", "tokens_per_second"})


class MetricsLog:
    """Appends to `metrics.jsonl` on the main process and passes numbers on to accelerate's trackers.

    Args:
        path: The file.
        accelerator: Its trackers must have been initialised.
        last_step: Lines of later steps are dropped, so that a resumed run repeats none.
    """

    def __init__(self, path: Path, accelerator: Accelerator, last_step: int) -> None:
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._lines() if json.loads(line)["step"] <= last_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A crash can leave the last line unfinished; its step is later than the last checkpoint's.
        return [line for line in lines if line.endswith("\n")]

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line. `metrics` holds `step` and whatever JSON can hold.

        The trackers get its numbers, those in lists (one per head) and in dicts (one per tensor) as `name/key`.
        """
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        numbers = dict(_numbers(metrics))
        self.accelerator.log(numbers, step=numbers.pop("step"))


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if isinstance(value, int | float):
            yield key, value
        elif isinstance(value, dict | list):
            nested = dict(enumerate(value)) if isinstance(value, list) else value
            yield from (
                (f"{key}/{name}", number) for name, number in nested.items() if isinstance(number, int | float)
            )
