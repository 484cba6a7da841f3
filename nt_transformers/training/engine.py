# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The engines of accelerate that train sparse: one process, DDP, FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ..validation import check
from .config import TrainingConfig


@contextmanager
def accelerated(config: TrainingConfig) -> Iterator[Accelerator]:
    """Sets accelerate up as `config` and its launcher say; on leaving ends trackers and process group.

    Raises:
        ValueError: see `check_engine`.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    check_engine(accelerator.state)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # By accelerate's own policy gradients, which choose the topology, and the loss would be rounded to bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    try:
        yield accelerator
        accelerator.wait_for_everyone()
    except SystemExit:
        # All processes leave together. After an error the others may not: ending the group would wait for them.
        accelerator.end_training()
        raise
    accelerator.end_training()


def check_engine(state: AcceleratorState) -> None:
    """Raises a `ValueError` unless sparse training is supported by the engine and precision that accelerate runs."""
    engine = state.distributed_type
    remedy = "use DDP or FSDP2, see recipes/accelerate/"
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"distributed_type={engine.value}: it keeps weights and gradients in a layout of its own, out of reach of "
            f"masks; {remedy}"
        )
    if engine == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={state.fsdp_plugin.fsdp_version}: it flattens the weights, but masks need their shapes; "
            "set fsdp_version: 2, see recipes/accelerate/fsdp2_8gpu.yaml"
        )
    if state.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={state.mixed_precision!r}: sparse training is supported in float32 (no) and bf16"
        )


def check_shardable(model: nn.Module, mixed_precision: str) -> None:
    """Raises a `ValueError` if the model cannot be sharded by FSDP2, as accelerate applies it, in this precision."""
    batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    check(
        not (batch_norms and mixed_precision == "bf16"),
        "mixed_precision",
        "bf16",
        "FSDP2 would convert batch norms too, whose statistics stay float32; set no, or train with DDP",
    )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if tied := sorted(names - {name for name, _ in model.named_parameters()}):
        raise ValueError(
            f"tied weights ({', '.join(tied)}) under FSDP2, which shards embeddings and output layers apart: set "
            "tie_word_embeddings=false, or train with DDP"
        )


def name_sharded_units(model: Any) -> None:
    """Lets a model name only those units of sharding that accelerate can shard: it has them, and they do not hold the
    input embeddings, which become a unit of their own."""
    embeddings = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if embeddings in list(module.modules())[1:]}
    present = {type(module).__name__ for module in model.modules()} - holders
    names = model._no_split_modules or []
    model._no_split_modules = [name for name in names if name in present]


@contextmanager
def root_gathered(network: nn.Module) -> Iterator[None]:
    """Lets parts of a sharded network be called by themselves.

    FSDP gathers what belongs to the root module, such as norms between the sharded layers, only when the root is
    called, and leaves it gathered after a call without a backward pass.
    """
    if not isinstance(network, FSDPModule):
        yield
        return
    network.unshard()
    try:
        yield
    finally:
        network.reshard()
