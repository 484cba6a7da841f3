# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of training steps, each in a fresh process, and what the planner says of it.

    python benchmarks/memory.py [--quick] [--json FILE] [--llama-350m | --images]

Two steps (forward, backward, fused Adam, sparsifier) of 8 x 256 tokens, vocabulary 32000, float32. NeuroTrails has
hidden size 256, 8 layers, 5 of them in each of 3 heads: 47M parameters. Against a single network of as many
parameters, once of the same width and so deeper, once of the same depth and so wider:

    three_heads_over_one = neurotrails / deeper
    three_heads_over_one_wider = neurotrails / wider

and against a full ensemble: 3 stock LLaMAs of 8 layers in turn, each with its own optimizer.

Memory is the peak resident set, imports included (`imports_gb`), in an environment where glibc returns what is freed.
`planned_over_measured_*` compares the planner's total with the peak less the imports. `--llama-350m` measures, instead
of all this, one step of LLaMA-350M with 3 heads of 16 layers, batch 2 x 256: it needs 20 GB. `--images` compares plan
and peak for classifiers with three heads, SGD with momentum and density 0.2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import parse_args, report
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from nt_transformers.data import TextDataConfig
from nt_transformers.data.images import ImageDataConfig
from nt_transformers.models import NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig
from nt_transformers.training import LlamaArguments, TextTrainingConfig
from nt_transformers.training.config import TrainingConfig
from nt_transformers.training.optimization import build_optimizer
from nt_transformers.training.plan import Hardware
from nt_transformers.training.vision import ClassifierArguments, VisionTrainingConfig


# The second step meets the optimizer's state.
STEPS = 2
SMALL = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_ensemble_heads": 3,
    "num_head_layers": 5,
}
SINGLE = SMALL | {"num_ensemble_heads": 1}
LLAMA_350M = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_ensemble_heads": 3,
    "num_head_layers": 16,
}
RUNS: dict[str, dict[str, Any]] = {
    "neurotrails": {"model": SMALL},
    "neurotrails_plain": {"model": SMALL, "headwise_backward": False},
    "neurotrails_checkpointing_heads": {
        "model": SMALL,
        "activation_checkpointing": "heads",
        "headwise_backward": False,
    },
    "neurotrails_checkpointing_all": {"model": SMALL, "activation_checkpointing": "all"},
    "deeper": {"model": SINGLE | {"num_hidden_layers": 39}},
    "wider": {"model": SINGLE | {"hidden_size": 440, "intermediate_size": 1184}},
}

IMAGE_RUNS: dict[str, dict[str, Any]] = {
    "wide_resnet_10_2": {
        "model": {
            "model_type": "neurotrails_wide_resnet",
            "num_head_blocks": 2,
            "shape": {"depth": 10, "widen_factor": 2},
        },
        "image_size": 32,
        "batch_size": 128,
        "channels_last": True,
    },
    "resnet_50": {
        "model": {"model_type": "neurotrails_resnet", "num_head_blocks": 8},
        "image_size": 224,
        "batch_size": 16,
        "channels_last": True,
    },
    "vit_small": {
        "model": {
            "model_type": "neurotrails_vit",
            "num_head_blocks": 8,
            "shape": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
        },
        "image_size": 224,
        "batch_size": 16,
    },
}


def training_config(model: dict[str, Any], batch_size: int = 8, **options: Any) -> TextTrainingConfig:
    """A run of `STEPS` steps; its data are not read."""
    return TextTrainingConfig(
        output_dir="unused",
        model=LlamaArguments(**model),
        data=TextDataConfig(train="unused", tokenizer="unused", sequence_length=256),
        sparsity=SparsityConfig(method="neurotrails_llm", update_interval=1, drop_schedule="constant"),
        max_steps=STEPS,
        global_batch_size=batch_size,
        per_device_batch_size=batch_size,
        **options,
    )


def train(config: TextTrainingConfig) -> None:
    """The steps of the run on random tokens."""
    model = NeuroTrailsLlamaForCausalLM(config.model.outline("unused")).train()
    config.prepare(model)
    tokens = torch.randint(model.config.vocab_size, (config.per_device_batch_size, config.data.sequence_length))
    take_steps(model, config, lambda: config.loss(model, alone=True, input_ids=tokens, labels=tokens)[0])


def take_steps(model: torch.nn.Module, config: TrainingConfig, loss: Callable[[], torch.Tensor]) -> None:
    """The steps of a run, with a topology update after the first."""
    optimizer = build_optimizer(model, config)
    sparsifier = Sparsifier(model, optimizer, config.sparsity, total_steps=STEPS)
    for _ in range(STEPS):
        loss().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def image_config(
    folder: str, model: dict[str, Any], image_size: int, batch_size: int, **options: Any
) -> VisionTrainingConfig:
    """A run of `STEPS` steps on ten classes; of the folder only the names of the classes are read."""
    return VisionTrainingConfig(
        output_dir="unused",
        model=ClassifierArguments(**model),
        data=ImageDataConfig(train=folder, image_size=image_size),
        sparsity=SparsityConfig(method="neurotrails_vision", density=0.2, update_interval=1, drop_schedule="constant"),
        optimizer="sgd",
        momentum=0.9,
        max_steps=STEPS,
        global_batch_size=batch_size,
        per_device_batch_size=batch_size,
        **options,
    )


def train_images(config: VisionTrainingConfig) -> None:
    """The steps of the run on random images."""
    classes = config.data.class_names()
    model = config.model.build(config.data, classes).train()
    torch.nn.Module.to(model, memory_format=config.memory_format)
    shape = config.per_device_batch_size, config.data.num_channels, config.data.image_size, config.data.image_size
    images = torch.randn(shape).contiguous(memory_format=config.memory_format)
    labels = torch.eye(len(classes))[torch.randint(len(classes), (len(images),))]
    take_steps(model, config, lambda: model(images, labels=labels).loss)


@contextmanager
def ten_classes() -> Iterator[str]:
    """A folder of ten class folders with an image each."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(10):
            (Path(folder) / f"class_{number}").mkdir()
            Image.new("RGB", (8, 8)).save(Path(folder) / f"class_{number}" / "image.png")
        yield folder


def train_separate_models() -> None:
    """A full ensemble as a plain loop over stock models."""
    shape = {name: value for name, value in SMALL.items() if name in LlamaConfig().to_dict()}
    models = [LlamaForCausalLM(LlamaConfig(**shape)) for _ in range(SMALL["num_ensemble_heads"])]
    optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in models]
    tokens = torch.randint(SMALL["vocab_size"], (8, 256))
    for _ in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def child(name: str) -> None:
    """Prints the peak in GB after imports and after training."""
    imports = peak_gb()
    if name == "separate_models":
        train_separate_models()
    elif name == "llama_350m":
        train(training_config(LLAMA_350M, batch_size=2))
    elif name in IMAGE_RUNS:
        with ten_classes() as folder:
            train_images(image_config(folder, **IMAGE_RUNS[name]))
    else:
        train(training_config(**RUNS[name]))
    print(json.dumps([imports, peak_gb()]))


def peak_gb() -> float:
    """Peak resident set of this process in 10^9 bytes."""
    # Not ru_maxrss, which a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def measure(name: str, threads: int) -> list[float]:
    """What `child` prints, in a fresh process."""
    command = [sys.executable, __file__, "--child", name, "--threads", str(threads)]
    # Lets glibc return what is freed: the peak is then what was alive, not how it happened to be laid out.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def image_figures(threads: int) -> dict[str, float]:
    """The plan over the measured peak, and that peak, of every classifier."""
    figures = {}
    with ten_classes() as folder:
        for name, options in IMAGE_RUNS.items():
            planned = image_config(folder, **options).plan(Hardware(num_processes=1)).memory.total / 1e9
            imports, peak = measure(name, threads)
            figures |= {f"planned_over_measured_{name}": planned / (peak - imports), f"{name}_gb": peak}
    return figures


def main() -> None:
    """Measure every run once: a peak hardly varies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama-350m", action="store_true", help="measure LLaMA-350M instead; needs 20 GB")
    parser.add_argument("--images", action="store_true", help="measure image classifiers instead")
    parser.add_argument("--child", metavar="RUN", help=argparse.SUPPRESS)
    args = parse_args(parser)
    if args.child:
        child(args.child)
        return
    if args.llama_350m:
        report({"llama_350m_step_peak_gb": measure("llama_350m", args.threads)[1]}, args)
        return
    if args.images:
        report(image_figures(args.threads), args)
        return
    peaks = {name: measure(name, args.threads) for name in [*RUNS, "separate_models"]}
    planned = {
        name: training_config(**options).plan(Hardware(num_processes=1)).memory.total / 1e9
        for name, options in RUNS.items()
    }
    report(
        {
            "three_heads_over_one": peaks["neurotrails"][1] / peaks["deeper"][1],
            "three_heads_over_one_wider": peaks["neurotrails"][1] / peaks["wider"][1],
            "neurotrails_over_separate_models": peaks["neurotrails"][1] / peaks["separate_models"][1],
            **{f"planned_over_measured_{name}": planned[name] / (peaks[name][1] - peaks[name][0]) for name in planned},
            **{f"{name}_gb": peak for name, (_, peak) in peaks.items()},
            "imports_gb": peaks["neurotrails"][0],
        },
        args,
    )


if __name__ == "__main__":
    main()
