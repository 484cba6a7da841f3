# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Labelled images: from the hub, local parquet or arrow files, folders of classes (ImageNet's layout), or IDX files.

Images stay encoded until they are read, so that a data set of any size fits, and a damaged one is named when met.
"""

import glob
import gzip
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from ..validation import check, check_types
from .documents import is_local


logger = logging.getLogger(__name__)

TABLE_ENDINGS = (".parquet", ".arrow")
# By these `save_to_disk` marks a data set, and a dictionary of data sets by split.
SAVED_DATASET, SAVED_DICTIONARY = "state.json", "dataset_dict.json"
IDX_PREFIXES = {"train": "train", "test": "t10k"}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class DamagedImageError(ValueError):
    """An image cannot be decoded; the message names it."""


@dataclass
class ImageDataConfig:
    """Which images a classifier trains on, and how they are prepared and augmented.

    Args:
        train: Training images: a data set id of the hub; a local file, glob or folder of `*.parquet` or `*.arrow`, as
            `save_to_disk` writes it as well; a folder with one subfolder of images for each class (ImageNet's layout);
            or a folder of IDX files (MNIST's format).
        name: Configuration of the hub's data set; local files have none.
        train_split: Split of the hub's data set, or subfolder of a local folder, to train on. Tables take a slice as
            well: `train[:5000]`.
        test: Test images, in the same forms. Default: the split `test_split` of `train`, which it then has to have.
        test_split: Split or subfolder of the test images.
        image_column: Column of a table that holds the images.
        label_column: Column of a table that holds the classes.
        validation_size: Training images held out for the evaluations during training. 0 leaves none: the run is then
            evaluated on the test images only, once, at its end.
        validation_seed: Which ones are held out; the same for every seed of the run.
        skip_damaged_images: Go on without images that cannot be decoded, naming them in the log, instead of stopping.
        image_size: Height and width that the network gets, in pixels.
        mean: Mean of each channel, in the range 0 to 1; as many numbers as the network takes channels: 3 (colour) or 1
            (grey).
        std: Standard deviation of each channel.
        crop: Training crop. `pad`: of the image padded by `crop_padding` (CIFAR). `resized`: of random area and shape,
            resized (ImageNet). `none`: the image.
        crop_padding: Pixels of zeros on each side, for the crop `pad`.
        center_crop: Side of the centre that evaluation sees, as a share of the image's shorter side; for the crop
            `resized`. The other crops see the whole image.
        flip: Mirror half of the training images.
        rand_augment: Magnitude of RandAugment (Cubuk et al., 2020), two operations an image; null for none.
        mixup: Alpha of mixup (Zhang et al., 2018); 0 for none. With `cutmix` as well, each batch gets one of the two.
        cutmix: Alpha of CutMix (Yun et al., 2019); 0 for none.
        label_smoothing: Share of the target spread evenly over all classes in training.
        num_workers: Background processes that prepare training images; 0 prepares them between the steps.
    """

    train: str = "uoft-cs/cifar100"
    name: str | None = None
    train_split: str = "train"
    test: str | None = None
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    validation_size: int = 5000
    validation_seed: int = 0
    skip_damaged_images: bool = False
    image_size: int = 32
    mean: list[float] = field(default_factory=IMAGENET_MEAN.copy)
    std: list[float] = field(default_factory=IMAGENET_STD.copy)
    crop: Literal["pad", "resized", "none"] = "pad"
    crop_padding: int = 4
    center_crop: float = 0.875
    flip: bool = True
    rand_augment: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    num_workers: int = 2

    def __post_init__(self) -> None:
        check_types(self, "data.")
        for name in ("train", "train_split", "test_split", "image_column", "label_column"):
            self._check(bool(getattr(self, name)), name, "name one")
        for name in ("validation_size", "crop_padding", "num_workers"):
            self._check(getattr(self, name) >= 0, name, "give 0 or more")
        for name in ("mixup", "cutmix"):
            self._check(getattr(self, name) >= 0, name, "give 0 (none) or a positive number")
        self._check(self.image_size >= 1, "image_size", "give at least 1 pixel")
        self._check(0 < self.center_crop <= 1, "center_crop", "give a share above 0 and at most 1")
        self._check(0 <= self.label_smoothing < 1, "label_smoothing", "give a share from 0 up to, not including, 1")
        magnitude = self.rand_augment
        self._check(magnitude is None or 0 <= magnitude <= 30, "rand_augment", "give 0 to 30, or null for none")
        self._check(len(self.mean) in (1, 3), "mean", "give 3 numbers (colour) or 1 (grey)")
        self._check(len(self.std) == len(self.mean), "std", f"give {len(self.mean)} numbers, as for mean")
        self._check(all(value > 0 for value in self.std), "std", "give positive numbers")

    def _check(self, valid: bool, name: str, remedy: str) -> None:
        check(valid, f"data.{name}", getattr(self, name), remedy)

    @property
    def num_channels(self) -> int:
        """Channels that the network takes."""
        return len(self.mean)

    def load_train(self) -> tuple["LabelledImages", "LabelledImages"]:
        """Training and validation images, the latter empty if `validation_size` is 0; errors of `load_images`."""
        images = self._load(self.train, self.train_split)
        self._check(self.validation_size < len(images), "validation_size", f"there are only {len(images)} images")
        order = np.random.default_rng(self.validation_seed).permutation(len(images))
        held_out, rest = order[: self.validation_size], order[self.validation_size :]
        return images.select(np.sort(rest)), images.select(np.sort(held_out))

    def class_names(self) -> list[str]:
        """Names of the classes, without fetching images from the hub; errors of `load_images`."""
        if is_local(self.train):
            return self._load(self.train, self.train_split).class_names
        return hub_class_names(self.train, self.name, self.label_column)

    def load_test(self, class_names: Sequence[str]) -> "LabelledImages":
        """Test images, numbered as `class_names` of the training images.

        Raises:
            ValueError: they are training images; errors of `load_images` and `with_classes`.
        """
        source = self.test or self.train
        train, test = _locate(self.train, self.train_split), _locate(source, self.test_split)
        others = not train.meets(test) or not _overlap(self.train_split, self.test_split)
        self._check(others, "test", "these are the training images; name others, or a test_split that data.train has")
        return self._load(source, self.test_split).with_classes(class_names)

    def _load(self, source: str, split: str) -> "LabelledImages":
        return load_images(
            source, split, name=self.name, image_column=self.image_column, label_column=self.label_column
        )


class LabelledImages(ABC):
    """Images of one class each.

    Args:
        labels: int64 `[images]`, the class of each image.
        class_names: Name of each class.

    Raises:
        ValueError: there is no image, or a label is no class.
    """

    def __init__(self, labels: np.ndarray, class_names: Sequence[str]) -> None:
        self.labels = labels
        self.class_names = list(class_names)
        if len(labels) == 0:
            raise ValueError(f"data: {self} holds no images: check the path.")
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        if len(wrong):
            raise ValueError(
                f"data: {self.place(wrong[0])} has label {labels[wrong[0]]}, which is not among the "
                f"{len(self.class_names)} classes, numbered from 0 ({len(wrong)} of {len(labels)} images are wrong): "
                "repair the labels, or name a split that has labels."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, mode: str | None = None) -> Image.Image:
        """The decoded image, of 8 bits a channel, in Pillow's `mode` if one is given.

        Raises:
            DamagedImageError: it cannot be decoded or converted, or its values have no known range.
        """
        try:
            image = self._open(index)
            image.load()
            image = _eight_bits(image)
            image = image if mode is None else image.convert(mode)
        # What Pillow raises depends on the format and the damage.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise DamagedImageError(
                f"data: {self.place(index)} cannot be decoded ({error}): repair or remove it, or set "
                "data.skip_damaged_images to go on without it."
            ) from error
        return image

    @abstractmethod
    def _open(self, index: int) -> Image.Image: ...

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the image is, for messages."""

    def select(self, indices: np.ndarray) -> "LabelledImages":
        """The images of these numbers, in this order."""
        return Selection(self, indices, self.labels[indices], self.class_names)

    def with_classes(self, class_names: Sequence[str]) -> "LabelledImages":
        """The same images, with labels that number `class_names`.

        Classes are matched by name. Where no name is known, equally many classes are taken to be the same, in the same
        order: the hub's ImageNet has words for its classes, folders have WordNet numbers.

        Raises:
            ValueError: only some names are known, or none and the numbers of classes differ.
        """
        unknown = sorted(set(self.class_names) - set(class_names))
        if not unknown:
            numbers = np.array([list(class_names).index(name) for name in self.class_names])
            return Selection(self, np.arange(len(self)), numbers[self.labels], class_names)
        if len(unknown) < len(set(self.class_names)) or len(self.class_names) != len(class_names):
            raise ValueError(
                f"data: {self} has {len(self.class_names)} classes, {unknown[0]!r} among them, which are not those "
                f"that the network knows ({len(class_names)}, {class_names[0]!r} among them): name data of the same "
                "classes."
            )
        logger.warning("%s: class %r is unknown; classes are matched by their order", self, unknown[0])
        return Selection(self, np.arange(len(self)), self.labels, class_names)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled; Pillow would cut their values off at 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose values have no range; convert it to 8 or 16 bits")
    return image


class Selection(LabelledImages):
    """Some images of another set, in an order and with labels of its own; may be empty."""

    def __init__(
        self, images: LabelledImages, indices: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        self.images = images
        self.indices = indices
        self.labels = labels
        self.class_names = list(class_names)

    def __str__(self) -> str:
        return str(self.images)

    def _open(self, index: int) -> Image.Image:
        return self.images._open(int(self.indices[index]))

    def place(self, index: int) -> str:
        return self.images.place(int(self.indices[index]))


class TableImages(LabelledImages):
    """Rows of a data set of the hub's library, with a column of encoded images and one of class numbers."""

    def __init__(self, table: datasets.Dataset, source: str, image_column: str, label_column: str) -> None:
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in table.column_names:
                raise ValueError(
                    f"data: {source!r} has no column {column!r} (it has {', '.join(map(repr, table.column_names))}): "
                    f"set data.{option}."
                )
        self.source = source
        self.column = image_column
        feature = table.features[label_column]
        if not (isinstance(feature, datasets.ClassLabel) or "int" in getattr(feature, "dtype", "")):
            raise ValueError(f"data: column {label_column!r} of {source!r} holds no class numbers: set label_column.")
        labels = np.asarray(table.with_format("numpy")[label_column][:])
        known = feature.names if isinstance(feature, datasets.ClassLabel) else None
        try:
            self.table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"data: column {image_column!r} of {source!r} holds no images ({error}): set data.image_column."
            ) from error
        super().__init__(labels.astype(np.int64), known or list(map(str, range(labels.max(initial=-1) + 1))))

    def __str__(self) -> str:
        return repr(self.source)

    def _open(self, index: int) -> Image.Image:
        encoded = self.table[index][self.column]
        if encoded is None:
            raise ValueError("it is null")
        content = encoded["bytes"]
        return Image.open(io.BytesIO(content if content is not None else Path(encoded["path"]).read_bytes()))

    def place(self, index: int) -> str:
        return f"image {index} of {self.source!r}"


class FolderImages(LabelledImages):
    """A folder with one subfolder for each class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ValueError(
                f"data: {str(folder)!r} is no folder of image classes ({error}): expected one subfolder of images for "
                "each class."
            ) from error
        self.paths = [path for path, _ in found.samples]
        super().__init__(np.array([label for _, label in found.samples], np.int64), found.classes)

    def __str__(self) -> str:
        return repr(str(self.folder))

    def _open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(Path(self.paths[index]).read_bytes()))

    def place(self, index: int) -> str:
        return self.paths[index]


class IdxImages(LabelledImages):
    """A pair of IDX files, MNIST's format: unsigned bytes behind a header of big-endian numbers."""

    def __init__(self, images: Path, labels: Path) -> None:
        self.path = images
        self.pixels = _read_idx(images, 3)
        numbers = _read_idx(labels, 1).astype(np.int64)
        if len(numbers) != len(self.pixels):
            raise ValueError(f"data: {images} holds {len(self.pixels)} images, but {labels} {len(numbers)} labels.")
        super().__init__(numbers, list(map(str, range(numbers.max(initial=-1) + 1))))

    def __str__(self) -> str:
        return repr(str(self.path))

    def _open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def place(self, index: int) -> str:
        return f"image {index} of {self.path}"


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = np.frombuffer(content, ">u4", count=1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError(f"its first number is {magic}")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"data: {path} is no IDX file of {dimensions} dimensions, or damaged ({error}).") from error


def load_images(
    source: str,
    split: str = "train",
    *,
    name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> LabelledImages:
    """Load labelled images from any of the forms that `ImageDataConfig.train` names.

    Raises:
        ValueError: there is nothing to read at `source`, or it is damaged; a column is missing; there are no classes,
            or labels that are none.
    """
    form, places = _locate(source, split)
    if "[" in split and form in ("idx", "class folders"):
        raise ValueError(f"data: split {split!r} of {source!r}: only tables can be sliced; name a whole split.")
    if form == "idx":
        return IdxImages(*map(Path, places))
    if form == "class folders":
        return FolderImages(Path(places[0]))
    arguments: dict[str, Any] = {"path": source, "name": name}
    if form == "table files":
        if not places:
            raise ValueError(
                f"data: no images at {source!r}: expected a folder of class folders, a folder of IDX files, or files "
                f"ending in {' or '.join(TABLE_ENDINGS)}."
            )
        arguments = {"path": Path(places[0]).suffix.removeprefix("."), "data_files": {_whole(split): places}}
    elif is_local(source):
        arguments = {"path": str(Path(source).expanduser())}
    return TableImages(_load_table(source, split, arguments), source, image_column, label_column)


class _Location(NamedTuple):
    """Where the images of a split lie: in files, in a folder, or in a data set whose splits `datasets` finds."""

    form: Literal["idx", "class folders", "table files", "data set"]
    places: list[str]

    def meets(self, other: "_Location") -> bool:
        """Whether any images lie in both."""
        mine, others = (
            {os.path.realpath(place) for place in (each.places[:1] if each.form == "idx" else each.places)}
            for each in (self, other)
        )
        return not mine.isdisjoint(others)


def _locate(source: str, split: str) -> _Location:
    split = _whole(split)
    if not is_local(source):
        return _Location("data set", [f"{source}, {split}"])
    path = Path(source).expanduser()
    if not path.is_dir():
        return _Location("table files", _table_files(path))
    if idx := _find_idx(path, split):
        return _Location("idx", [str(file) for file in idx])  # images, labels
    if not _holds_tables(path):
        return _Location("class folders", [str(_class_folders(path, split))])
    if saved := _saved_tables(path, split):
        return _Location("table files", saved)
    return _Location("data set", [f"{path.resolve()}, {split}"])


def _whole(split: str) -> str:
    """The split of which `split` is a slice."""
    return split.partition("[")[0]


def _overlap(one: str, other: str) -> bool:
    """Whether two slices of the same images have any in common."""
    if "[" not in one or "[" not in other:
        return True
    ranges = []
    for split in (one, other):
        # Of more images than there are, so that slices by number stay what they are.
        instruction = datasets.ReadInstruction.from_spec(split).to_absolute({_whole(split): 10**12})
        ranges.append([(part.from_, part.to) for part in instruction])
    return any(max(a, c) < min(b, d) for a, b in ranges[0] for c, d in ranges[1])


def _table_files(pattern: Path) -> list[str]:
    return sorted(match for match in glob.glob(str(pattern), recursive=True) if match.endswith(TABLE_ENDINGS))


def _saved_tables(folder: Path, split: str) -> list[str]:
    """Files of a data set or a dictionary of them that `save_to_disk` wrote, if it did."""
    place = folder / split if (folder / SAVED_DICTIONARY).is_file() else folder
    return sorted(map(str, place.glob("*.arrow"))) if (place / SAVED_DATASET).is_file() else []


def _holds_tables(folder: Path) -> bool:
    return any(file.suffix in TABLE_ENDINGS for pattern in ("*", "*/*") for file in folder.glob(pattern))


def _class_folders(folder: Path, split: str) -> Path:
    """The folder that holds the folders of the classes: that of the split, or `folder` if it is not split."""
    if (folder / split).is_dir():
        return folder / split
    splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _holds_class_folders(entry))
    if splits:
        raise ValueError(
            f"data: {str(folder)!r} has no subfolder {split!r} (it has {', '.join(map(repr, splits))}): set the split "
            "to one that it has (data.train_split, data.test_split, or --split)."
        )
    return folder


def _holds_class_folders(folder: Path) -> bool:
    # A class may keep its images one folder further down, as Tiny-ImageNet's do; several folders are classes.
    entries = list(folder.iterdir())
    return sum(entry.is_dir() for entry in entries) > 1 and not any(is_image_file(entry.name) for entry in entries)


def hub_class_names(source: str, name: str | None, label_column: str) -> list[str]:
    """Names of the classes of a data set of the hub, from its description alone.

    Raises:
        ValueError: it cannot be reached, or does not describe its classes.
    """
    try:
        features = datasets.load_dataset_builder(source, name=name).info.features or {}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data: cannot look up {source!r}: {error}. Check the id and the connection.") from error
    feature = features.get(label_column)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(f"data: {source!r} does not name the classes of column {label_column!r}: set label_column.")
    return list(feature.names)


def _load_table(source: str, split: str, arguments: dict[str, Any]) -> datasets.Dataset:
    try:
        return datasets.load_dataset(**arguments, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"data: cannot load {source!r} (split {split!r}): {cause}. Check the path or hub id, the split and the "
            "connection, or name local files."
        ) from error


def _find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    prefix = IDX_PREFIXES.get(split, split)
    pairs = [sorted(folder.glob(f"{prefix}-{part}*ubyte*")) for part in ("images", "labels")]
    return (pairs[0][0], pairs[1][0]) if all(pairs) else None
