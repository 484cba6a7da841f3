# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs ONNX models in DeepSparse for `engines.py`, in an environment of its own (docs/engines.md).

Reads lines of JSON: `{"load": path, "batch": n, "shape": [channels, height, width]}` loads a model in place of any
other, `{"run": k}` runs the k-th model that was loaded since the last `{"clear": true}`. Answers each by a line.
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
        answer = ""
        if "load" in order:
            batch, shape = order["batch"], order["shape"]
            engine = deepsparse.Engine(model=order["load"], batch_size=batch, num_cores=order["threads"])
            engines.append((engine, [np.zeros((batch, *shape), np.float32)]))
            answer = deepsparse.__version__
        elif "run" in order:
            engine, inputs = engines[order["run"]]
            engine.run(inputs)
        else:
            engines.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
