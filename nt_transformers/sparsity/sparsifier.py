# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The object that owns a model's masks, keeps the removed weights at zero, and evolves the topology."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from .config import SparsityConfig
from .distributions import apportion, nonzero_counts
from .drop import drop_rule
from .grow import at_random, by_score
from .schedules import drop_fraction, num_updates, pruned_share, stop_step
from .selection import count_true, keyed_generator, pieces, random_subset
from .sharding import distribute, from_parts, largest_magnitude, own_part, total, total_norm, whole


logger = logging.getLogger(__name__)

# Parts of a parameter's name that come from torch's wrappers, not from the model.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Where optimizers keep the first moment: SGD, and the Adam family.
_MOMENTUM = ("momentum_buffer", "exp_avg")


@dataclass(frozen=True)
class TensorSummary:
    """One masked tensor: its shape, its active weights, their share, and the share that was ever active."""

    shape: tuple[int, ...]
    nonzeros: int
    density: float
    explored: float


@dataclass(frozen=True)
class SparsitySummary:
    """Each masked tensor by parameter name, and the same figures over all of them."""

    tensors: dict[str, TensorSummary]
    numel: int
    nonzeros: int
    density: float
    explored: float


@dataclass
class _Masked:
    """A parameter with its mask; `target` is where gmp ends.

    Of a sharded parameter, `mask` and `explored` are this process's parts, the counts `active` and `seen` of all.
    """

    name: str
    parameter: nn.Parameter
    target: int
    mask: Tensor
    explored: Tensor
    active: int
    seen: int

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    def whole_mask(self) -> Tensor:
        return whole(from_parts(self.mask, self.parameter))

    def whole_explored(self) -> Tensor:
        return whole(from_parts(self.explored, self.parameter))


class Sparsifier:
    """Keeps a model sparse while it trains, and evolves which weights exist.

    Masks every 2-D and 4-D weight that the configuration does not exclude; a tied weight is masked once, under its
    first name. With `dense_embeddings`, the weights of all `nn.Embedding` modules and of the layers that
    `model.get_output_layers()` (a list) or else `model.get_output_embeddings()` returns stay dense. Names are those of
    the unwrapped model.

    Building the sparsifier draws the first masks and zeroes the weights outside them. To resume, therefore, load the
    weights of the model and the optimizer's state first and give `state`; or build it first, then load them, then call
    `load_state_dict`.

    Parameters may be sharded over processes (FSDP2, `fully_shard`): masks are sharded alike, and an update gathers one
    tensor at a time, of which every process chooses the same weights. All processes then have to build the sparsifier
    and to call `step`, `clip_grad_norm_`, `state_dict` and `load_state_dict` together.

    Args:
        model: any module, wrapped or not.
        optimizer: the torch optimizer that trains it.
        config: the settings.
        total_steps: optimizer steps of the whole run, which the schedules refer to.
        state: what `state_dict()` returned, to continue from; no masks are drawn then.

    Raises:
        ValueError: `total_steps` is too small, `state` is of another run, a weight is on the meta device or unknown to
            the optimizer, or the configuration selects nothing, excludes something unknown or leaves no weight at all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: SparsityConfig,
        *,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: give the number of optimizer steps, at least 1.")
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.total_steps = total_steps
        self.steps = 0
        self._num_updates = num_updates(total_steps, config.update_interval, config.stop_fraction)
        self._check_schedule()
        self._drop = drop_rule(config.drop, config.temperature)
        parameters = _select(model, config)
        _check_parameters(parameters, optimizer)
        self._tensors = self._initial(parameters)
        self._by_id = {id(tensor.parameter): tensor for tensor in self._tensors}
        if state is None:
            self._apply_masks()
        else:
            self.load_state_dict(state)

    def step(self) -> bool:
        """Zero the removed weights, and update the topology if it is due.

        To be called once for every optimizer step taken, after `optimizer.step()` and before `optimizer.zero_grad()`:
        the growth by gradient reads the gradients of that step, so under accumulation those of the whole batch.

        Returns:
            Whether the topology was updated.

        Raises:
            ValueError: An update is due, but a gradient (or the optimizer's momentum) is missing, all of them are
                zero, or a value is not finite.
        """
        self.steps += 1
        self._apply_masks()
        update, remainder = divmod(self.steps, self.config.update_interval)
        if remainder or update > self._num_updates:
            return False
        self._update(update)
        return True

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the norm of the gradient of the weights that exist: active ones and those of unmasked parameters.

        All gradients are scaled alike, those of removed weights too, so the order in which weights would grow stays.

        Args:
            max_norm: the norm above which gradients are scaled down to it.

        Returns:
            The norm before clipping, a tensor without dimensions.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}: set it above 0, or leave clipping out.")
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = total_norm(self._active_gradient(parameter) for parameter in parameters)
        clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each tensor by parameter name: bool, in the parameter's shape, true where the weight exists.

        The mask of a sharded parameter is sharded alike, a `DTensor`.
        """
        return {tensor.name: from_parts(tensor.mask, tensor.parameter) for tensor in self._tensors}

    @property
    def density(self) -> float:
        """Share of weights that exist, over all masked tensors."""
        return sum(tensor.active for tensor in self._tensors) / sum(tensor.numel for tensor in self._tensors)

    @property
    def explored(self) -> float:
        """Share of weights that have ever existed, over all masked tensors."""
        return sum(tensor.seen for tensor in self._tensors) / sum(tensor.numel for tensor in self._tensors)

    def summary(self) -> SparsitySummary:
        """The figures of each tensor and of all together."""
        tensors = {
            tensor.name: TensorSummary(
                shape=tuple(tensor.parameter.shape),
                nonzeros=tensor.active,
                density=tensor.active / tensor.numel,
                explored=tensor.seen / tensor.numel,
            )
            for tensor in self._tensors
        }
        return SparsitySummary(
            tensors=tensors,
            numel=sum(tensor.numel for tensor in self._tensors),
            nonzeros=sum(tensor.active for tensor in self._tensors),
            density=self.density,
            explored=self.explored,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, as nested dicts of uint8 tensors, numbers, strings and lists.

        Masks and explored weights have one bit per weight, in the order of `numpy.packbits`, whole on every process:
        the state holds for any number of processes, sharded or not.
        """
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "config": asdict(self.config),
            "shapes": self._shapes(),
            "masks": {tensor.name: _pack(tensor.whole_mask()) for tensor in self._tensors},
            "explored": {tensor.name: _pack(tensor.whole_explored()) for tensor in self._tensors},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the model's and the optimizer's own state have to be loaded before.

        Raises:
            ValueError: The state is of another configuration, of other tensors, or damaged.
        """
        self._check_state(state)
        self.steps = state["steps"]
        for tensor in self._tensors:
            mask, explored = (
                _unpack(state[part][tensor.name], tensor.parameter.shape) for part in ("masks", "explored")
            )
            tensor.active, tensor.seen = count_true(mask), count_true(explored)
            tensor.mask = own_part(distribute(mask, tensor.parameter))
            tensor.explored = own_part(distribute(explored, tensor.parameter))
        self._apply_masks()

    def _shapes(self) -> dict[str, list[int]]:
        return {tensor.name: list(tensor.parameter.shape) for tensor in self._tensors}

    def _check_schedule(self) -> None:
        if self._num_updates > 0 or self.config.stop_fraction == 0 or self.config.density == 1:
            return
        message = (
            f"update_interval={self.config.update_interval}: no topology update falls within "
            f"stop_fraction={self.config.stop_fraction} of total_steps={self.total_steps}; "
        )
        if self.config.method == "gmp":
            raise ValueError(message + "gmp would stay dense. Set a smaller update_interval.")
        logger.warning(message + "the masks will stay as they are drawn.")

    def _initial(self, parameters: dict[str, nn.Parameter]) -> list[_Masked]:
        config = self.config
        targets = _target_counts(parameters, config)
        tensors = []
        for name, parameter in parameters.items():
            target = targets[name]
            mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            active = mask.numel() if config.method == "gmp" else target
            generator = self._generator(parameter, 0, name, "initial")
            if config.mask_init is None or config.mask_init == "random":
                mask = random_subset(mask, active, generator)
            else:
                _check_finite(parameter, "weight", name)
                rule = drop_rule(config.mask_init, config.temperature)
                mask ^= rule(_values(parameter), mask, mask.numel() - active, generator)
            mask = own_part(distribute(mask, parameter))
            tensors.append(_Masked(name, parameter, target, mask, mask.clone(), active, seen=active))
        return tensors

    def _generator(self, parameter: nn.Parameter, update: int, name: str, purpose: str) -> torch.Generator:
        return keyed_generator(parameter.device, self.config.seed or 0, update, name, purpose)

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for tensor in self._tensors:
            if tensor.active < tensor.numel:
                _zero_outside_(own_part(tensor.parameter), tensor.mask)

    @torch.no_grad()
    def _update(self, update: int) -> None:
        counts = self._pruning_counts(update) if self.config.method == "gmp" else self._replacement_counts()
        changing = [(tensor, *pair) for tensor, pair in zip(self._tensors, counts, strict=True) if pair[0] > 0]
        # Before anything changes, so that an error leaves the topology whole.
        self._check_values([(tensor, grow_count > 0) for tensor, _, grow_count in changing])
        for tensor, drop_count, grow_count in changing:
            self._update_tensor(tensor, update, drop_count, grow_count)

    def _replacement_counts(self) -> list[tuple[int, int]]:
        """How many weights of each tensor to drop and to grow, the same number, at the present step."""
        config = self.config
        progress = self.steps / stop_step(self.total_steps, config.stop_fraction)
        rate = drop_fraction(config.drop_schedule, progress, config.drop_fraction, config.final_drop_fraction)
        counts = []
        for tensor in self._tensors:
            inactive = tensor.numel - tensor.active
            # Rounding keeps 0.07 * 100 = 7.000000000000001 from becoming 8.
            count = math.ceil(round(rate * tensor.active, 6)) if inactive else 0
            counts.append((count, count) if config.allow_regrow else (min(count, inactive),) * 2)
        return counts

    def _pruning_counts(self, update: int) -> list[tuple[int, int]]:
        """How many weights of each tensor gmp drops in this update; it grows none."""
        pruned = pruned_share(self.config.density_schedule, update / self._num_updates)
        shares = [tensor.numel - pruned * (tensor.numel - tensor.target) for tensor in self._tensors]
        remaining = apportion(shares, round(sum(shares)), [tensor.active for tensor in self._tensors])
        return [(tensor.active - count, 0) for tensor, count in zip(self._tensors, remaining, strict=True)]

    def _check_values(self, tensors: list[tuple[_Masked, bool]]) -> None:
        scores = []
        for tensor, grows in tensors:
            _check_finite(tensor.parameter, "weight", tensor.name)
            if grows and self.config.growth != "random":
                score = self._growth_score(tensor)
                scores.append(_check_finite(score, self.config.growth, tensor.name))
        if scores and not any(scores):
            raise ValueError(
                f"growth={self.config.growth!r} at step {self.steps}: all of it is zero, for every tensor; "
                "call Sparsifier.step() before zero_grad()."
            )

    def _update_tensor(self, tensor: _Masked, update: int, drop_count: int, grow_count: int) -> None:
        choice = self._choose(tensor, update, drop_count, grow_count)
        dropped, grown = (own_part(distribute(chosen, tensor.parameter)) for chosen in choice)
        kept = tensor.mask & ~dropped
        tensor.mask = kept | grown
        tensor.active += grow_count - drop_count
        tensor.explored |= grown
        tensor.seen = total(count_true(tensor.explored), tensor.parameter)
        # Inactive weights are zero already: only weights that were just dropped can keep a value.
        unzeroed = tensor.mask if self.config.grow_init == "keep" else kept
        _zero_outside_(own_part(tensor.parameter), unzeroed)
        self._update_optimizer_state(tensor, dropped, grown)

    def _choose(self, tensor: _Masked, update: int, drop_count: int, grow_count: int) -> tuple[Tensor, Tensor]:
        """The weights to drop and those to grow, as masks of the whole tensor, the same on every process."""
        config, parameter = self.config, tensor.parameter
        mask = tensor.whole_mask()
        drop_generator = self._generator(parameter, update, tensor.name, "drop")
        dropped = self._drop(_values(parameter), mask, drop_count, drop_generator)
        candidates = ~(mask & ~dropped if config.allow_regrow else mask)
        grow_generator = self._generator(parameter, update, tensor.name, "grow")
        if grow_count == 0 or config.growth == "random":
            return dropped, at_random(candidates, grow_count, grow_generator)
        return dropped, by_score(_values(self._growth_score(tensor)), candidates, grow_count, grow_generator)

    def _growth_score(self, tensor: _Masked) -> Tensor:
        """What growth ranks the weights of the tensor by: its gradient or its momentum."""
        if self.config.growth == "gradient":
            if tensor.parameter.grad is None:
                raise ValueError(
                    f"growth='gradient': {tensor.name} has no gradient at step {self.steps}; call Sparsifier.step() "
                    "before zero_grad(), and exclude parameters that the loss does not reach."
                )
            return tensor.parameter.grad
        state = self.optimizer.state.get(tensor.parameter, {})
        momentum = next((state[key] for key in _MOMENTUM if state.get(key) is not None), None)
        if momentum is None:
            raise ValueError(
                f"growth='momentum': the optimizer holds no momentum for {tensor.name}; "
                "train with momentum or an Adam-like optimizer, or choose another growth."
            )
        return momentum

    def _update_optimizer_state(self, tensor: _Masked, dropped: Tensor, grown: Tensor) -> None:
        state = self.optimizer.state.get(tensor.parameter, {})
        if self.config.optimizer_state == "reset":
            unchanged = ~(dropped | grown)
            elementwise = [value for value in state.values() if _is_elementwise(value, tensor.parameter)]
        else:
            # The published vision code masks SGD's momentum, so that what was inactive starts without any.
            unchanged = dropped | ~grown
            momentum = state.get("momentum_buffer")
            elementwise = [] if momentum is None else [momentum]
        for value in elementwise:
            _zero_outside_(own_part(value), unchanged)

    def _active_gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        tensor = self._by_id.get(id(parameter))
        if tensor is None or tensor.active == tensor.numel:
            return parameter.grad
        return from_parts(own_part(parameter.grad) * tensor.mask.view(torch.uint8), parameter.grad)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if missing := {"steps", "total_steps", "config", "shapes", "masks", "explored"} - state.keys():
            raise ValueError(f"sparsifier state lacks {', '.join(sorted(missing))}: it is damaged or not one of ours.")
        if differing := _differing(asdict(self.config), state["config"]):
            raise ValueError(f"sparsifier state is of another config; these fields differ: {differing}. Use the same.")
        if self.total_steps != state["total_steps"]:
            raise ValueError(
                f"total_steps={self.total_steps}, but the sparsifier state is of a run of {state['total_steps']}, "
                "whose schedules differ: give the same number."
            )
        shapes = self._shapes()
        for part in ("shapes", "masks", "explored"):
            if names := shapes.keys() ^ state[part].keys():
                raise ValueError(
                    f"sparsifier state is of another model: {', '.join(sorted(names))} only in one of them."
                )
        if differing := _differing(shapes, state["shapes"]):
            raise ValueError(f"sparsifier state is of another model; these shapes differ: {differing}.")
        for part in ("masks", "explored"):
            for name, shape in shapes.items():
                packed = state[part][name]
                if packed.dtype != torch.uint8 or packed.shape != (math.ceil(math.prod(shape) / 8),):
                    raise ValueError(
                        f"sparsifier state is damaged: {part} of {name} is {packed.dtype} {list(packed.shape)}."
                    )


def planned_nonzeros(model: nn.Module, config: SparsityConfig) -> dict[str, int]:
    """How many weights of each masked tensor would exist (for `gmp`: at the end), by parameter name.

    The model may be on the meta device; nothing is drawn or changed.

    Raises:
        ValueError: as `Sparsifier`, where the configuration does not fit the model.
    """
    return _target_counts(_select(model, config), config)


def _target_counts(parameters: Mapping[str, nn.Parameter], config: SparsityConfig) -> dict[str, int]:
    shapes = [tuple(parameter.shape) for parameter in parameters.values()]
    counts = nonzero_counts(shapes, config.density, config.distribution)
    if sum(counts) == 0:
        raise ValueError(f"density={config.density} leaves none of {sum(map(math.prod, shapes))} weights: raise it.")
    return dict(zip(parameters, counts, strict=True))


def _select(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Parameter]:
    """The parameters to mask, by their first name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(_clean(name))
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for aliases in names.values() for name in aliases):
            raise ValueError(f"exclude={pattern!r} matches no parameter of the model; correct or remove the pattern.")
    dense = _embedding_weights(model) if config.dense_embeddings else set()
    selected = {
        aliases[0]: parameter
        for parameter, aliases in names.items()
        if parameter.ndim in (2, 4)
        and parameter not in dense
        and not any(fnmatchcase(name, pattern) for name in aliases for pattern in config.exclude)
    }
    if not selected:
        raise ValueError(
            f"nothing to mask: exclude={config.exclude!r} and dense_embeddings={config.dense_embeddings} "
            "leave no 2-D or 4-D weight of the model; narrow them."
        )
    return selected


def _embedding_weights(model: nn.Module) -> set[Tensor]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in model.modules():
        if callable(find_all := getattr(module, "get_output_layers", None)):
            layers.extend(find_all())
        elif callable(find_one := getattr(module, "get_output_embeddings", None)):
            layers.append(find_one())
    return {layer.weight for layer in layers if layer is not None}


def _check_parameters(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: give the model its weights before sparsifying it.")
        if parameter not in optimized:
            raise ValueError(f"the optimizer does not train {name}: add it to the optimizer, or to exclude.")


def _clean(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _values(tensor: Tensor) -> Tensor:
    """The values to rank, whole, in float32 or better."""
    return whole(tensor.detach()).to(torch.promote_types(tensor.dtype, torch.float32))


def _zero_outside_(tensor: Tensor, mask: Tensor) -> None:
    # Multiplication by uint8 is vectorised on CPU; by bool it takes four times as long. It converts the mask first: a
    # large one as a whole would take seven times as long as in pieces.
    for values, existing in pieces(tensor, mask.view(torch.uint8)):
        values.mul_(existing)


def _check_finite(values: Tensor, kind: str, name: str) -> float:
    """The largest magnitude of what decides over masks."""
    largest = largest_magnitude(values)
    if not math.isfinite(largest):
        raise ValueError(
            f"non-finite {kind} of {name} where it decides over masks: lower the learning rate, skip such steps, or "
            "load finite weights."
        )
    return largest


def _is_elementwise(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


def _differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key)))


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(bits).view(torch.bool).view(shape)
