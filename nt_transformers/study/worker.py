# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""One run of a study, in a process of its own: `python -m nt_transformers.study.worker FOLDER`.

Reads `run.json` in FOLDER, trains (or continues), measures the test documents once and leaves `result.json`. Ends when
its standard input closes: a run does not outlive the study that started it.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..analysis import mask_overlap, score_language_model, weight_masks
from ..data import TokenSequences, load_documents, load_tokenizer
from ..training import TextTrainingConfig, build_config, train_language_model


# What of an evaluation makes the curves of a report.
CURVE = (
    "step",
    "tokens",
    "eval_loss",
    "eval_perplexity",
    "eval_disagreement",
    "eval_ambiguity",
    "density",
    "explored",
    "mask_overlap",
)


def main() -> None:
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    run_in(Path(sys.argv[1]))


def run_in(folder: Path) -> dict[str, Any]:
    """Does the run that `run.json` describes and returns the row that it adds to the results."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    training = build_config(TextTrainingConfig, run["training"])
    start = time.perf_counter()
    summary = train_language_model(training)
    row = {
        **run["row"],
        "status": "finished",
        "seconds": round(time.perf_counter() - start, 1),
        **{name: value for name, value in summary.items() if name not in ("config", "density")},
        "curve": _curve(folder),
    }
    if run["test"] is not None:
        row |= _test_figures(folder, run["test"], training)
    partial = folder / "result.partial"
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(folder / "result.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def _test_figures(folder: Path, test: str, training: TextTrainingConfig) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sequences = TokenSequences(
        load_documents(test, "test"),
        load_tokenizer(str(folder)),
        sequence_length=training.data.sequence_length,
        batch_size=training.per_device_batch_size,
        packing=training.data.packing,
        training=False,
    )
    figures = score_language_model(model, sequences).language_figures(model.config.vote)
    figures = {name.replace("eval_", "test_", 1): value for name, value in figures.items()}
    return {**figures, "mask_overlap_pairs": mask_overlap(weight_masks(model)).tolist()}


def _curve(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: line[name] for name in CURVE if name in line} for line in lines if "eval_loss" in line]


def _end_with_the_study() -> None:
    # Not through sys.stdin: a thread that waits there aborts the interpreter's own end.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
