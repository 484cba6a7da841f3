# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The metrics of a run: one JSON object a line, and whatever trackers the user asks for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import sync, write_text
from .timing import SHARES


# Fields that depend on the clock: all others of a resumed run equal those of an uninterrupted one.
TIMING_FIELDS = frozenset({"seconds", "tokens_per_second", "images_per_second", *SHARES.values()})


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
            write_text(path, "".join(f"{line}\n" for line in self._lines(last_step)))

    def _lines(self, last_step: int) -> Iterator[str]:
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.split(b"\n"):
            try:
                if json.loads(line)["step"] > last_step:
                    return
            except (ValueError, KeyError, TypeError):
                # What a crash left unfinished is later than the last checkpoint, for which `sync` was called.
                return
            yield line.decode()

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

    def sync(self) -> None:
        """Returns when all lines are on the disk, so that a checkpoint never knows of more than the file."""
        if self.path.exists():
            sync(self.path)


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if isinstance(value, int | float):
            yield key, value
        elif isinstance(value, dict | list):
            nested = dict(enumerate(value)) if isinstance(value, list) else value
            yield from (
                (f"{key}/{name}", number) for name, number in nested.items() if isinstance(number, int | float)
            )
