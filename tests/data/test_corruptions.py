# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Corruptions: the standard ones, the same at every call, in files as CIFAR-C and ImageNet-C have them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from imagecorruptions import get_corruption_names
from PIL import Image

from nt_transformers.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, load_corrupted, write_corrupted
from nt_transformers.data.image_batches import EvaluationBatches
from nt_transformers.data.images import DamagedImageError, ImageDataConfig, load_images


CLASSES = ["n01", "n02", "n03"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """A smooth picture with edges, 32 x 32."""
    rows, columns = np.mgrid[:32, :32]
    pixels = np.stack([rows * 7, columns * 7, 255 * ((rows + columns) % 16 < 8)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


def test_they_are_the_standard_ones() -> None:
    assert list(CORRUPTIONS) == get_corruption_names()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_image_is_corrupted_in_the_same_way_at_every_call(image: Image.Image, name: str) -> None:
    corruption = Corruption(name, 3)
    first = corruption(image, 0)
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    others = [corruption(image, number) for number in (1, 2)]
    again = corruption(image, 0)
    assert np.array_equal(np.random.get_state()[1], before), "numpy's generator is put back"
    assert again.tobytes() == first.tobytes()
    assert (first.size, first.mode) == (image.size, image.mode)
    assert distance(first, image) > 1
    deterministic = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert (others[0].tobytes() == others[1].tobytes()) == (name in deterministic)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "defocus_blur", "contrast"])
def test_severity_makes_it_worse(image: Image.Image, name: str) -> None:
    distances = [distance(Corruption(name, severity)(image, 0), image) for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


def test_grey_images_stay_grey(image: Image.Image) -> None:
    assert Corruption("shot_noise", 1)(image.convert("L"), 0).mode == "L"


def test_mistakes_are_named(image: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corruption 'rain' does not exist: choose from gaussian_noise, "):
        Corruption("rain", 1)
    with pytest.raises(ValueError, match="severity 6 does not exist"):
        Corruption("fog", 6)
    with pytest.raises(ValueError, match="28 x 28 pixels is too small"):
        Corruption("fog", 1)(image.resize((28, 28)), 0)
    np.save(tmp_path / "snow.npy", np.zeros(0))
    with pytest.raises(ValueError, match="corruption 'fog' of severity 1 does not exist in .*which holds snow"):
        load_corrupted(tmp_path, "fog", 1, CLASSES)


@pytest.mark.parametrize("grey", [False, True])
def test_what_is_written_is_what_is_made(image_folder: Path, tmp_path: Path, grey: bool) -> None:
    config = ImageDataConfig(image_size=32, crop="none", **({"mean": [0.5], "std": [0.5]} if grey else {}))
    images = load_images(str(image_folder), "val")
    write_corrupted(images, config, tmp_path, ["gaussian_noise"], num_workers=2)
    assert {path.name for path in tmp_path.iterdir()} == {"gaussian_noise.npy", "labels.npy", "origin.json"}
    assert np.load(tmp_path / "gaussian_noise.npy").shape == (60, 32, 32, *(() if grey else (3,)))
    for severity in SEVERITIES:
        read = load_corrupted(tmp_path, "gaussian_noise", severity, CLASSES)
        assert np.array_equal(read.labels, images.labels)
        clean = images.read(5).convert("L" if grey else "RGB").resize((32, 32), Image.Resampling.BILINEAR)
        assert read.read(5).tobytes() == Corruption("gaussian_noise", severity)(clean, 5).tobytes()


def test_images_are_made_once_and_only_for_the_same_network_input(image_folder: Path, tmp_path: Path) -> None:
    config = ImageDataConfig(image_size=32, crop="none")
    images = load_images(str(image_folder), "val")
    write_corrupted(images, config, tmp_path, ["contrast"])
    first = (tmp_path / "contrast.npy").stat()
    write_corrupted(images, config, tmp_path, ["contrast", "pixelate"])
    assert (tmp_path / "contrast.npy").stat().st_mtime_ns == first.st_mtime_ns
    assert (tmp_path / "pixelate.npy").exists()
    others = {
        "other pictures": (load_images(str(image_folder)).select(np.arange(12)), config),
        "fewer": (images.select(np.arange(5)), config),
        "another size": (images, ImageDataConfig(image_size=40, crop="none")),
        "grey": (images, ImageDataConfig(image_size=32, crop="none", mean=[0.5], std=[0.5])),
    }
    for other, preparation in others.values():
        with pytest.raises(ValueError, match="holds other files than corruptions of these .*name another folder"):
            write_corrupted(other, preparation, tmp_path, ["fog"])
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["contrast.npy", "labels.npy", "pixelate.npy"]


def test_files_of_others_are_left_alone(image_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="name another folder"):
        write_corrupted(load_images(str(image_folder), "val"), ImageDataConfig(crop="none"), tmp_path, ["fog"])
    assert np.load(tmp_path / "labels.npy").shape == (5,)


def test_a_damaged_record_counts_as_of_others_and_a_file_is_no_folder(image_folder: Path, tmp_path: Path) -> None:
    images, config = load_images(str(image_folder), "val"), ImageDataConfig(image_size=32, crop="none")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "origin.json").write_text('{"images": 1')
    with pytest.raises(ValueError, match="name another folder"):
        write_corrupted(images, config, tmp_path / "made", ["fog"])
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match=r"is a file, or in one: name a folder"):
            write_corrupted(images, config, folder, ["fog"])


def test_an_interruption_leaves_no_file_that_looks_whole(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImageDataConfig(image_size=32, crop="none")
    images = load_images(str(image_folder), "val")
    corrupt, calls = Corruption.__call__, []

    def stop(self: Corruption, image: Image.Image, number: int) -> Image.Image:
        calls.append(number)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return corrupt(self, image, number)

    monkeypatch.setattr(Corruption, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        write_corrupted(images, config, tmp_path, ["contrast"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="corruption 'contrast' of severity 1 does not exist"):
        load_corrupted(tmp_path, "contrast", 1, CLASSES)
    write_corrupted(images, config, tmp_path, ["contrast"])
    clean = images.read(11).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    read = load_corrupted(tmp_path, "contrast", 5, CLASSES).read(11)
    assert read.tobytes() == Corruption("contrast", 5)(clean, 11).tobytes()


def test_damaged_images_are_skipped_only_if_asked_for(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "val", tmp_path / "images")
    (tmp_path / "images" / "n01" / "02.png").write_bytes(b"no image")
    images, config = load_images(str(tmp_path / "images")), ImageDataConfig(image_size=32, crop="none")
    with pytest.raises(DamagedImageError, match=r"n01/02\.png"):
        write_corrupted(images, config, tmp_path / "none", ["gaussian_noise"])
    skipping = replace(config, skip_damaged_images=True)
    write_corrupted(images, skipping, tmp_path / "made", ["gaussian_noise"])
    read = load_corrupted(tmp_path / "made", "gaussian_noise", 2, CLASSES)
    assert read.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
    on_the_way = EvaluationBatches(images, skipping, batch_size=1, corruption=Corruption("gaussian_noise", 2))
    assert read.read(2).tobytes() == on_the_way.prepared(3).tobytes()


def test_imagenet_c_folders(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fog").mkdir()
    (tmp_path / "fog" / "2").symlink_to(image_folder / "val")
    images = load_corrupted(tmp_path, "fog", 2, ["n00", *CLASSES])
    assert images.labels.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    with pytest.raises(ValueError, match="severity 3 does not exist"):
        load_corrupted(tmp_path, "fog", 3, CLASSES)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((10, 32, 32, 3), np.uint8), np.zeros(1, np.uint8), r"fog\.npy holds 10 images.*labels \[1\]"),
        (np.zeros((12, 32, 32, 3), np.uint8), np.zeros(12, np.uint8), r"holds 12 images, .*five severities"),
        (np.zeros((10, 32, 32, 3), np.float32), np.zeros(10, np.uint8), r"holds float32 \[10, 32, 32, 3\], not uint8"),
        (np.zeros((10, 3, 32, 32), np.uint8), np.zeros(10, np.uint8), r"holds uint8 \[10, 3, 32, 32\], not uint8"),
        (np.zeros((10, 32, 32, 3), np.uint8), np.full(10, 0.5), r"labels\.npy holds float64, not class numbers"),
        (np.zeros((10, 3072), np.uint8), np.zeros(10, np.uint8), r"holds uint8 \[10, 3072\], not uint8"),
        (np.zeros((10, 32, 32, 3), np.uint8), None, r"labels\.npy cannot be read"),
        (None, np.zeros(10, np.uint8), r"fog\.npy cannot be read"),
    ],
)
def test_files_that_are_damaged_or_do_not_fit(
    tmp_path: Path, pixels: np.ndarray | None, labels: np.ndarray | None, message: str
) -> None:
    if pixels is None:
        (tmp_path / "fog.npy").write_bytes(b"\x93NUMPY")
    else:
        np.save(tmp_path / "fog.npy", pixels)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(ValueError, match=message):
        load_corrupted(tmp_path, "fog", 1, CLASSES)
