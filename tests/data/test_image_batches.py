# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Batches of images: the same stream for any split over processes and workers, exact resume, true augmentation."""

import itertools
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nt_transformers.data.image_batches import (
    EvaluationBatches,
    TrainingBatches,
    evaluation_loader,
    image_processor,
    preparation_of,
    training_loader,
)
from nt_transformers.data.images import DamagedImageError, ImageDataConfig, LabelledImages, load_images


class SmallImages(LabelledImages):
    """Images of noise, each with a first pixel that tells its number."""

    def __init__(self, count: int, size: int = 8, mode: str = "RGB") -> None:
        shape = (count, size, size, 3) if mode == "RGB" else (count, size, size)
        self.pixels = np.random.default_rng(1).integers(1, 256, shape, dtype=np.uint8)
        super().__init__(np.arange(count) % 4, ["a", "b", "c", "d"])

    def _open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def place(self, index: int) -> str:
        return f"image {index}"


def config(**fields: Any) -> ImageDataConfig:
    return ImageDataConfig(**{"image_size": 8, "mean": [0.0] * 3, "std": [1 / 255] * 3, "crop_padding": 2} | fields)


def batches(images: LabelledImages, settings: ImageDataConfig | None = None, **options: Any) -> TrainingBatches:
    return TrainingBatches(images, settings or config(), **{"batch_size": 3, "seed": 5} | options)


def take(source: TrainingBatches, count: int, position: dict[str, int] | None = None, workers: int = 0) -> list[dict]:
    return list(itertools.islice(training_loader(source, position, workers), count))


def same(ours: list[dict], theirs: list[dict]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        and torch.equal(a["labels"], b["labels"])
        and a["position"] == b["position"]
        for a, b in zip(ours, theirs, strict=True)
    )


AUGMENTATIONS = pytest.mark.parametrize(
    "augmentation",
    [{}, {"crop": "resized", "rand_augment": 9}, {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}],
    ids=["pad", "resized", "mixed"],
)


def test_every_image_once_an_epoch_in_another_order() -> None:
    images = SmallImages(10)
    stream = take(batches(images, config(crop="none", flip=False), batch_size=5), 8)
    numbers = {pixels.tobytes(): number for number, pixels in enumerate(images.pixels)}
    seen = [
        numbers[image.round().byte().permute(1, 2, 0).numpy().tobytes()]
        for batch in stream
        for image in batch["pixel_values"]
    ]
    epochs = [seen[10 * epoch : 10 * (epoch + 1)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    labels = [label for batch in stream for label in batch["labels"].tolist()]
    assert labels == [number % 4 for number in seen]


def shifted_crops(pixels: np.ndarray, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the padded image, mirrored or not, by its bytes."""
    size = len(pixels)
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
    crops = {}
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        crop = padded[top : top + size, left : left + size]
        crops[crop.tobytes()] = (top, left, False)
        crops[crop[:, ::-1].tobytes()] = (top, left, True)
    return crops


def test_training_images_are_padded_crops_mirrored_half_of_the_time() -> None:
    images = SmallImages(4)
    crops: dict[bytes, tuple[int, int, bool]] = {}
    for pixels in images.pixels:
        crops |= shifted_crops(pixels, 2)
    found = [
        crops[image.round().byte().permute(1, 2, 0).numpy().tobytes()]
        for batch in take(batches(images, batch_size=8), 40)
        for image in batch["pixel_values"]
    ]
    offsets = {(top, left) for top, left, _ in found}
    assert len(offsets) == 25, "all places of the crop occur"
    assert 100 < sum(mirrored for _, _, mirrored in found) < 220


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    images = SmallImages(6)
    whole = take(batches(images, batch_size=6), 2)
    ones = take(batches(images, batch_size=1), 12)
    assert torch.equal(torch.cat([b["pixel_values"] for b in whole]), torch.cat([b["pixel_values"] for b in ones]))
    assert not torch.equal(whole[0]["pixel_values"], take(batches(images, batch_size=6, seed=6), 1)[0]["pixel_values"])


@AUGMENTATIONS
def test_no_global_random_state_is_read_or_changed(augmentation: dict[str, Any]) -> None:
    source = batches(SmallImages(6), config(**augmentation))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = take(source, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(take(source, 3), first)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_what_one_sees(world_size: int) -> None:
    images = SmallImages(10)
    one = take(batches(images, batch_size=6), 7)
    ranks = [
        take(batches(images, batch_size=6 // world_size, rank=rank, world_size=world_size), 7)
        for rank in range(world_size)
    ]
    joined = [
        {key: torch.cat([batch[key] for batch in parts]) for key in ("pixel_values", "labels")}
        | {"position": parts[0]["position"]}
        for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, one)


@AUGMENTATIONS
def test_resume_after_every_batch(augmentation: dict[str, Any]) -> None:
    source = batches(SmallImages(10), config(**augmentation), rank=1, world_size=2)
    whole = take(source, 9)
    for done in range(1, 8):
        position = json.loads(json.dumps(whole[done - 1]["position"]))
        assert same(take(source, 2, position), whole[done : done + 2])
    assert whole[1]["position"] == {"epoch": 1, "index": 2}


@AUGMENTATIONS
def test_workers_change_nothing(augmentation: dict[str, Any]) -> None:
    source = batches(SmallImages(10), config(**augmentation))
    assert same(take(source, 6, workers=2), take(source, 6))


@AUGMENTATIONS
def test_batches_reach_workers_that_are_no_forks(augmentation: dict[str, Any]) -> None:
    source = batches(SmallImages(10), config(**augmentation))
    assert same([pickle.loads(pickle.dumps(source))[30]], [source[30]])


def test_mixup_mixes_images_as_it_mixes_labels() -> None:
    images, plain = SmallImages(4), {"crop": "none", "flip": False}
    (mixed,) = take(batches(images, config(**plain, mixup=1.0), batch_size=4), 1)
    (alone,) = take(batches(images, config(**plain), batch_size=4), 1)
    one_hot = F.one_hot(alone["labels"], 4).float()
    share = mixed["labels"].gather(1, alone["labels"][:, None])[0, 0]
    assert 0 < share < 1
    for key, values in (("pixel_values", alone["pixel_values"]), ("labels", one_hot)):
        torch.testing.assert_close(mixed[key], share * values + (1 - share) * values.roll(1, 0))


def test_cutmix_pastes_a_box_as_large_as_its_share_of_the_label() -> None:
    images, plain = SmallImages(4), {"crop": "none", "flip": False}
    (mixed,) = take(batches(images, config(**plain, cutmix=1.0), batch_size=4, seed=1), 1)
    (alone,) = take(batches(images, config(**plain), batch_size=4, seed=1), 1)
    kept = (mixed["pixel_values"] == alone["pixel_values"]).all(1)
    pasted = (mixed["pixel_values"] == alone["pixel_values"].roll(1, 0)).all(1)
    assert (kept | pasted).all()
    shares = mixed["labels"].gather(1, alone["labels"][:, None]).squeeze(1)
    torch.testing.assert_close(kept.float().mean((1, 2)), shares)
    assert 0 < shares[0] < 1


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    (batch,) = take(batches(SmallImages(4), config(label_smoothing=0.1), batch_size=4), 1)
    (plain,) = take(batches(SmallImages(4), config(), batch_size=4), 1)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, plain["labels"], label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, batch["labels"]), expected)


@pytest.mark.parametrize(
    ("settings", "size", "mode"),
    [
        ({"image_size": 32}, (32, 32), "RGB"),
        ({"image_size": 28, "mean": [0.3], "std": [0.2]}, (28, 28), "L"),
        ({"image_size": 16}, (40, 30), "RGB"),
        ({"image_size": 64, "crop": "resized", "center_crop": 0.875}, (90, 120), "RGB"),
        ({"image_size": 400, "crop": "resized", "center_crop": 0.95}, (200, 150), "RGB"),
        ({"image_size": 16, "crop": "resized", "mean": [0.3], "std": [0.2]}, (20, 30), "L"),
    ],
)
def test_evaluation_sees_what_the_image_processor_makes(
    settings: dict[str, Any], size: tuple[int, int], mode: str
) -> None:
    prepared = ImageDataConfig(**settings)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)
    images = SmallImages(1)
    images.pixels = pixels[None]
    ours = EvaluationBatches(images, prepared, batch_size=1)[0]["pixel_values"]
    processor = image_processor(prepared)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    again = EvaluationBatches(images, preparation_of(processor), batch_size=1)[0]["pixel_values"]
    assert torch.equal(again, ours)


def test_a_processor_of_another_kind_is_refused() -> None:
    processor = image_processor(ImageDataConfig())
    processor.size = {"height": 20, "width": 30}
    with pytest.raises(ValueError, match="expected, with bilinear"):
        preparation_of(processor)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_passes_once_over_all_images(world_size: int, workers: int) -> None:
    images = SmallImages(10)
    seen = [
        image.round().byte().permute(1, 2, 0).numpy().tobytes()
        for rank in range(world_size)
        for batch in evaluation_loader(
            EvaluationBatches(images, config(), batch_size=3, rank=rank, world_size=world_size), workers
        )
        for image in batch["pixel_values"]
    ]
    assert sorted(seen) == sorted(pixels.tobytes() for pixels in images.pixels)


@pytest.fixture
def damaged(tmp_path: Path, image_folder: Path) -> Path:
    """The image folder with one image of `train/n02` cut short."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    path = folder / "train" / "n02" / "03.png"
    path.write_bytes(path.read_bytes()[:500])
    return folder


def test_a_damaged_image_stops_training_unless_it_is_to_be_skipped(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = load_images(str(damaged))
    with pytest.raises(DamagedImageError, match=r"n02/03\.png"):
        take(batches(images, batch_size=36), 1)
    with pytest.raises(DamagedImageError, match=r"n02/03\.png"):
        list(EvaluationBatches(images, config(), batch_size=12))
    with caplog.at_level(logging.WARNING):
        (batch,) = take(batches(images, config(skip_damaged_images=True), batch_size=36), 1)
    assert "n02/03.png" in caplog.text
    assert len(batch["pixel_values"]) == len(batch["labels"]) == 35
    assert batch["labels"].bincount().tolist() == [12, 11, 12]
    kept = EvaluationBatches(images, config(skip_damaged_images=True), batch_size=10)
    assert sum(len(part["labels"]) for part in kept) == 35


@pytest.mark.parametrize("workers", [0, 2])
def test_the_message_is_the_same_from_a_worker(damaged: Path, workers: int) -> None:
    with pytest.raises(DamagedImageError, match=r"^data: \S+n02/03\.png cannot be decoded") as found:
        take(batches(load_images(str(damaged)), batch_size=36), 1, workers=workers)
    assert "\n" not in str(found.value)


def test_evaluation_goes_on_after_a_batch_of_damaged_images_only(damaged: Path) -> None:
    kept = EvaluationBatches(load_images(str(damaged)), config(skip_damaged_images=True), batch_size=1)
    assert [len(batch["labels"]) for batch in evaluation_loader(kept, num_workers=1)] == [1] * 35


def test_a_batch_of_damaged_images_only_is_an_error(damaged: Path) -> None:
    images = load_images(str(damaged))
    alone = images.select(np.array([i for i in range(len(images)) if images.place(i).endswith("n02/03.png")]))
    with pytest.raises(ValueError, match=r"every image of a batch is damaged, such as .*n02/03\.png"):
        take(batches(alone, config(skip_damaged_images=True), batch_size=2), 1)
