# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Labelled images: the same from every kind of file, mistakes named, validation images never trained or tested on."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from nt_transformers.data.images import (
    DamagedImageError,
    ImageDataConfig,
    LabelledImages,
    load_images,
)


SHARED_CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.parquet"
LABELS = [1, 0, 2, 2, 1]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Five grey images of 28 x 28 pixels."""
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(pixels: np.ndarray, labels: list[Any], names: list[str] | None = None) -> datasets.Dataset:
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"picture": datasets.Image(), "kind": feature})
    rows = {"picture": [{"bytes": encode(image), "path": None} for image in pixels], "kind": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(folder: Path, pixels: np.ndarray) -> str:
    table(pixels, LABELS, ["a", "b", "c"]).to_parquet(folder / "images.parquet")
    return str(folder / "images.parquet")


def write_parquet_folder(folder: Path, pixels: np.ndarray) -> str:
    (folder / "hub" / "data").mkdir(parents=True)
    table(pixels, LABELS, ["a", "b", "c"]).to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    return str(folder / "hub")


def write_arrow(folder: Path, pixels: np.ndarray) -> str:
    table(pixels, LABELS, ["a", "b", "c"]).save_to_disk(folder / "arrow")
    return str(folder / "arrow" / "*.arrow")


def write_saved(folder: Path, pixels: np.ndarray) -> str:
    table(pixels, LABELS, ["a", "b", "c"]).save_to_disk(folder / "saved")
    return str(folder / "saved")


def write_saved_splits(folder: Path, pixels: np.ndarray) -> str:
    rows = table(pixels, LABELS, ["a", "b", "c"])
    datasets.DatasetDict({"train": rows, "test": rows.select([3, 4])}).save_to_disk(folder / "splits")
    return str(folder / "splits")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, pixels: np.ndarray) -> str:
    (folder / "idx").mkdir()
    (folder / "idx" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (folder / "idx" / "train-labels-idx1-ubyte").write_bytes(idx(np.array(LABELS)))
    return str(folder / "idx")


def write_folder(folder: Path, pixels: np.ndarray) -> str:
    for number, (image, label) in enumerate(zip(pixels, LABELS, strict=True)):
        place = folder / "tree" / "train" / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return str(folder / "tree")


def load(source: str, split: str = "train") -> LabelledImages:
    return load_images(source, split, image_column="picture", label_column="kind")


@pytest.mark.parametrize(
    "write",
    [
        write_parquet,
        write_parquet_folder,
        write_arrow,
        write_saved,
        write_saved_splits,
        write_idx,
        write_folder,
    ],
)
def test_every_form_holds_the_same_images(
    tmp_path: Path, pixels: np.ndarray, write: Callable[[Path, np.ndarray], str]
) -> None:
    images = load(write(tmp_path, pixels))
    found = sorted((int(label), np.asarray(images.read(i)).tobytes()) for i, label in enumerate(images.labels))
    assert found == sorted((label, image.tobytes()) for label, image in zip(LABELS, pixels, strict=True))
    assert images.labels.dtype == np.int64
    assert images.class_names == (["0", "1", "2"] if write is write_idx else ["a", "b", "c"])


def test_tables_take_slices_and_keep_their_classes(tmp_path: Path, pixels: np.ndarray) -> None:
    images = load(write_parquet(tmp_path, pixels), "train[1:3]")
    assert images.labels.tolist() == LABELS[1:3]
    assert images.class_names == ["a", "b", "c"]


def test_shared_cifar_loads() -> None:
    if not SHARED_CIFAR.exists():
        pytest.skip("CIFAR-10 is not among the project's files; this checks a copy that lies beside some checkouts")
    images = load_images(str(SHARED_CIFAR), "test[:20]")
    assert images.read(3).size == (32, 32)
    assert len(images.class_names) == 10


class TestMistakes:
    def fails(self, source: Path | str, message: str, split: str = "train") -> None:
        with pytest.raises(ValueError, match=message):
            load(str(source), split)

    def test_folder_without_classes(self, tmp_path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(pixels[0]).save(tmp_path / "0.png")
        self.fails(tmp_path, "no folder of image classes.*one subfolder of images for each class")

    def test_class_without_images(self, tmp_path: Path, pixels: np.ndarray) -> None:
        source = write_folder(tmp_path, pixels)
        (Path(source) / "train" / "empty").mkdir()
        self.fails(source, "empty")

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "*.parquet", "no images at")

    def test_no_such_hub_data_set(self) -> None:
        self.fails("nobody/nothing", r"cannot load 'nobody/nothing' \(split 'train'\)")

    def test_no_such_split(self, tmp_path: Path, pixels: np.ndarray) -> None:
        self.fails(write_parquet_folder(tmp_path, pixels), "split 'exam'", "exam")

    def test_no_such_column(self, tmp_path: Path, pixels: np.ndarray) -> None:
        with pytest.raises(ValueError, match="no column 'image' .*'picture', 'kind'.*set data.image_column"):
            load_images(write_parquet(tmp_path, pixels))

    @pytest.mark.parametrize("label", [-1, 3])
    def test_label_out_of_range(self, tmp_path: Path, pixels: np.ndarray, label: int) -> None:
        rows = table(pixels, [0, 1, 2, label, 0])
        # Written as plain numbers, then read with the names of three classes, as damaged hub files are.
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
        rows = datasets.Dataset(rows.data, info=datasets.DatasetInfo(features=features))
        rows.to_parquet(tmp_path / "images.parquet")
        self.fails(tmp_path / "images.parquet", f"image 3 of .* has label {label}, .* among the 3 classes")

    def test_labels_that_are_no_numbers(self, tmp_path: Path, pixels: np.ndarray) -> None:
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
        rows = {"picture": [{"bytes": encode(pixels[0]), "path": None}], "kind": ["cat"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
        self.fails(tmp_path / "images.parquet", "'kind' .* holds no class numbers")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                {"image_column": "kind", "label_column": "kind"},
                "column 'kind' .* holds no images.*set data.image_column",
            ),
            ({"image_column": "picture", "label_column": "picture"}, "column 'picture' .* holds no class numbers"),
        ],
    )
    def test_columns_of_another_kind(
        self, tmp_path: Path, pixels: np.ndarray, columns: dict[str, str], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load_images(write_parquet(tmp_path, pixels), **columns)

    def test_damaged_table(self, tmp_path: Path, pixels: np.ndarray) -> None:
        source = Path(write_parquet(tmp_path, pixels))
        source.write_bytes(source.read_bytes()[:200])
        self.fails(source, "cannot load .*images.parquet")

    def test_empty_table(self, tmp_path: Path, pixels: np.ndarray) -> None:
        table(pixels[:0], []).to_parquet(tmp_path / "images.parquet")
        self.fails(tmp_path / "images.parquet", "cannot load .*no data")

    @pytest.mark.parametrize("damage", ["truncated", "magic", "count"])
    def test_damaged_idx(self, tmp_path: Path, pixels: np.ndarray, damage: str) -> None:
        path = Path(write_idx(tmp_path, pixels)) / "train-labels-idx1-ubyte"
        content = {
            "truncated": path.read_bytes()[:-1],
            "magic": b"\x01" + path.read_bytes()[1:],
            "count": idx(np.array(LABELS[:4])),
        }[damage]
        path.write_bytes(content)
        self.fails(path.parent, "train-labels-idx1-ubyte")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_image_is_named(tmp_path: Path, pixels: np.ndarray, damage: str) -> None:
    source = Path(write_folder(tmp_path, pixels))
    path = source / "train" / "b" / "4.png"
    path.write_bytes({"truncated": path.read_bytes()[:300], "text": b"no image", "empty": b""}[damage])
    images = load(str(source))
    index = [images.place(i) for i in range(5)].index(str(path))
    with pytest.raises(DamagedImageError, match=r"b/4\.png cannot be decoded .*set data.skip_damaged_images"):
        images.read(index)
    assert images.read(0).size == (28, 28)


def test_grey_images_of_16_bits_keep_their_shades(tmp_path: Path, pixels: np.ndarray) -> None:
    path = Path(write_folder(tmp_path, pixels)) / "train" / "a" / "1.png"
    Image.fromarray(pixels[1].astype(np.uint16) * 257).save(path)
    images = load(str(path.parents[2]))
    assert np.array_equal(np.asarray(images.read(0).convert("RGB"))[..., 0], pixels[1])


def test_images_whose_values_have_no_range_are_named(tmp_path: Path, pixels: np.ndarray) -> None:
    path = Path(write_folder(tmp_path, pixels)) / "train" / "a" / "1.tif"
    Image.fromarray(pixels[1].astype(np.float32) / 255).save(path)
    with pytest.raises(DamagedImageError, match=r"1\.tif .*mode F, whose values have no range"):
        load(str(path.parents[2])).read(1)


def test_an_image_in_a_table_is_named_by_its_row(tmp_path: Path, pixels: np.ndarray) -> None:
    rows = table(pixels, LABELS).to_dict()
    rows["picture"][2]["bytes"] = b"no image"
    features = datasets.Features({"picture": datasets.Image(decode=False), "kind": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    with pytest.raises(DamagedImageError, match=r"image 2 of .*images.parquet"):
        load(str(tmp_path / "images.parquet")).read(2)


def test_validation_images_are_held_out_of_training(image_folder: Path) -> None:
    def split(seed: int) -> list[list[str]]:
        config = ImageDataConfig(train=str(image_folder), validation_size=9, validation_seed=seed)
        return [[images.place(i) for i in range(len(images))] for images in config.load_train()]

    training, validation = split(0)
    assert len(validation) == 9
    assert not set(training) & set(validation)
    assert sorted(training + validation) == sorted(map(str, (image_folder / "train").glob("*/*.png")))
    assert len({Path(path).parent for path in validation}) == 3, "drawn from all classes, not the first ones"
    assert split(0) == [training, validation]
    assert split(1)[1] != validation


def test_test_images_are_those_of_the_test_split(image_folder: Path) -> None:
    config = ImageDataConfig(train=str(image_folder), test_split="val")
    test = config.load_test(["n01", "n02", "n03"])
    assert [test.place(i) for i in range(len(test))] == sorted(map(str, (image_folder / "val").glob("*/*.png")))


def forms_without_a_test_split(folder: Path, pixels: np.ndarray) -> list[str]:
    writers = (write_parquet, write_arrow, write_saved)
    return [*(write(folder, pixels) for write in writers), f"{write_folder(folder, pixels)}/train"]


def test_training_images_are_never_test_images(tmp_path: Path, pixels: np.ndarray) -> None:
    columns: dict[str, Any] = {"image_column": "picture", "label_column": "kind"}
    for source in forms_without_a_test_split(tmp_path, pixels):
        for test in (None, source):
            config = ImageDataConfig(train=source, test=test, **columns)
            with pytest.raises(ValueError, match=r"^data\.test=.*these are the training images; name others"):
                config.load_test(["a", "b", "c"])
    hub = ImageDataConfig(train="nobody/nothing", test_split="train")
    with pytest.raises(ValueError, match=r"^data\.test=None: these are the training images"):
        hub.load_test(["a"])


def test_slices_of_one_table_train_and_test(tmp_path: Path, pixels: np.ndarray) -> None:
    splits = {"train_split": "train[:3]", "test_split": "train[3:]"}
    columns = {"image_column": "picture", "label_column": "kind"}
    test = ImageDataConfig(train=write_parquet(tmp_path, pixels), **splits, **columns).load_test(["a", "b", "c"])
    assert test.labels.tolist() == LABELS[3:]


@pytest.mark.parametrize(
    ("train", "test", "splits"),
    [
        ("{}/images.parquet", None, ("train[:3]", "train[2:]")),
        ("{}/images.parquet", None, ("train[:4]", "train[:100%]")),
        ("{}/images.parquet", "{}/*.parquet", ("train", "test")),
        ("{}/tree/train", "{}/tree/train/", ("train", "test")),
        ("{}/tree/train", "{}/tree", ("train", "train")),
        ("{}/hub", None, ("train", "train[:3]")),
        ("nobody/nothing", None, ("train", "train[:3]")),
    ],
)
def test_training_images_by_another_name(
    tmp_path: Path, pixels: np.ndarray, train: str, test: str | None, splits: tuple[str, str]
) -> None:
    for write in (write_parquet, write_parquet_folder, write_folder):
        write(tmp_path, pixels)
    places = {"train": train.format(tmp_path), "test": test and test.format(tmp_path)}
    config = ImageDataConfig(**places, train_split=splits[0], test_split=splits[1])
    with pytest.raises(ValueError, match=r"^data\.test=.*these are the training images"):
        config.load_test(["a", "b", "c"])


def test_splits_that_were_saved_together(tmp_path: Path, pixels: np.ndarray) -> None:
    source = write_saved_splits(tmp_path, pixels)
    test = ImageDataConfig(train=source, image_column="picture", label_column="kind").load_test(["a", "b", "c"])
    assert test.labels.tolist() == LABELS[3:]
    with pytest.raises(ValueError, match=r"cannot load .*split 'exam'"):
        load(source, "exam")


def test_splits_are_not_taken_for_classes(image_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no subfolder 'test' \(it has 'train', 'val'\): set the split"):
        load_images(str(image_folder), "test")
    with pytest.raises(ValueError, match=r"no subfolder 'test'"):
        ImageDataConfig(train=str(image_folder)).load_test(["n01", "n02", "n03"])
    with pytest.raises(ValueError, match=r"split 'val\[:3\]' of .*only tables can be sliced"):
        load_images(str(image_folder), "val[:3]")


def test_classes_may_keep_their_images_one_folder_further_down(tmp_path: Path, pixels: np.ndarray) -> None:
    for number, name in enumerate("abc"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.fromarray(pixels[number]).save(tmp_path / name / "images" / "0.png")
        (tmp_path / name / "boxes.txt").write_text("0.png 0 0 27 27")
    assert load_images(str(tmp_path)).class_names == ["a", "b", "c"]


def test_classes_are_matched_by_name(image_folder: Path) -> None:
    images = load_images(str(image_folder), "val")
    matched = images.with_classes(["n09", "n03", "n02", "n01"])
    names = [matched.class_names[label] for label in matched.labels]
    assert names == [Path(images.place(i)).parent.name for i in range(len(images))]
    assert np.array_equal(images.with_classes(["x", "y", "z"]).labels, images.labels), "else by their order"
    with pytest.raises(ValueError, match="3 classes, 'n01' among them, .*4, 'w' among them"):
        images.with_classes(["w", "x", "y", "z"])
    with pytest.raises(ValueError, match="3 classes, 'n02' among them, .*3, 'n01' among them"):
        images.with_classes(["n01", "n03", "n04"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", ""),
        ("validation_size", -1),
        ("image_size", 0),
        ("mean", [0.5, 0.5]),
        ("std", [0.5]),
        ("std", [0.5, 0.5, 0.0]),
        ("crop_padding", -1),
        ("center_crop", 1.5),
        ("mixup", -0.1),
        ("cutmix", float("inf")),
        ("label_smoothing", 1.0),
        ("rand_augment", 31),
        ("num_workers", -1),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{field}="):
        ImageDataConfig(**{field: value})


def test_more_validation_images_than_there_are(image_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation_size=36: there are only 36 images"):
        ImageDataConfig(train=str(image_folder), validation_size=36).load_train()
