# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains on text by DDP and by FSDP2, and resumes those runs after their second checkpoint.

Usage: torchrun --nproc_per_node 2 text_runs.py FOLDER CORPUS TOKENIZER
Leaves FOLDER/<engine>_<data>, FOLDER/<engine>_<data>_resumed, FOLDER/fsdp_padded_bf16, and FOLDER/buffers_<rank>.pt.
"""

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from nt_transformers.data import TextDataConfig
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import LlamaArguments, TextTrainingConfig, train_language_model
from nt_transformers.training.state import share_buffers


STOP = 4
DATA: dict[str, dict[str, Any]] = {
    "padded": {},
    "streamed": {"streaming": True, "packing": True},
}
SPARSITY: dict[str, dict[str, Any]] = {"padded": {"method": "rigl"}, "streamed": {"method": "neurotrails_llm"}}


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


def config(folder: Path, corpus: str, tokenizer: str, data: str, **fields: Any) -> TextTrainingConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "global_batch_size": 8,
        "per_device_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 3,
        "eval_steps": 4,
        "checkpoint_steps": 2,
        "keep_last": 100,
        "resume_from_checkpoint": "latest",
    }
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_ensemble_heads": 2,
        "num_head_layers": 1,
    }
    text = {
        "train": corpus,
        "tokenizer": tokenizer,
        "sequence_length": 16,
        "eval_tokens": 300,
        "num_workers": 0,
        **DATA[data],
    }
    topology = {"density": 0.5, "update_interval": 2, "stop_fraction": 1.0, **SPARSITY[data]}
    return TextTrainingConfig(
        model=LlamaArguments(**shape),
        data=TextDataConfig(**text),
        sparsity=SparsityConfig(**topology),
        **defaults | fields,
    )


def copy_checkpoints(source: Path, target: Path) -> None:
    """Copies what a crash after the second checkpoint and some more steps would leave."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > STOP:
            shutil.rmtree(folder)


def save_buffers(folder: Path, rank: int) -> None:
    """Saves the running means that a process has of its own once they are shared."""
    network = torch.nn.BatchNorm1d(3)
    network(torch.arange(12.0).reshape(4, 3) + 100 * rank)
    share_buffers(network)
    torch.save(network.state_dict(), folder / f"buffers_{rank}.pt")


def main() -> None:
    folder, corpus, tokenizer = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    save_buffers(folder, Accelerator().process_index)
    runs = [
        (engine, data, f"{engine}_{data}{suffix}")
        for engine in ("ddp", "fsdp")
        for data in DATA
        for suffix in ("", "_resumed")
    ]
    runs.append(("fsdp", "padded", "fsdp_padded_bf16"))
    for engine, data, name in runs:
        with ExitStack() as stack:
            if name != runs[-1][2]:
                # The next run takes the process group over; the last one ends it as any run does.
                stack.enter_context(patch.object(Accelerator, "end_training"))
            if engine == "fsdp":
                stack.enter_context(patch("nt_transformers.training.engine.Accelerator", ShardingAccelerator))
            if name.endswith("_resumed"):
                if os.environ["RANK"] == "0":
                    copy_checkpoints(folder / name.removesuffix("_resumed"), folder / name)
                torch.distributed.barrier()
            precision = "bf16" if name.endswith("_bf16") else "no"
            train_language_model(config(folder / name, corpus, tokenizer, data, mixed_precision=precision))
            AcceleratorState._reset_state()


if __name__ == "__main__":
    main()
