# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Batches of images: augmented for training, in an order that can be continued exactly, and plain for evaluation.

Notable: training images form one endless stream, epoch after epoch, each a permutation keyed by (seed, epoch). A batch
is known by where it starts in that stream, and each image's augmentation is keyed by (seed, epoch, image): neither
depends on workers, processes or what was drawn before.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..sparsity.selection import keyed_generator
from .images import DamagedImageError, ImageDataConfig, LabelledImages


logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Item = TypeVar("Item")
Transform = Callable[[Image.Image], Image.Image]


def training_transform(config: ImageDataConfig) -> Transform:
    """From any image to an augmented one of the network's size; draws from torch's global generator."""
    size = (config.image_size, config.image_size)
    steps: list[torch.nn.Module] = []
    if config.crop == "resized":
        steps.append(v2.RandomResizedCrop(size))
    else:
        steps.append(v2.Resize(size))
    if config.crop == "pad":
        steps.append(v2.RandomCrop(size, padding=config.crop_padding))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.rand_augment is not None:
        steps.append(v2.RandAugment(num_ops=2, magnitude=config.rand_augment))
    return v2.Compose(steps)


def evaluation_transform(config: ImageDataConfig) -> Transform:
    """From any image to one of the network's size, as the checkpoint's image processor makes it."""
    if config.crop != "resized":
        return v2.Resize((config.image_size, config.image_size))
    return v2.Compose([v2.Resize(_shorter_side(config)), partial(_center_crop, size=config.image_size)])


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    # Where the margins differ, torchvision's rounds to the even number, the image processor down.
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _shorter_side(config: ImageDataConfig) -> int:
    """Of the resized image, before the centre is cut out of it."""
    return round(config.image_size / config.center_crop)


def image_processor(config: ImageDataConfig) -> ViTImageProcessorPil | BitImageProcessorPil:
    """The image processor that prepares images as `evaluation_transform` and the normalisation of training do."""
    square = {"height": config.image_size, "width": config.image_size}
    common: dict[str, Any] = {
        "resample": Image.Resampling.BILINEAR,
        "image_mean": config.mean,
        "image_std": config.std,
    }
    if config.crop != "resized":
        return ViTImageProcessorPil(size=square, **common)
    # What the processor converts to is RGB, whatever the network takes.
    resized = {"shortest_edge": _shorter_side(config)}
    return BitImageProcessorPil(size=resized, crop_size=square, do_convert_rgb=config.num_channels == 3, **common)


def preparation_of(processor: Any) -> ImageDataConfig:
    """The inverse of `image_processor`: how a checkpoint's images are prepared for evaluation.

    Raises:
        ValueError: the processor does not resize, bilinearly, to a square or to a shorter side of which it takes a
            square centre.
    """
    size, crop = processor.size, getattr(processor, "crop_size", None)
    steps = {name: getattr(processor, name, None) for name in ("do_resize", "do_rescale", "do_normalize")}
    if not all(steps.values()) or processor.image_mean is None or processor.image_std is None:
        raise ValueError(
            f"image processor: {steps}, image_mean={processor.image_mean}: expected all three steps, as the "
            "checkpoints of the training recipe have them."
        )
    common: dict[str, Any] = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    bilinear = processor.resample == Image.Resampling.BILINEAR
    if bilinear and size.get("height") and size.get("height") == size.get("width"):
        return ImageDataConfig(image_size=size["height"], crop="none", **common)
    if bilinear and size.get("shortest_edge") and crop and crop["height"] == crop["width"]:
        share = crop["height"] / size["shortest_edge"]
        return ImageDataConfig(image_size=crop["height"], crop="resized", center_crop=share, **common)
    raise ValueError(
        f"image processor: size={size}, crop_size={crop}, resample={processor.resample}: expected, with bilinear "
        "resampling (2), a square size or a shortest_edge with a square crop_size, as the checkpoints of the training "
        "recipe have."
    )


class ImagePreparation:
    """Reads images and makes batches of them: `pixel_values` float32 `[batch, channels, height, width]`, normalised,
    and `labels` int64 `[batch]`."""

    def __init__(self, images: LabelledImages, config: ImageDataConfig) -> None:
        self.images = images
        self.skip_damaged = config.skip_damaged_images
        self.mode = "RGB" if config.num_channels == 3 else "L"
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])

    def read(self, index: int) -> Image.Image | None:
        """The image in the network's mode; None if it is damaged and to be skipped."""
        try:
            return self.images.read(index, self.mode)
        except DamagedImageError as error:
            if not self.skip_damaged:
                raise
            logger.warning("skipped: %s", error)
            return None

    def collate(self, images: Sequence[Image.Image | None], indices: Sequence[int]) -> Batch:
        """The batch of the images that are there, of which there has to be one; `indices` number them in the data
        set."""
        kept = [(image, index) for image, index in zip(images, indices, strict=True) if image is not None]
        if not kept:
            raise DamagedImageError(
                f"data: every image of a batch is damaged, such as {self.images.place(indices[0])}: check the path, "
                "or use larger batches."
            )
        pixels = torch.stack([v2.functional.pil_to_tensor(image) for image, _ in kept])
        labels = torch.from_numpy(self.images.labels[[index for _, index in kept]])
        return {"pixel_values": self.normalize(pixels), "labels": labels}


class TrainingBatches(Dataset[Batch]):
    """The training batches of one process, by where the global batch starts in the endless stream of images.

    Global batch i holds the images `[i * W * b, (i + 1) * W * b)` for W processes of batch size b, of which process r
    takes the r-th b. `labels` are probabilities, float32 `[batch, classes]`, where mixup, CutMix or label smoothing
    spread them. `position` (epoch and index of the image in the epoch's order) is where the next global batch starts.

    Args:
        images: Training images.
        config: How they are prepared.
        batch_size: Images in a batch of one process; mixup and CutMix mix within it.
        seed: Key of order and augmentation.
        rank: Number of this process.
        world_size: Number of processes, W.
    """

    def __init__(
        self,
        images: LabelledImages,
        config: ImageDataConfig,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.stride = world_size * batch_size
        self.preparation = ImagePreparation(images, config)
        self.transform = training_transform(config)
        self.label_smoothing = config.label_smoothing
        classes = {"num_classes": len(images.class_names)}
        mixing = [v2.MixUp(alpha=config.mixup, **classes)] if config.mixup else []
        mixing += [v2.CutMix(alpha=config.cutmix, **classes)] if config.cutmix else []
        self.mixing = v2.RandomChoice(mixing) if mixing else None
        self.orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        """Numbers of the images in the order of the epoch; the last one asked for is kept."""
        if epoch not in self.orders:
            self.orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.images))}
        return self.orders[epoch]

    def start_at(self, position: Mapping[str, int] | None) -> int:
        """Place in the stream of a batch's `position`; None is the beginning."""
        return 0 if position is None else position["epoch"] * len(self.images) + position["index"]

    def __getitem__(self, start: int) -> Batch:
        first = start + self.rank * self.batch_size
        images, indices = [], []
        for place in range(first, first + self.batch_size):
            epoch, index = divmod(place, len(self.images))
            indices.append(int(self._order(epoch)[index]))
            images.append(self._augmented(epoch, indices[-1]))
        batch = self.preparation.collate(images, indices)
        batch["pixel_values"], batch["labels"] = self._mixed(first, batch["pixel_values"], batch["labels"])
        epoch, index = divmod(start + self.stride, len(self.images))
        return {**batch, "position": {"epoch": epoch, "index": index}}

    def _augmented(self, epoch: int, index: int) -> Image.Image | None:
        image = self.preparation.read(index)
        if image is None:
            return None
        with keyed_randomness("augmentation", self.seed, epoch, index):
            return self.transform(image)

    def _mixed(self, first: int, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixing is not None:
            with keyed_randomness("mixing", self.seed, first):
                pixels, labels = self.mixing(pixels, labels)
        if self.label_smoothing:
            classes = len(self.images.class_names)
            spread = labels if labels.is_floating_point() else torch.nn.functional.one_hot(labels, classes).float()
            labels = spread * (1 - self.label_smoothing) + self.label_smoothing / classes
        return pixels, labels


class EvaluationBatches(Dataset[Batch]):
    """One pass over this process's share of the images, every `world_size`-th, in order.

    A batch of damaged images that are to be skipped is empty.

    Args:
        images: Images to evaluate on.
        config: How they are prepared.
        batch_size: Images in a batch.
        corruption: Applied to each image at the network's size before normalisation; gets its number in the data set
            as well.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        images: LabelledImages,
        config: ImageDataConfig,
        *,
        batch_size: int,
        corruption: Callable[[Image.Image, int], Image.Image] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.share = range(rank, len(images), world_size)
        self.batch_size = batch_size
        self.preparation = ImagePreparation(images, config)
        self.transform = evaluation_transform(config)
        self.corruption = corruption

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        # Map-style data sets without IndexError would be iterated for ever.
        if number >= len(self):
            raise IndexError(number)
        indices = self.share[number * self.batch_size : (number + 1) * self.batch_size]
        images = [self.prepared(index) for index in indices]
        if not any(images):
            return {}
        return self.preparation.collate(images, indices)

    def prepared(self, index: int) -> Image.Image | None:
        """Image number `index` of the data set before normalisation; None if it is damaged and to be skipped."""
        image = self.preparation.read(index)
        if image is None:
            return None
        image = self.transform(image)
        return image if self.corruption is None else self.corruption(image, index)


@contextmanager
def keyed_randomness(*key: int | str) -> Iterator[None]:
    """Within, torch's global CPU generator is seeded by the key alone; afterwards it is as it was before."""
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(keyed_generator(torch.device("cpu"), *key).get_state())
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def training_loader(
    batches: TrainingBatches, position: Mapping[str, int] | None = None, num_workers: int = 0
) -> Iterator[Batch]:
    """The endless batches from `position` on, prepared by `num_workers` background processes."""
    starts = itertools.count(batches.start_at(position), batches.stride)
    return read_ahead(batches, num_workers, sampler=starts)


def evaluation_loader(batches: EvaluationBatches, num_workers: int = 0) -> Iterator[Batch]:
    """The batches that are not empty in order, prepared by `num_workers` background processes."""
    return filter(None, read_ahead(batches, num_workers))


def read_ahead(items: Dataset[Item], num_workers: int, **options: Any) -> Iterator[Item]:
    """What a data set holds, item by item, read by `num_workers` background processes.

    Raises:
        ValueError: as the data set raises it: what comes from a process itself carries that one's traceback.
    """
    loader: DataLoader[Item | ValueError] = DataLoader(
        _ErrorsAsItems(items),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own, because a loader draws from the global generator otherwise, and a resumed run makes one more loader.
        generator=torch.Generator(),
        **options,
    )
    for item in loader:
        if isinstance(item, ValueError):
            raise item
        yield item


class _ErrorsAsItems(Dataset[Item | ValueError]):
    def __init__(self, items: Dataset[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Item | ValueError:
        try:
            return self.items[number]
        except ValueError as error:
            return error
