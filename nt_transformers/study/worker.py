# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""One run of a study, in a process of its own: `python -m nt_transformers.study.worker FOLDER`.

Reads `run.json` in FOLDER, trains (or continues), measures on test data once and leaves `result.json`. Ends when its
standard input closes: a run does not outlive the study that started it.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..training import build_config
from .kind import Kind, kind_of


SECONDS_BETWEEN_NOTES = 1.0


def main() -> None:
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    run_in(Path(sys.argv[1]))


def run_in(folder: Path) -> dict[str, Any]:
    """Does the run that `run.json` describes and returns the row that it adds to the results."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kind = kind_of(run["kind"])
    training = build_config(kind.config_class, run["training"])
    stopwatch = Stopwatch(folder / "seconds")
    summary = kind.train(training, final=run["test"] is not None)
    row = {
        **run["row"],
        "status": "finished",
        "seconds": round(stopwatch.seconds, 1),
        **{name: value for name, value in summary.items() if name not in ("config", "density")},
        "curve": _curve(folder, kind),
    }
    if run["test"] is not None:
        row |= kind.test(folder, training, run["test"])
    partial = folder / "result.partial"
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(folder / "result.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


class Stopwatch:
    """Seconds since its start, and those that earlier processes of the run noted in the same file.

    A background thread notes them, so that no more than `SECONDS_BETWEEN_NOTES` are lost by a kill.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = float(file.read_text()) if file.exists() else 0.0
        self.start = time.perf_counter()
        threading.Thread(target=self._keep_notes, daemon=True).start()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def _keep_notes(self) -> None:
        partial = self.file.with_suffix(".partial")
        while True:
            partial.write_text(str(self.seconds))
            partial.replace(self.file)
            time.sleep(SECONDS_BETWEEN_NOTES)


def _curve(folder: Path, kind: Kind) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: line[name] for name in kind.curve if name in line} for line in lines if kind.loss in line]


def _end_with_the_study() -> None:
    # Not through sys.stdin: a thread that waits there aborts the interpreter's own end.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
