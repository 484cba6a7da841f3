# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs ONNX models in DeepSparse for `engines.py`, in an environment of its own (docs/engines.md).

Reads orders, a line of JSON each: `{"load": path, "batch": n, "shape": [channels, height, width], "threads": n}` loads
a model and answers what it predicts, `{"run": k}` runs the k-th model loaded since the last `{"clear": true}`.
"""

import json
import os
import sys
from typing import Any

import deepsparse
import numpy as np


def main() -> None:
    """Answer until the input ends."""
    # The engine prints a greeting: answers take the place where it would.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines: list[tuple[Any, list[np.ndarray]]] = []
    for line in sys.stdin:
        order = json.loads(line)
        answer = {}
        if "load" in order:
            batch, shape = order["batch"], order["shape"]
            engine = deepsparse.Engine(model=order["load"], batch_size=batch, num_cores=order["threads"])
            inputs = [np.random.default_rng(0).standard_normal((batch, *shape), np.float32)]
            engines.append((engine, inputs))
            answer = {"version": deepsparse.__version__, "logits": engine.run(inputs)[0].tolist()}
        elif "run" in order:
            engine, inputs = engines[order["run"]]
            engine.run(inputs)
        else:
            engines.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
