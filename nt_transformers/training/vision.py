# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training a NeuroTrails image classifier, from configuration to Hub checkpoint."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from .. import models  # noqa: F401  (registers them with the Auto classes)
from ..analysis import EnsembleScores, ModelCost, image_model_cost, score_classifier
from ..data.image_batches import (
    EvaluationBatches,
    TrainingBatches,
    evaluation_loader,
    image_processor,
    training_loader,
)
from ..data.images import ImageDataConfig, LabelledImages
from ..sparsity import planned_nonzeros
from ..sparsity.sparsifier import SparsitySummary
from ..validation import check, check_types
from .config import FREE_ON_RESUME, TrainingConfig
from .engine import accelerated
from .export import export_checkpoint
from .hub import create_hub_repository, push_run
from .image_card import image_classifier_card
from .loop import Batch, Position
from .plan import Hardware, Plan, plan_training
from .run import cost_figures, run_training


@dataclass(kw_only=True)
class ClassifierArguments:
    """Shape of the network. One class of model covers the family: one head is a single network, all blocks in the
    heads a full ensemble, anything between with `sparsity.method: dense` TreeNet.

    Args:
        model_type: Which network.
        num_ensemble_heads: Ensemble heads, M.
        num_head_blocks: Blocks (of a ViT: layers) of each ensemble head, B; null for all of them: a full ensemble.
        vote: How the heads' outputs become one prediction: mean of probabilities or mean of logits.
        shape: Further fields of the network's configuration class, such as `depth` and `widen_factor` of a Wide
            ResNet. Heads and vote are given above; channels, image size and classes come from the data.
    """

    model_type: Literal["neurotrails_wide_resnet", "neurotrails_resnet", "neurotrails_vit"]
    num_ensemble_heads: int = 3
    num_head_blocks: int | None
    vote: Literal["probs", "logits"] = "probs"
    shape: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "model.")

    def build(self, data: ImageDataConfig, class_names: Sequence[str]) -> PreTrainedModel:
        """A new network for images as `data` prepares them, drawn from torch's global generator.

        Raises:
            ValueError: a field of `shape` does not exist or is given elsewhere, or a value is out of its range.
        """
        config_class: Any = type(AutoConfig.for_model(self.model_type))
        known = {entry.name for entry in dataclasses.fields(config_class)}
        unknown = sorted(set(self.shape) - known)
        check(not unknown, "model.shape", unknown, f"no fields of {config_class.__name__}")
        split = "num_head_blocks" if "num_head_blocks" in known else "num_head_layers"
        fields: dict[str, Any] = {
            "num_channels": data.num_channels,
            "num_ensemble_heads": self.num_ensemble_heads,
            "vote": self.vote,
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: number for number, name in enumerate(class_names)},
            **({"image_size": data.image_size} if "image_size" in known else {}),
        }
        elsewhere = sorted({*fields, split} & set(self.shape))
        check(not elsewhere, "model.shape", elsewhere, "they follow from the other fields of model and data")
        fields |= self.shape
        try:
            blocks = self.num_head_blocks
            if blocks is None:
                undivided = config_class(**fields, **{split: 0})
                blocks = undivided.num_blocks if split == "num_head_blocks" else undivided.num_hidden_layers
            config = config_class(**fields, **{split: blocks})
        except StrictDataclassError as error:
            raise ValueError(f"model: {error}") from error
        sides = np.atleast_1d(getattr(config, "patch_size", 1)).tolist()
        check(min(sides) >= 1, "model.shape", self.shape, "give a patch_size of at least 1 pixel")
        remedy = f"give a multiple of patch_size={sides}: the network would not see the rest of an image"
        check(not any(data.image_size % side for side in sides), "data.image_size", data.image_size, remedy)
        try:
            return AutoModelForImageClassification.from_config(config)
        except (KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"model.shape={self.shape!r}: no network can be built of it ({error!r})") from error


@dataclass(kw_only=True)
class VisionTrainingConfig(TrainingConfig):
    """Training of a NeuroTrails image classifier.

    Args:
        model: Shape of the network.
        data: Where the images come from and how they are prepared.
        head_loss: How the losses of the heads become the one that is minimized. `mean`: as published. `sum`: with SGD
            each head then takes the steps of a network trained alone at the same learning rate and weight decay, as
            the members of a full ensemble should; of the mean they would take steps M times smaller.
        channels_last: Lay images and feature maps out with the channels innermost, which tensor cores and CPUs prefer.
    """

    # Batch norms and mixup see one forward pass at a time.
    free_on_resume: ClassVar[frozenset[str]] = FREE_ON_RESUME - {"per_device_batch_size"}

    model: ClassifierArguments
    data: ImageDataConfig
    head_loss: Literal["mean", "sum"] = "mean"
    channels_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = self.eval_steps is not None and self.data.validation_size == 0
        remedy = "there is nothing to evaluate on; hold images out by data.validation_size, or leave it out"
        check(not unused, "eval_steps", self.eval_steps, remedy)

    def identity(self) -> dict[str, Any]:
        # Checkpoints from before there was a choice continue.
        fields = super().identity()
        return {name: value for name, value in fields.items() if (name, value) != ("head_loss", "mean")}

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def plan(self, hardware: Hardware) -> Plan:
        """What training as configured would take; of the data only the names of the classes are read."""
        class_names = self.data.class_names()
        with torch.device("meta"):
            network = self.model.build(self.data, class_names).train()
        nn.Module.to(network, memory_format=self.memory_format)
        size, channels = self.data.image_size, self.data.num_channels

        def step(network: nn.Module) -> torch.Tensor:
            images = torch.zeros(self.per_device_batch_size, channels, size, size)
            labels = torch.zeros(len(images), len(class_names))
            return network(images.contiguous(memory_format=self.memory_format), labels=labels).loss

        cost = image_model_cost(network, size, channels, planned_nonzeros(network, self.sparsity))
        return plan_training(self, hardware, network, step, cost, items_per_example=1)


class VisionTask:
    """A NeuroTrails image classifier and its images, for the training loop.

    It evaluates on images held out of the training set. The test images are loaded with the others, so that a mistake
    shows before training, and used by `test` only.

    Raises:
        ValueError: images or shape of the network are unusable or do not fit together.
    """

    items: Literal["images"] = "images"

    def __init__(self, config: VisionTrainingConfig, accelerator: Accelerator) -> None:
        check(
            not (config.channels_last and accelerator.is_fsdp2),
            "channels_last",
            True,
            "FSDP2 shards contiguous weights only; set channels_last: false, or train with DDP",
        )
        self.config = config
        self.accelerator = accelerator
        training, self.validation = config.data.load_train()
        self.test_images = config.data.load_test(training.class_names)
        self.training = TrainingBatches(
            training,
            config.data,
            batch_size=config.per_device_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        set_seed(config.seed)
        self.model: nn.Module = config.model.build(config.data, training.class_names)
        nn.Module.to(self.model, memory_format=config.memory_format)

    def batches(self, position: Position | None) -> Iterator[Batch]:
        return training_loader(self.training, position, self.config.data.num_workers)

    def count_items(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixel_values = batch["pixel_values"].contiguous(memory_format=self.config.memory_format)
        # The model counts entries of labels, which are several for each image where they are probabilities.
        entries = num_items * batch["labels"][0].numel()
        output = model(pixel_values=pixel_values, labels=batch["labels"], num_items_in_batch=entries)
        loss = output.loss if self.config.head_loss == "mean" else output.head_losses.sum()
        return loss, output.head_losses

    def evaluate(self) -> dict[str, Any]:
        return self._score(self.validation, "eval") if len(self.validation) else {}

    def test(self) -> dict[str, Any]:
        """Figures on the test images, the same on every process."""
        return self._score(self.test_images, "test")

    def read_images(self, *, test: bool) -> None:
        """Reads all held-out and test images once, so that a damaged one shows before training.

        Raises:
            DamagedImageError: one cannot be decoded, and damaged images are not to be skipped.
        """
        for images in (self.validation, self.test_images)[: 1 + test]:
            for _ in self._evaluation_batches(images):
                pass

    def _evaluation_batches(self, images: LabelledImages) -> Iterator[Batch]:
        """This process's share of the images, prepared."""
        batches = EvaluationBatches(
            images,
            self.config.data,
            batch_size=self.config.per_device_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return evaluation_loader(batches, self.config.data.num_workers)

    def _score(self, images: LabelledImages, prefix: str) -> dict[str, Any]:
        network = self.accelerator.unwrap_model(self.model).eval()
        with self.accelerator.autocast():
            local = score_classifier(network, self._evaluation_batches(images))
        scores = EnsembleScores(self.accelerator.reduce(local.sums, "sum"))
        figures = scores.classifier_figures(network.config.vote)
        return {f"{prefix}_{name}": value for name, value in figures.items()}


def train_image_classifier(config: VisionTrainingConfig, *, test: bool = True) -> dict[str, Any]:
    """Trains as `config` says and leaves a Hub checkpoint in `config.output_dir`.

    The checkpoint holds the last weights: no figure chooses among those on the way. The test images are used once,
    after training.

    Args:
        config: The run.
        test: Whether the test images are used at all; without them the figures are those of held-out images only.

    Returns:
        The final figures, as in `summary.json`.

    Raises:
        ValueError: anything in `config` is unusable; nothing has been trained or overwritten then.
    """
    remedy = "hold images out: nothing else tells how good the network is"
    check(test or config.data.validation_size > 0, "data.validation_size", config.data.validation_size, remedy)
    with accelerated(config) as accelerator:
        task = VisionTask(config, accelerator)
        task.read_images(test=test)
        repository = create_hub_repository(config) if config.push_to_hub and accelerator.is_main_process else None
        network, topology, summary = run_training(config, task, accelerator)
        cost = _cost(config, network, topology)
        summary |= cost_figures(config, cost, "image", summary["steps"] * config.global_batch_size)
        if test:
            summary = task.test() | summary
        if accelerator.is_main_process:
            output_dir = Path(config.output_dir)
            card = image_classifier_card(repository or output_dir.resolve().name, config.license, network, summary)
            export_checkpoint(output_dir, network, image_processor(config.data), card, summary)
            if repository is not None:
                push_run(output_dir, repository)
    return summary


def _cost(config: VisionTrainingConfig, network: Any, topology: SparsitySummary) -> ModelCost:
    # The network itself may be sharded over processes.
    with torch.device("meta"):
        whole = type(network)(network.config)
    nonzeros = {name: tensor.nonzeros for name, tensor in topology.tensors.items()}
    return image_model_cost(whole, config.data.image_size, config.data.num_channels, nonzeros)
