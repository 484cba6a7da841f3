# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Images per second on CPUs: sparse image classifiers in the engines of others, against dense networks.

    python benchmarks/engines.py --models FOLDER [--deepsparse PYTHON] [--quick] [--json FILE] [--table FILE.md]

ResNet-50 on images of 224 x 224 and WRN-28-10 on 32 x 32, random weights, exported to ONNX into FOLDER, where they are
kept for the next time: the single dense network, the full ensemble of three, and NeuroTrails with the published split
(three heads) at densities 0.1, 0.2 and 0.3. They run in ONNX Runtime, in OpenVINO where that is installed, and in
DeepSparse by the interpreter of its own environment (docs/engines.md). Figures, for batches of 1 and 16:

    <family>_batch<n>_<network>_<engine>_images_per_s
    <family>_batch<n>_<network>_<engine>_over_dense_single        over the dense single network in ONNX Runtime
    <family>_batch<n>_<network>_<engine>_over_full_ensemble       over the full ensemble in ONNX Runtime
    <family>_batch<n>_<network>_<engine>_difference               of the logits from ONNX Runtime's, of the largest one
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from harness import parse_args, report, time_interleaved
from transformers import PreTrainedModel

from nt_transformers import (
    NeuroTrailsResNetConfig,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsWideResNetConfig,
    NeuroTrailsWideResNetForImageClassification,
)
from nt_transformers.inference.onnx import export_onnx


DENSITIES = (0.1, 0.2, 0.3)
NETWORKS = ("dense_single", "full_ensemble", *(f"neurotrails_{density}" for density in DENSITIES))
# [image size, blocks, blocks in each head of NeuroTrails]
FAMILIES = {"resnet50": (224, 16, 10), "wrn28_10": (32, 12, 8)}
WORKER = Path(__file__).with_name("deepsparse_worker.py")


@dataclass(frozen=True)
class Loaded:
    """A function that predicts for a batch of images, and what it predicts."""

    run: Callable[[], object]
    logits: np.ndarray


class Engine(Protocol):
    """Loads exported models, each for one size of batch."""

    version: str

    def load(self, path: Path, batch: int, image_size: int) -> Loaded:
        """The model for `images(batch, image_size)`."""

    def clear(self) -> None:
        """Frees what was loaded."""


class OnnxRuntime:
    """ONNX Runtime, which the others are compared with."""

    version = onnxruntime.__version__

    def __init__(self, threads: int) -> None:
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        # Threads that wait actively would take the cores from the engine that runs next.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def load(self, path: Path, batch: int, image_size: int) -> Loaded:
        session = onnxruntime.InferenceSession(str(path), self.options, providers=["CPUExecutionProvider"])
        inputs = {"pixel_values": images(batch, image_size)}
        return Loaded(lambda: session.run(None, inputs), session.run(None, inputs)[0])

    def clear(self) -> None:
        pass


class OpenVino:
    """OpenVINO in float32."""

    def __init__(self, threads: int) -> None:
        import openvino

        self.core, self.threads = openvino.Core(), threads
        self.version = importlib.metadata.version("openvino")

    def load(self, path: Path, batch: int, image_size: int) -> Loaded:
        model = self.core.read_model(path)
        model.reshape([batch, 3, image_size, image_size])
        options = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = self.core.compile_model(model, "CPU", options).create_infer_request()
        inputs = {0: images(batch, image_size)}
        return Loaded(lambda: request.infer(inputs), request.infer(inputs)[0].copy())

    def clear(self) -> None:
        pass


class DeepSparse:
    """DeepSparse in a process of its own, by another Python."""

    version = ""

    def __init__(self, python: Path, threads: int) -> None:
        self.process = subprocess.Popen([python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads, self.loaded = threads, 0

    def load(self, path: Path, batch: int, image_size: int) -> Loaded:
        shape = [3, image_size, image_size]
        answer = self._ask({"load": str(path), "batch": batch, "shape": shape, "threads": self.threads})
        self.version = answer["version"]
        order = {"run": self.loaded}
        self.loaded += 1
        return Loaded(lambda: self._ask(order), np.array(answer["logits"]))

    def clear(self) -> None:
        self._ask({"clear": True})
        self.loaded = 0

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"DeepSparse ended at {order}; what it wrote is above")
        return json.loads(answer)


def images(batch: int, size: int) -> np.ndarray:
    """[batch, 3, size, size]"""
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)


def network(family: str, name: str) -> PreTrainedModel:
    """A network with random weights, of which the share that its name tells is not zero."""
    _, blocks, head_blocks = FAMILIES[family]
    split = {"num_ensemble_heads": 3, "num_head_blocks": head_blocks}
    if name == "dense_single":
        split["num_ensemble_heads"] = 1
    if name == "full_ensemble":
        split["num_head_blocks"] = blocks
    torch.manual_seed(0)
    model = (
        NeuroTrailsResNetForImageClassification(NeuroTrailsResNetConfig(num_labels=1000, **split))
        if family == "resnet50"
        else NeuroTrailsWideResNetForImageClassification(NeuroTrailsWideResNetConfig(num_labels=100, **split))
    ).eval()
    density = float(name.rpartition("_")[2]) if name.startswith("neurotrails") else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand_like(parameter) < density)
    return model


def exported(folder: Path, family: str, name: str) -> Path:
    """The network as a file, written now if it is not there."""
    path = folder / f"{family}_{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        export_onnx(network(family, name), path, image_size=FAMILIES[family][0])
    return path


def measure(
    family: str, batch: int, paths: dict[str, Path], engines: dict[str, Engine], rounds: int
) -> dict[str, float]:
    """Figures of all networks in all engines."""
    loaded = {
        f"{name}_{engine}": engines[engine].load(path, batch, FAMILIES[family][0])
        for name, path in paths.items()
        for engine in engines
    }
    seconds = time_interleaved({name: one.run for name, one in loaded.items()}, rounds)
    figures = {f"{name}_images_per_s": batch / duration for name, duration in seconds.items()}
    for name in paths:
        expected = loaded[f"{name}_onnxruntime"].logits
        for engine in engines:
            difference = np.abs(loaded[f"{name}_{engine}"].logits - expected).max() / np.abs(expected).max()
            figures[f"{name}_{engine}_difference"] = float(difference)
    for name, duration in seconds.items():
        for baseline in ("dense_single", "full_ensemble"):
            figures[f"{name}_over_{baseline}"] = seconds[f"{baseline}_onnxruntime"] / duration
    del loaded
    for used in engines.values():
        used.clear()
    return {f"{family}_batch{batch}_{name}": value for name, value in figures.items()}


def table(figures: dict[str, float], families: list[str], batches: list[int], engines: dict[str, Engine]) -> str:
    """Images per second and, in brackets, times the dense single network and the full ensemble in ONNX Runtime."""
    names = [f"{engine} {engines[engine].version}" for engine in engines]
    lines = [f"| | batch | network | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for family in families:
        for batch in batches:
            for name in NETWORKS:
                keys = [f"{family}_batch{batch}_{name}_{engine}" for engine in engines]
                cells = [
                    f"{figures[f'{key}_images_per_s']:.1f} ({figures[f'{key}_over_dense_single']:.2f}, "
                    f"{figures[f'{key}_over_full_ensemble']:.2f})"
                    for key in keys
                ]
                lines.append(f"| {family} | {batch} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time everything in turn and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, metavar="FOLDER", help="where the exported models are")
    parser.add_argument(
        "--deepsparse", type=Path, metavar="PYTHON", help="interpreter of an environment with DeepSparse"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the figures as a table")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this (may be given again)")
    parser.add_argument("--batch", action="append", type=int, help="only this size (may be given again)")
    parser.add_argument("--export_only", action="store_true", help="write the models and end")
    args = parse_args(parser)
    families = args.family or list(FAMILIES)
    paths = {family: {name: exported(args.models, family, name) for name in NETWORKS} for family in families}
    if args.export_only:
        return
    engines: dict[str, Engine] = {"onnxruntime": OnnxRuntime(args.threads)}
    if importlib.util.find_spec("openvino"):
        engines["openvino"] = OpenVino(args.threads)
    if args.deepsparse is not None:
        engines["deepsparse"] = DeepSparse(args.deepsparse, args.threads)
    batches = args.batch or ([1] if args.quick else [1, 16])
    figures: dict[str, float] = {}
    for family in families:
        for batch in batches:
            rounds = 3 if args.quick else 9 if batch == 1 else 3
            figures |= measure(family, batch, paths[family], engines, rounds)
    if args.table is not None:
        args.table.write_text(table(figures, families, batches, engines))
    report(figures, args)


if __name__ == "__main__":
    main()
