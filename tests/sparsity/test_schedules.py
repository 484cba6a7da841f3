# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Schedules against their closed forms."""

import math

import pytest

from nt_transformers.sparsity.schedules import drop_fraction, num_updates, pruned_share, stop_step


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", [0.5, 0.005 + 0.495 * (1 + math.sqrt(0.5)) / 2, 0.2525, 0.005]),
        ("linear", [0.5, 0.37625, 0.2525, 0.005]),
        ("constant", [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_drop_fraction(schedule: str, values: list[float]) -> None:
    computed = [drop_fraction(schedule, progress, 0.5, 0.005) for progress in (0.0, 0.25, 0.5, 1.0)]  # type: ignore[arg-type]
    assert computed == pytest.approx(values)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cubic", [0.0, 1 - 27 / 64, 7 / 8, 1.0]),
        ("linear", [0.0, 0.25, 0.5, 1.0]),
        ("cosine", [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, 1.0]),
    ],
)
def test_pruned_share(schedule: str, values: list[float]) -> None:
    computed = [pruned_share(schedule, progress) for progress in (0.0, 0.25, 0.5, 1.0)]  # type: ignore[arg-type]
    assert computed == pytest.approx(values)
    assert computed[-1] == 1.0


@pytest.mark.parametrize(
    ("total_steps", "interval", "stop_fraction", "expected"),
    [
        (100, 10, 0.75, 7),
        (100, 10, 0.7, 7),  # the step at stop_fraction counts
        (100, 10, 1.0, 9),  # the last step does not
        (101, 10, 1.0, 10),
        (100, 29, 0.29, 1),  # 0.29 * 100 is 28.999999999999996
        (100, 10, 0.0, 0),
        (1, 1, 1.0, 0),
        (5, 10, 1.0, 0),
    ],
)
def test_number_of_updates(total_steps: int, interval: int, stop_fraction: float, expected: int) -> None:
    assert num_updates(total_steps, interval, stop_fraction) == expected


def test_stop_step_is_whole() -> None:
    assert stop_step(100, 0.29) == 29
