# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a training run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch


Phase = Literal["data", "forward", "backward", "optimizer", "sparsifier", "evaluation"]
# Metrics fields; with `headwise_backward` the backward passes of the heads count as forward.
SHARES = {phase: f"share_{phase}" for phase in get_args(Phase)}


class PhaseTimer:
    """Measures the share of time that each phase takes.

    On CUDA the time is that of the device, by events that are read only when the shares are: nothing waits for the
    device in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._now()
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Adds the time spent inside to the phase."""
        start = self._now()
        yield
        self._spans[phase].append((start, self._now()))

    def take_shares(self) -> dict[str, float]:
        """Share of the time since the last call, or since construction, by metrics field; starts anew."""
        end = self._now()
        total = self._elapsed(self._start, end)
        shares = {
            field: round(sum(self._elapsed(*span) for span in self._spans[phase]) / total, 4)
            for phase, field in SHARES.items()
        }
        self._start = end
        self._spans.clear()
        return shares

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end)
