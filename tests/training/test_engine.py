# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Which engines train sparse, and the configurations of accelerate that come with the recipes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.training.engine import check_engine, check_shardable


ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


def state(**fields: Any) -> Any:
    return SimpleNamespace(**{"distributed_type": DistributedType.NO, "mixed_precision": "no", **fields})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, r"distributed_type=DEEPSPEED.*use DDP or FSDP2"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, r"distributed_type=MEGATRON_LM.*use DDP or FSDP2"),
        (
            {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
            r"fsdp_version=1.*set fsdp_version: 2",
        ),
        ({"mixed_precision": "fp16"}, r"mixed_precision='fp16'.*bf16"),
    ],
)
def test_engines_without_masks_are_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine(state(**engine))


def test_engines_that_train_sparse() -> None:
    check_engine(state(mixed_precision="bf16"))
    check_engine(state(distributed_type=DistributedType.MULTI_GPU))
    check_engine(state(distributed_type=DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=2)))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_not_sharded(tied: bool) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_ensemble_heads": 2, "num_head_layers": 1}
    config = NeuroTrailsLlamaConfig(vocab_size=50, **shape, **heads, tie_word_embeddings=tied)
    model = NeuroTrailsLlamaForCausalLM(config)
    if not tied:
        check_shardable(model, "no")
        return
    with pytest.raises(ValueError, match=r"tied weights \(lm_heads.0.weight.*tie_word_embeddings=false"):
        check_shardable(model, "no")


@pytest.mark.parametrize(
    ("name", "processes", "nodes", "sharded"),
    [("1gpu", 1, 1, False), ("ddp_8gpu", 8, 1, False), ("fsdp2_8gpu", 8, 1, True), ("ddp_2nodes", 16, 2, False)],
)
def test_accelerate_reads_the_configurations(name: str, processes: int, nodes: int, sharded: bool) -> None:
    arguments = ["--config_file", str(ACCELERATE / f"{name}.yaml"), "recipe.py"]
    launched, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (launched.num_processes, launched.num_machines, launched.use_fsdp) == (processes, nodes, sharded)
    assert launched.multi_gpu == (processes > 1 and not sharded)
    environment = prepare_multi_gpu_env(launched)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if sharded:
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in ACCELERATE.iterdir()} == {"1gpu", "ddp_8gpu", "fsdp2_8gpu", "ddp_2nodes"}
