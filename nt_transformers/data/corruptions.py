# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The 15 standard corruptions at 5 severities (Hendrycks and Dietterich, 2019): made here, or read from the files of
CIFAR-C or ImageNet-C.

The package `imagecorruptions` makes them, as strong as in ImageNet-C at any image size. CIFAR-C's own are weaker: they
were chosen for 32 x 32 pixels. Figures under the one do not compare with figures under the other.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..files import partial_path, write_text
from ..sparsity.selection import keyed_generator
from .image_batches import EvaluationBatches, read_ahead
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

# In a folder of CIFAR-C's form; what the images were made of, of which that many are compared.
LABELS, ORIGIN = "labels.npy", "origin.json"
ORIGIN_IMAGES = 64

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
        assert len(pixels) == len(labels)
        self.path = path
        self.pixels = pixels
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
        pixels, labels = _load_array(path), _load_array(folder / LABELS)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] != 3):
            raise ValueError(
                f"data: {path} holds {pixels.dtype} {list(pixels.shape)}, not uint8 [5 x images, height, width, 3]: "
                "fetch or make it again."
            )
        if labels.dtype.kind not in "iu":
            raise ValueError(f"data: {folder / LABELS} holds {labels.dtype}, not class numbers: fetch it again.")
        if len(pixels) % len(SEVERITIES) or labels.shape != (len(pixels),):
            raise ValueError(
                f"data: {path} holds {len(pixels)} images, which are to be five severities of the same ones, and "
                f"{LABELS} labels {list(labels.shape)}: fetch or make both again."
            )
        size = len(pixels) // len(SEVERITIES)
        part = slice((severity - 1) * size, severity * size)
        return ArrayImages(path, pixels[part], labels[part], class_names)
    if (folder / name / str(severity)).is_dir():
        return FolderImages(folder / name / str(severity)).with_classes(class_names)
    ours = {Path(name).stem for name in (LABELS, ORIGIN)}
    found = sorted({entry.name.removesuffix(".npy") for entry in folder.glob("*")} - ours)
    raise ValueError(
        f"corruption {name!r} of severity {severity!r} does not exist in {str(folder)!r}: expected {name}.npy or "
        f"{name}/{severity}/ there, which holds {', '.join(found) or 'nothing'}."
    )


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data: {path} cannot be read ({error}): fetch or make it again.") from error


def write_corrupted(
    images: LabelledImages,
    config: ImageDataConfig,
    folder: Path,
    corruptions: Sequence[str] = CORRUPTIONS,
    num_workers: int = 0,
) -> None:
    """Makes the corrupted images once, for several networks: files in CIFAR-C's form, read by `load_corrupted`.

    Those that are there already are kept. An interruption leaves each file whole or absent.

    Args:
        images: Images to corrupt.
        config: How they are brought to the network's size beforehand.
        folder: Where to write; made if it is not there.
        corruptions: Which corruptions.
        num_workers: Processes that work at the same time.

    Raises:
        ValueError: a corruption does not exist, an image is damaged and not to be skipped, or the folder is a
            file or holds corruptions of other images.
    """
    if any(place.is_file() for place in (folder, *folder.parents)):
        raise ValueError(f"{str(folder)!r} is a file, or in one: name a folder for the corrupted images.")
    made = {name: [Corruption(name, severity) for severity in SEVERITIES] for name in corruptions}
    clean = EvaluationBatches(images, config, batch_size=1)
    kept = [index for index in range(len(images)) if not config.skip_damaged_images or clean.prepared(index)]
    if not kept:
        raise ValueError(f"data: no image of {images} can be read, so there is nothing to corrupt: repair them.")
    _claim(folder, images.labels[kept], clean, kept)
    side = (config.image_size, config.image_size)
    shape = (len(SEVERITIES) * len(kept), *side, *((3,) if config.num_channels == 3 else ()))
    for name, severities in made.items():
        if (folder / f"{name}.npy").exists():
            continue
        partial = partial_path(folder / f"{name}.npy")
        pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        for place, pictures in enumerate(read_ahead(_MadeImages(clean, kept, severities), num_workers)):
            pixels[place :: len(kept)] = pictures
        pixels.flush()
        partial.replace(folder / f"{name}.npy")


def _claim(folder: Path, labels: np.ndarray, clean: EvaluationBatches, kept: Sequence[int]) -> None:
    """Writes labels and origin into the folder, or finds the same origin there."""
    sample = np.unique(np.linspace(0, len(kept) - 1, ORIGIN_IMAGES, dtype=int))
    digest = hashlib.blake2b(labels.tobytes(), digest_size=16)
    for place in sample:
        image = clean.prepared(kept[place])
        assert image is not None
        digest.update(np.asarray(image).tobytes())
    origin = {"images": len(kept), "digest": digest.hexdigest()}
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        # The origin comes first: a folder without labels is seen to be unfinished.
        write_text(folder / ORIGIN, json.dumps(origin))
    elif _recorded_origin(folder) != origin:
        raise ValueError(
            f"{str(folder)!r} holds other files than corruptions of these {len(kept)} images, prepared as this "
            "network takes them: name another folder."
        )
    if not (folder / LABELS).exists():
        partial = partial_path(folder / LABELS)
        with partial.open("wb") as file:
            np.save(file, np.tile(labels, len(SEVERITIES)))
        partial.replace(folder / LABELS)


def _recorded_origin(folder: Path) -> object:
    """None where there is none, or where it cannot be read."""
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class _MadeImages(Dataset[np.ndarray]):
    """Each image under several corruptions: uint8 `[corruptions, height, width, 3]`, or without the 3 if grey."""

    def __init__(self, clean: EvaluationBatches, indices: Sequence[int], corruptions: Sequence[Corruption]) -> None:
        self.clean = clean
        self.indices = indices
        self.corruptions = corruptions

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> np.ndarray:
        # By the number it has among all images, damaged ones as well, as where corruptions are made on the way.
        index = self.indices[place]
        image = self.clean.prepared(index)
        assert image is not None
        return np.stack([np.asarray(corrupt(image, index)) for corrupt in self.corruptions])
