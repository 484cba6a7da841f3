# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A run killed again and again, restarted each time, against the run that was never killed.

    python benchmarks/soak.py [--kills N] [--seed N] [--quick] [--json FILE]

A tiny NeuroTrails LLaMA trains with a topology update and a checkpoint every second step. SIGKILL ends it at random
moments: every other one while a checkpoint or the final export is being written, the rest anywhere from the start of
the process on. Each time it is started again with the same configuration (`resume_from_checkpoint: latest`). Runs that
reach their end before the kills are used up are compared and followed by another.

Every life of a run is a process of its own, forked from this one, which has imported everything but never used torch:
a start takes tenths of a second instead of many seconds, and no thread is lost in the fork.

    weights_differ, training_state_differs, metrics_differ, leftover_files    must be 0, counted over all runs
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import parse_args, report
from tiny_run import prepare

from nt_transformers.data import TextDataConfig
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import LlamaArguments, TextTrainingConfig, train_language_model
from nt_transformers.training.metrics import TIMING_FIELDS


KILLS, QUICK_KILLS = 50, 8


def start(function: Callable[[], object], log: Path) -> int:
    """Runs `function` in a forked process, its output appended to `log`; returns the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, log: Path) -> None:
    """Waits for a process that has to succeed."""
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a process that nobody killed ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()}")


def train(fields: dict[str, Any], output_dir: Path) -> None:
    """One life of a run."""
    config = TextTrainingConfig(
        **fields
        | {
            "output_dir": str(output_dir),
            "resume_from_checkpoint": "latest",
            "sparsity": SparsityConfig(**fields["sparsity"]),
            "model": LlamaArguments(**fields["model"]),
            "data": TextDataConfig(**fields["data"]),
        }
    )
    train_language_model(config)


def is_writing(output_dir: Path) -> bool:
    """Whether a checkpoint or the export is being written, or an old checkpoint removed."""
    return any(output_dir.glob("checkpoints/*.partial")) or any(output_dir.glob("*.partial"))


def ended(child: int, log: Path) -> bool:
    """Whether the process has ended by itself; it has to have succeeded then."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        sys.exit(f"a process that nobody killed ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()}")
    return done != 0


def kill_at_random(child: int, output_dir: Path, log: Path, seconds: float, rng: random.Random, writing: bool) -> bool:
    """Kills the process within `seconds` (then, if asked, when it next writes); False if it ended before."""
    moment = time.monotonic() + rng.uniform(0, seconds)
    while time.monotonic() < moment or (writing and not is_writing(output_dir)):
        if ended(child, log):
            return False
        time.sleep(0.0002)
    if writing:
        time.sleep(rng.uniform(0, 0.02))
    if ended(child, log):
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in lines]


def compare(run: Path, reference: Path, steps: int) -> dict[str, int]:
    """What differs between a run that was killed and the one that was not: 0 or 1 each, and the files left over."""
    state = f"checkpoints/step_{steps}/training.pt"
    return {
        "weights_differ": int(
            (run / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes()
        ),
        "training_state_differs": int((run / state).read_bytes() != (reference / state).read_bytes()),
        "metrics_differ": int(metrics(run) != metrics(reference)),
        "leftover_files": len(list(run.rglob("*.partial*"))),
    }


def main() -> None:
    """Kill, restart, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, help=f"default: {KILLS}, with --quick {QUICK_KILLS}")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parse_args(parser)
    wanted = args.kills or (QUICK_KILLS if args.quick else KILLS)
    rng = random.Random(args.seed)
    counts = dict.fromkeys(
        (
            "kills",
            "kills_while_writing",
            "runs",
            "weights_differ",
            "training_state_differs",
            "metrics_differ",
            "leftover_files",
        ),
        0,
    )
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, log = Path(name), Path(name) / "log.txt"
        os.environ["HF_HOME"] = str(folder / "cache")
        begin = time.monotonic()
        wait(start(lambda: (folder / "fields.json").write_text(json.dumps(prepare(folder))), log), log)
        fields = json.loads((folder / "fields.json").read_text())
        reference = folder / "reference"
        wait(start(lambda: train(fields, reference), log), log)
        # Again, now that the corpus is in the cache: how long a life lasts.
        life = time.monotonic()
        wait(start(lambda: train(fields, folder / "again"), log), log)
        life = time.monotonic() - life
        while counts["kills"] < wanted:
            run = folder / f"run_{counts['runs']}"
            finished = False
            while not finished:
                child = start(lambda: train(fields, run), log)  # noqa: B023
                if counts["kills"] == wanted:
                    wait(child, log)
                    break
                finished = not kill_at_random(child, run, log, life / 2, rng, writing=counts["kills"] % 2 == 1)
                if not finished:
                    counts["kills"] += 1
                    counts["kills_while_writing"] += is_writing(run)
            counts["runs"] += 1
            for figure, value in compare(run, reference, fields["max_steps"]).items():
                counts[figure] += value
        report({**counts, "seconds": time.monotonic() - begin}, args)
    if any(
        counts[figure] for figure in ("weights_differ", "training_state_differs", "metrics_differ", "leftover_files")
    ):
        sys.exit("the killed runs differ from the one that was not")


if __name__ == "__main__":
    main()
