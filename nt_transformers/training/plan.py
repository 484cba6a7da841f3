# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a training run would take, without training: parameters, FLOPs, memory of a process, time.

Notable:
- Nothing is computed. One optimizer step's forward and backward passes run on tensors without data, and the memory of
  what is alive is followed operation by operation, so checkpointing, headwise backward and mixed precision count as
  they happen.
- Sparse weights are stored and multiplied densely in training: memory and time are those of the dense network.
- Not counted: the runtime itself (Python, CUDA context), fragmentation, communication.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..analysis import ModelCost
from ..sparsity import planned_nonzeros
from ..validation import check, check_types
from .config import TrainingConfig


# Bytes an update of one tensor needs at a time per weight: keys or scores in float32, and masks of one byte.
_UPDATE_BYTES = 9
# Masks of one byte: which weights exist, and which ever did.
_MASK_BYTES = 2


@dataclass(kw_only=True)
class Hardware:
    """What `--plan` plans for. By default the processes and the engine are those of the launcher.

    Args:
        num_processes: Processes, each with a device of its own.
        sharding: `ddp`: every process holds all weights. `fsdp2`: weights, gradients, optimizer and masks are shared
            out.
        flops_per_second: Peak of one device in the precision of the run, in FLOP/s; by default an H100's in bf16.
        utilisation: Share of the peak that training reaches.
    """

    num_processes: int | None = None
    sharding: Literal["ddp", "fsdp2"] | None = None
    flops_per_second: float = 989e12
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        check_types(self, "hardware.")
        if self.num_processes is None:
            self.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.sharding is None:
            self.sharding = "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else "ddp"
        check(self.num_processes >= 1, "hardware.num_processes", self.num_processes, "give at least 1")
        check(self.flops_per_second > 0, "hardware.flops_per_second", self.flops_per_second, "give a positive number")
        check(0 < self.utilisation <= 1, "hardware.utilisation", self.utilisation, "give a share above 0, at most 1")

    @property
    def shards(self) -> int:
        """Processes among which weights and what belongs to them are shared out."""
        assert self.num_processes is not None
        return self.num_processes if self.sharding == "fsdp2" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of an optimizer step."""

    weights: int
    gradients: int
    optimizer: int
    masks: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What a run takes. FLOPs are per item (token, image): `flops` as computed, `sparse_flops` of existing weights."""

    parameters: int
    active_parameters: int
    flops: float
    sparse_flops: float
    items: int
    memory: Memory
    num_processes: int
    seconds: float

    def __str__(self) -> str:
        gib = {name: size / 2**30 for name, size in [*vars(self.memory).items(), ("total", self.memory.total)]}
        rows = [
            ("parameters", f"{self.parameters / 1e6:,.1f} M"),
            ("active parameters", f"{self.active_parameters / 1e6:,.1f} M"),
            (
                "training FLOPs per item",
                f"{self.flops / 1e9:,.3f} G computed, {self.sparse_flops / 1e9:,.3f} G sparse",
            ),
            ("items (tokens, images)", f"{self.items / 1e9:,.3f} G"),
            ("processes", f"{self.num_processes}"),
            *((f"memory, {name}", f"{size:,.2f} GiB") for name, size in gib.items()),
            ("time", f"{self.seconds / 3600:,.1f} h"),
        ]
        return "\n".join(f"{name:<24} {value}" for name, value in rows)


@runtime_checkable
class Plannable(Protocol):
    """A configuration that can tell what its run would take."""

    def plan(self, hardware: Hardware) -> Plan:
        """The plan; reads no data and builds no weights."""


class Step(Protocol):
    """The forward pass of one micro-batch, to its loss."""

    def __call__(self, network: Any) -> Tensor: ...


def plan_training(
    config: TrainingConfig,
    hardware: Hardware,
    network: PreTrainedModel,
    step: Step,
    cost: ModelCost,
    items_per_example: int,
    recomputed: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """The plan of training `network` as `config` says.

    Args:
        config: The run; its batch has to divide among the processes.
        hardware: Devices and engine.
        network: On the meta device, prepared for training.
        step: Called twice where the run accumulates gradients.
        cost: FLOPs per item.
        items_per_example: Tokens or images in one example.
        recomputed: Whether the backward pass computes the forward pass of the parameter or module of that name again.
    """
    assert hardware.num_processes is not None
    micro_batches = config.accumulation_steps(hardware.num_processes)
    again = sum(layer.dense_forward for layer in cost.layers if recomputed(layer.name))
    items = config.max_steps * config.global_batch_size * items_per_example
    speed = hardware.num_processes * hardware.flops_per_second * hardware.utilisation
    memory = measure_step(network, step, config, min(micro_batches, 2), sharded=hardware.shards > 1)
    return Plan(
        parameters=cost.parameters,
        active_parameters=cost.active_parameters,
        flops=cost.dense_training + again,
        sparse_flops=cost.training(config.sparsity.update_interval),
        items=items,
        memory=_memory(config, hardware, network, memory),
        num_processes=hardware.num_processes,
        seconds=items * (cost.dense_training + again) / speed,
    )


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond weights that are alive at once during forward and backward passes, at most.

    `total` counts gradients, `activations` does not: the two have their peaks at different times.
    """

    total: int
    activations: int


def measure_step(
    network: PreTrainedModel, step: Step, config: TrainingConfig, micro_batches: int, sharded: bool = False
) -> StepMemory:
    """Follows the memory of so many micro-batches from empty gradients on; leaves the network without weights.

    Weights that autocast has converted count, unless they are sharded: FSDP2 gathers them converted and frees them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _AllPositions():
        # On a CPU that does not compute, autocast and attention choose as they do in training.
        network.to_empty(device="cpu").tie_weights()
        with _AliveTensors(network if sharded else None) as alive:
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(alive.note_gradient)
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                    loss = step(network)
                loss.backward()
                del loss
    return StepMemory(alive.peak, alive.peak_without_gradients)


def _memory(config: TrainingConfig, hardware: Hardware, network: PreTrainedModel, step: StepMemory) -> Memory:
    weights = _bytes(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    masked = planned_nonzeros(network, config.sparsity)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    masks = _MASK_BYTES * sum(sizes[name] for name in masked)
    largest = max((sizes[name] for name in masked), default=0)
    shards = hardware.shards
    if shards > 1:
        # Two blocks' weights are gathered at a time, and one block's gradients; an update gathers one tensor of each.
        units = [_bytes(module) for module in _sharded_units(network)]
        buffers = max(3 * max(units), (_UPDATE_BYTES + 8) * largest)
        activations = step.activations
    else:
        # DDP keeps a second copy of the gradients, in buckets.
        buffers = gradients if hardware.num_processes != 1 else 0
        activations = max(step.total - gradients, _UPDATE_BYTES * largest)
    return Memory(
        weights=weights // shards,
        gradients=gradients // shards,
        optimizer=_moments(config) * gradients // shards,
        masks=masks // shards,
        buffers=buffers,
        activations=activations,
    )


def _moments(config: TrainingConfig) -> int:
    """Numbers that the optimizer keeps of each weight."""
    return 2 if config.optimizer != "sgd" else int(config.momentum > 0)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _sharded_units(network: nn.Module) -> list[nn.Module]:
    names = set(getattr(network, "_no_split_modules", None) or [])
    return [module for module in network.modules() if type(module).__name__ in names] or [network]


class _AllPositions(TorchFunctionMode):
    """Without data, everything that may be left out counts, such as labels that are padding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero:
            return torch.arange(args[0].numel())[:, None]
        return func(*args, **(kwargs or {}))


class _AliveTensors(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations have made and that are still alive.

    Args:
        sharded: A network whose weights are not counted in another precision either.
    """

    def __init__(self, sharded: nn.Module | None = None) -> None:
        super().__init__()
        self._sharded = {id(parameter.untyped_storage()) for parameter in sharded.parameters()} if sharded else set()
        self.alive = self.gradients = 0
        self.peak = self.peak_without_gradients = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._with_gradient: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func is torch.ops.aten._to_copy.default and given & self._sharded:
            return output
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.alive)
        self.peak_without_gradients = max(self.peak_without_gradients, self.alive - self.gradients)
        return output

    def note_gradient(self, parameter: Tensor) -> None:
        if id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.nbytes

    def _add(self, storage: Any) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.alive -= size
