# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Corruptions: the standard ones, the same at every call, in files as CIFAR-C and ImageNet-C have them."""

from pathlib import Path

import numpy as np
import pytest
from imagecorruptions import get_corruption_names
from PIL import Image

from nt_transformers.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, load_corrupted, write_corrupted
from nt_transformers.data.images import ImageDataConfig, load_images


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
    assert {path.name for path in tmp_path.iterdir()} == {"gaussian_noise.npy", "labels.npy"}
    assert np.load(tmp_path / "gaussian_noise.npy").shape == (60, 32, 32, *(() if grey else (3,)))
    for severity in SEVERITIES:
        read = load_corrupted(tmp_path, "gaussian_noise", severity, CLASSES)
        assert np.array_equal(read.labels, images.labels)
        clean = images.read(5).convert("L" if grey else "RGB").resize((32, 32), Image.Resampling.BILINEAR)
        assert read.read(5).tobytes() == Corruption("gaussian_noise", severity)(clean, 5).tobytes()


def test_imagenet_c_folders(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fog").mkdir()
    (tmp_path / "fog" / "2").symlink_to(image_folder / "val")
    images = load_corrupted(tmp_path, "fog", 2, ["n00", *CLASSES])
    assert images.labels.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    with pytest.raises(ValueError, match="severity 3 does not exist"):
        load_corrupted(tmp_path, "fog", 3, CLASSES)


def test_labels_that_do_not_fit_the_images(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match=r"fog\.npy holds 2 images for 1 labels"):
        load_corrupted(tmp_path, "fog", 1, CLASSES)
