# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains by DDP and by FSDP2 on text, from a checkpoint, and on images; resumes each run after its second checkpoint.

Usage: torchrun --nproc_per_node 2 training_runs.py FOLDER CORPUS TOKENIZER DENSE IMAGES
Leaves FOLDER/<engine>_<kind>, FOLDER/<engine>_<kind>_resumed, FOLDER/fsdp_<kind>_bf16, and FOLDER/buffers_<rank>.pt.
"""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from nt_transformers.data import TextDataConfig
from nt_transformers.data.images import ImageDataConfig
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import (
    ContinuedTextTrainingConfig,
    LlamaArguments,
    PretrainedArguments,
    TextTrainingConfig,
    train_language_model,
)
from nt_transformers.training.state import share_buffers
from nt_transformers.training.vision import ClassifierArguments, VisionTrainingConfig, train_image_classifier


sys.path.append(str(Path(__file__).parents[1]))

from runs import copy_stopped


STOP = 4
ENGINES = ("ddp", "fsdp")


class Sources(NamedTuple):
    """What the runs read: folders of texts, of a tokenizer, of a dense LLaMA, of images."""

    corpus: str
    tokenizer: str
    dense: str
    images: str


class ShardingAccelerator(Accelerator):
    """accelerate takes FSDP2 on CPUs for DDP; told by hand, it shards model and optimizer as on GPUs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)


def topology(**fields: Any) -> SparsityConfig:
    return SparsityConfig(**{"density": 0.5, "update_interval": 2, "stop_fraction": 1.0} | fields)


def text(sources: Sources, **fields: Any) -> dict[str, Any]:
    data = {"train": sources.corpus, "tokenizer": sources.tokenizer, "sequence_length": 16, "eval_tokens": 300}
    return {"data": TextDataConfig(**data, num_workers=0, **fields), "max_grad_norm": 0.5, "learning_rate": 1e-2}


SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPLIT = {"num_ensemble_heads": 2, "num_head_layers": 1}


def padded(sources: Sources, **fields: Any) -> TextTrainingConfig:
    model = LlamaArguments(**SHAPE, **SPLIT)
    return TextTrainingConfig(model=model, sparsity=topology(method="rigl"), **text(sources) | fields)


def streamed(sources: Sources, **fields: Any) -> TextTrainingConfig:
    data = text(sources, streaming=True, packing=True)
    model = LlamaArguments(**SHAPE, **SPLIT)
    return TextTrainingConfig(model=model, sparsity=topology(method="neurotrails_llm"), **data | fields)


def continued(sources: Sources, **fields: Any) -> ContinuedTextTrainingConfig:
    model = PretrainedArguments(from_pretrained=sources.dense, **SPLIT, noise=0.1)
    return ContinuedTextTrainingConfig(model=model, sparsity=topology(method="rigl"), **text(sources) | fields)


def images(sources: Sources, model_type: str, shape: dict[str, Any], **fields: Any) -> VisionTrainingConfig:
    data = {"train": sources.images, "test_split": "val", "validation_size": 6, "image_size": 16, "crop": "resized"}
    optimizer = {"optimizer": "sgd", "learning_rate": 0.05, "lr_schedule": "multistep"}
    split = {"model_type": f"neurotrails_{model_type}", "num_ensemble_heads": 2, "num_head_blocks": 1}
    return VisionTrainingConfig(
        model=ClassifierArguments(**split, shape=shape),
        data=ImageDataConfig(**data, mixup=0.2, num_workers=0),
        sparsity=topology(method="neurotrails_vision"),
        **optimizer | fields,
    )


def wide_resnet(sources: Sources, **fields: Any) -> VisionTrainingConfig:
    return images(sources, "wide_resnet", {"depth": 10, "widen_factor": 1}, **fields)


def resnet(sources: Sources, **fields: Any) -> VisionTrainingConfig:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return images(sources, "resnet", shape, **fields)


def vit(sources: Sources, **fields: Any) -> VisionTrainingConfig:
    return images(sources, "vit", {**SHAPE, "patch_size": 8}, **fields)


TEXT: dict[str, Callable[..., Any]] = {"padded": padded, "streamed": streamed, "continued": continued}
IMAGES: dict[str, Callable[..., Any]] = {"wide_resnet": wide_resnet, "resnet": resnet, "vit": vit}
KINDS = TEXT | IMAGES
BF16 = ("padded", "vit")


def train(kind: str, folder: Path, sources: Sources, **fields: Any) -> None:
    """Trains a network of that kind; `folder` is continued if it holds checkpoints."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "global_batch_size": 8,
        "per_device_batch_size": 2,
        "logging_steps": 3,
        "eval_steps": 4,
        "checkpoint_steps": 2,
        "keep_last": 100,
        "resume_from_checkpoint": "latest",
        "mixed_precision": "no",
    }
    run: Callable[..., Any] = train_language_model if kind in TEXT else train_image_classifier
    run(KINDS[kind](sources, **defaults | fields))


def save_buffers(folder: Path, rank: int) -> None:
    """Saves the running means that a process has of its own once they are shared."""
    network = torch.nn.BatchNorm1d(3)
    network(torch.arange(12.0).reshape(4, 3) + 100 * rank)
    share_buffers(network)
    torch.save(network.state_dict(), folder / f"buffers_{rank}.pt")


def main() -> None:
    folder, sources = Path(sys.argv[1]), Sources(*sys.argv[2:])
    save_buffers(folder, Accelerator().process_index)
    runs = [
        (engine, kind, f"{engine}_{kind}{suffix}")
        for engine in ENGINES
        for kind in KINDS
        for suffix in ("", "_resumed")
    ]
    runs += [("fsdp", kind, f"fsdp_{kind}_bf16") for kind in BF16]
    for engine, kind, name in runs:
        with ExitStack() as stack:
            if name != runs[-1][2]:
                # The next run takes the process group over; the last one ends it as any run does.
                stack.enter_context(patch.object(Accelerator, "end_training"))
            if engine == "fsdp":
                stack.enter_context(patch("nt_transformers.training.engine.Accelerator", ShardingAccelerator))
            if name.endswith("_resumed"):
                if os.environ["RANK"] == "0":
                    copy_stopped(folder / name.removesuffix("_resumed"), folder / name, STOP)
                torch.distributed.barrier()
            train(kind, folder / name, sources, mixed_precision="bf16" if name.endswith("_bf16") else "no")
            AcceleratorState._reset_state()


if __name__ == "__main__":
    main()
