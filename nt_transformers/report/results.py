# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Rows of results: from a study's JSON lines, or from the folder of a single run."""

import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kinds import Kind, Row, figure, kind_of


# What runs that differ in nothing but the seed have in common.
POINT = ("method", "density", "num_head_layers", "num_ensemble_heads", "budget", "length")


@dataclass(frozen=True)
class Results:
    """What a report is about.

    Args:
        title: Of the page.
        setting: What the reader should know about data, size and budget.
        rows: Finished runs without those that tuned learning rates.
        failed: Runs that broke, with `error`.
    """

    title: str
    setting: str
    rows: list[Row]
    failed: list[Row]

    @property
    def kind(self) -> Kind:
        """What the networks work on; asked for only where a run has finished."""
        return kind_of(self.rows[0])


def load_results(path: str | Path) -> Results:
    """Reads the folder of a study or of a run, or a study's `results.jsonl`.

    Raises:
        ValueError: there is none of these.
    """
    path = Path(path)
    if (path / "summary.json").exists():
        return Results(title=path.resolve().name, setting="A single run.", rows=[_row_of_run(path)], failed=[])
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: neither a run (summary.json), nor a study (results.jsonl), nor a file of results.")
    rows = [{"length": 1.0, **json.loads(line)} for line in file.read_text(encoding="utf-8").splitlines()]
    study = file.with_name("study.json")
    setting = json.loads(study.read_text(encoding="utf-8"))["setting"] if study.exists() else ""
    finished = [row for row in rows if row["status"] == "finished" and row["budget"] != "tuning"]
    failed = [row for row in rows if row["status"] == "failed"]
    if not finished and not failed:
        raise ValueError(f"{file}: no run has finished yet.")
    return Results(file.resolve().parent.name, setting, finished, failed)


def _row_of_run(folder: Path) -> Row:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kind = kind_of(summary)
    heads = figure(summary, f"{kind.quality}_heads")
    if heads is None:
        raise ValueError(
            f"{folder}: summary.json holds neither perplexities nor accuracies; it is no run of a recipe."
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = summary["config"]
    layers = config.get("model.num_head_layers", config.get("model.num_head_blocks"))
    model = {
        "method": config["sparsity.method"],
        "num_ensemble_heads": len(heads),
        "num_head_layers": config.get("model.num_hidden_layers", "all") if layers is None else layers,
    }
    curve = [line for line in lines if kind.loss in line]
    return {**summary, **model, "budget": kind.words["equal"], "length": 1.0, "seed": config["seed"], "curve": curve}


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """The rows by key, in the order in which the keys first come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def points(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that differ in nothing but the seed, together."""
    return list(grouped(rows, lambda row: tuple(row[name] for name in POINT)).values())


def main_points(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """For each method its point of most seeds (the first of those that tie) on equal data."""
    equal = (row for row in rows if row["budget"] != "flops" and row["length"] == 1)
    by_method = grouped(equal, lambda row: row["method"])
    return {method: max(points(own), key=len) for method, own in by_method.items()}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; None for a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
