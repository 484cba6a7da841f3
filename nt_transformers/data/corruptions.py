# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The 15 standard corruptions at 5 severities (Hendrycks and Dietterich, 2019): made here, or read from the files of
CIFAR-C or ImageNet-C.

The package `imagecorruptions` makes them, as strong as in ImageNet-C at any image size. CIFAR-C's own are weaker: they
were chosen for 32 x 32 pixels. Figures under the one do not compare with figures under the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..sparsity.selection import keyed_generator
from .image_batches import EvaluationBatches
from .images import FolderImages, ImageDataConfig, LabelledImages


CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)

# The package refuses smaller images.
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Corruption:
    """One corruption of one severity: a function of an image and its number, the same at every call.

    Raises:
        ValueError: there is no such corruption or severity; in a call, the image has a side below 32 pixels.
    """

    name: str
    severity: int

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ValueError(f"corruption {self.name!r} does not exist: choose from {', '.join(CORRUPTIONS)}.")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity {self.severity!r} does not exist: choose from 1 to 5.")

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        if min(image.size) < SMALLEST_SIDE:
            raise ValueError(
                f"an image of {image.width} x {image.height} pixels is too small to corrupt: train with images of at "
                f"least {SMALLEST_SIDE} x {SMALLEST_SIDE} (data.image_size)."
            )
        corrupt = _corrupt_function()
        with _keyed_numpy(self.name, self.severity, number) as seed:
            # These two draw from generators of their own.
            own = {"seed": seed} if self.name in ("impulse_noise", "glass_blur") else {}
            pixels = corrupt(np.asarray(image.convert("RGB")), self.severity, corruption_name=self.name, **own)
        return Image.fromarray(pixels).convert(image.mode)


def _corrupt_function() -> Any:
    try:
        import cv2
        from imagecorruptions import corrupt
    except ImportError as error:
        raise ValueError(
            f"corruptions are made by the package imagecorruptions ({error}): pip install nt_transformers[robustness] "
            "or name a folder of corrupted images."
        ) from error
    # A process that reads ahead is a fork, and would wait for threads that only its parent has.
    cv2.setNumThreads(0)
    return corrupt


@contextmanager
def _keyed_numpy(*key: int | str) -> Iterator[int]:
    """Within, numpy's global generator is seeded by the key alone; afterwards it is as it was before."""
    seed = keyed_generator(torch.device("cpu"), *key).initial_seed() % 2**32
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield seed
    finally:
        np.random.set_state(state)


class ArrayImages(LabelledImages):
    """Images as one array, uint8 `[images, height, width, 3]`, or without the last dimension if grey."""

    def __init__(self, path: Path, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        self.path = path
        self.pixels = pixels
        if len(pixels) != len(labels):
            raise ValueError(f"data: {path} holds {len(pixels)} images for {len(labels)} labels: fetch it again.")
        super().__init__(labels.astype(np.int64), class_names)

    def __str__(self) -> str:
        return repr(str(self.path))

    def _open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def place(self, index: int) -> str:
        return f"image {index} of {self.path}"


def load_corrupted(folder: Path, name: str, severity: int, class_names: Sequence[str]) -> LabelledImages:
    """Images that someone has corrupted, numbered as `class_names`.

    Args:
        folder: With `NAME.npy` of the five severities one after the other, and `labels.npy` (CIFAR-C); or with
            `NAME/SEVERITY/CLASS/*` (ImageNet-C).
        name: The corruption, as its file or folder is called.
        severity: 1 to 5.
        class_names: The classes that the network knows.

    Raises:
        ValueError: the folder has no such corruption or severity, or its files do not fit together.
    """
    path = folder / f"{name}.npy"
    if path.is_file() and severity in SEVERITIES:
        pixels, labels = np.load(path, mmap_mode="r"), np.load(folder / "labels.npy")
        size = len(pixels) // len(SEVERITIES)
        part = slice((severity - 1) * size, severity * size)
        return ArrayImages(path, pixels[part], labels[part], class_names)
    if (folder / name / str(severity)).is_dir():
        return FolderImages(folder / name / str(severity)).with_classes(class_names)
    found = sorted({entry.name.removesuffix(".npy") for entry in folder.glob("*")} - {"labels"})
    raise ValueError(
        f"corruption {name!r} of severity {severity!r} does not exist in {str(folder)!r}: expected {name}.npy or "
        f"{name}/{severity}/ there, which holds {', '.join(found) or 'nothing'}."
    )


def write_corrupted(
    images: LabelledImages,
    config: ImageDataConfig,
    folder: Path,
    corruptions: Sequence[str] = CORRUPTIONS,
    num_workers: int = 0,
) -> None:
    """Makes the corrupted images once, for several networks: files in CIFAR-C's form, read by `load_corrupted`.

    Args:
        images: Images to corrupt.
        config: How they are brought to the network's size beforehand.
        folder: Where to write; made if it is not there.
        corruptions: Which corruptions.
        num_workers: Processes that work at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "labels.npy", np.tile(images.labels, len(SEVERITIES)))
    side = (config.image_size, config.image_size)
    shape = (len(SEVERITIES), len(images), *side, *((3,) if config.num_channels == 3 else ()))
    for name in corruptions:
        made = _MadeImages(images, config, [Corruption(name, severity) for severity in SEVERITIES])
        partial = folder / f"{name}.partial"
        pixels = np.memmap(partial, np.uint8, "w+", shape=shape)
        for index, severities in enumerate(DataLoader(made, batch_size=None, num_workers=num_workers)):
            pixels[:, index] = severities
        np.save(folder / f"{name}.npy", pixels.reshape(-1, *shape[2:]))
        partial.unlink()


class _MadeImages(Dataset[np.ndarray]):
    """Each image under several corruptions: uint8 `[corruptions, height, width, 3]`, or without the 3 if grey."""

    def __init__(self, images: LabelledImages, config: ImageDataConfig, corruptions: Sequence[Corruption]) -> None:
        self.clean = EvaluationBatches(images, replace(config, skip_damaged_images=False), batch_size=1)
        self.corruptions = corruptions

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.clean.prepared(index)
        assert image is not None, "damaged images stop here, so that every number has its image"
        return np.stack([np.asarray(corrupt(image, index)) for corrupt in self.corruptions])
