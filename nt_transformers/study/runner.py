# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs a study: tuning first, then the grids, a few processes at a time.

Notable:
- What is finished is what left a `result.json` in its folder. A study that was stopped, however rudely, goes on with
  what is missing; a run that was under way continues from its last checkpoint.
- A run that breaks is reported, in the results too, and the others go on. The next start tries it again.
- `results.jsonl` is written anew after every run, from the results of the present grids only: one JSON object a line.
  Where only this file is left (in a repository, say), it counts for the folders of its finished runs.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import StudyConfig
from .kind import Kind
from .plan import TUNING, Run, StudyPlan, plan_table


Row = dict[str, Any]

WORKER = [sys.executable, "-m", "nt_transformers.study.worker"]
# How many characters of a broken run's output the results repeat.
ERROR_CHARACTERS = 2000


def run_study(config: StudyConfig) -> list[Row]:
    """Does what is missing of the study and returns its rows, as in `results.jsonl`.

    Raises:
        ValueError: the configuration, the test data or an earlier `results.jsonl` are unusable, or another process is
            at work in `output_dir`.
    """
    plan = StudyPlan(config)
    tuning = plan.tuning_runs()
    if config.dry_run:
        rates = dict.fromkeys(config.methods, config.learning_rates[0])
        print(plan_table([*tuning, *plan.main_runs(rates)]))
        return []
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        earlier = _restore(folder)
        _write(folder / "study.json", json.dumps(asdict(config), indent=2))
        pool = _Pool(config, plan.kind)
        if tuning:
            # What the grids are is known only afterwards: until then all earlier rows stay.
            names = {run.name for run in tuning}
            pool.execute(tuning, [row for row in earlier if row["run"] not in names])
        rates = _choose_learning_rates(config, plan.kind, tuning)
        runs = plan.main_runs(rates)
        pool.execute(runs, _rows(tuning))
        rows = [*_rows(tuning), *_rows(runs)]
        _write_results(folder, rows)
        return rows


def _choose_learning_rates(config: StudyConfig, kind: Kind, tuning: Sequence[Run]) -> dict[str, float]:
    """The learning rate of each method with the lowest validation loss; methods whose runs all broke have none."""
    if not tuning:
        return dict.fromkeys(config.methods, config.learning_rates[0])
    losses: dict[str, dict[float, float]] = {}
    for run in tuning:
        row = _row(run)
        if row is not None and row["status"] == "finished":
            assert run.spec.learning_rate is not None
            losses.setdefault(run.spec.method, {})[run.spec.learning_rate] = row[kind.loss]
    rates = {method: min(tried, key=tried.__getitem__) for method, tried in losses.items()}
    for method, rate in rates.items():
        edge = rate in (min(config.learning_rates), max(config.learning_rates))
        print(f"{method}: learning rate {rate:g}" + (", at the edge of those tried: try more" if edge else ""))
    return rates


class _Pool:
    """Does runs, `config.processes` at a time."""

    def __init__(self, config: StudyConfig, kind: Kind) -> None:
        self.config = config
        self.kind = kind
        self.test = kind.prepare(config)

    def execute(self, runs: Sequence[Run], others: list[Row]) -> None:
        """Does those of the runs that have no result; `others` belong into the results as well."""
        waiting = [run for run in runs if not (run.folder / "result.json").exists()]
        for run in waiting:
            (run.folder / "failure.json").unlink(missing_ok=True)
        print(f"{len(waiting)} of {len(runs)} runs to do", flush=True)
        running: list[tuple[Run, subprocess.Popen[bytes]]] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.config.processes:
                    run = waiting.pop(0)
                    running.append((run, self._start(run)))
                time.sleep(0.2)
                done = [started for started in running if started[1].poll() is not None]
                running = [started for started in running if started not in done]
                for started in done:
                    self._finish(*started)
                if done:
                    _write_results(Path(self.config.output_dir), [*others, *_rows(runs)])
        finally:
            for _, process in running:
                process.kill()
                process.communicate()

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        run.folder.mkdir(parents=True, exist_ok=True)
        description = {
            "kind": self.config.kind,
            "row": _identity(run),
            "training": asdict(run.training),
            "test": None if run.spec.budget == TUNING else self.test,
        }
        _write(run.folder / "run.json", json.dumps(description, indent=2))
        threads = str(max((os.cpu_count() or 1) // self.config.processes, 1))
        with (run.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*WORKER, str(run.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": threads, **os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    def _finish(self, run: Run, process: subprocess.Popen[bytes]) -> None:
        process.communicate()  # closes its standard input
        if process.returncode == 0:
            row = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
            print(f"finished {run.name}: {self.kind.headline(row)} after {row['seconds']:.0f} s", flush=True)
            return
        error = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-ERROR_CHARACTERS:]
        failure = {**_identity(run), "status": "failed", "exit_code": process.returncode, "error": error}
        _write(run.folder / "failure.json", json.dumps(failure))
        last = (error.strip().splitlines() or ["no output"])[-1]
        print(f"FAILED {run.name}, exit code {process.returncode}: {last} (see {run.folder / 'log.txt'})", flush=True)


def _identity(run: Run) -> Row:
    """The columns by which rows are told apart, with the values in effect."""
    return {
        "run": run.name,
        "method": run.spec.method,
        "budget": run.spec.budget,
        "length": run.spec.length,
        "seed": run.spec.seed,
        "density": run.training.sparsity.density,
        **run.outline.shape,
        "sparsity_method": run.training.sparsity.method,
        "learning_rate": run.training.learning_rate,
    }


def _row(run: Run) -> Row | None:
    for name in ("result.json", "failure.json"):
        if (run.folder / name).exists():
            return json.loads((run.folder / name).read_text(encoding="utf-8"))
    return None


def _rows(runs: Sequence[Run]) -> list[Row]:
    return [row for row in map(_row, runs) if row is not None]


def _restore(folder: Path) -> list[Row]:
    """Puts the finished rows of `results.jsonl` back where their runs left them, if they are gone from there; returns
    all rows of the file."""
    file = folder / "results.jsonl"
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            name, finished = row["run"], row["status"] == "finished"
        except (ValueError, TypeError, KeyError):
            name, finished = "", False
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise ValueError(f"{file}, line {number}: {line[:80]!r} is not a study's row; restore or delete the file")
        result = folder / "runs" / name / "result.json"
        if finished and not result.exists():
            result.parent.mkdir(parents=True, exist_ok=True)
            _write(result, json.dumps(row))
        rows.append(row)
    return rows


def _write_results(folder: Path, rows: Sequence[Row]) -> None:
    _write(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """The file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir={str(folder)!r}: another process runs this study; wait or stop it") from None
        yield
