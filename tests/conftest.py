# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Shared fixtures: a tiny corpus in C4's form and a tiny tokenizer, made on the spot; no test reaches the network."""

import gzip
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings


# Before anything imports the libraries that read them.
_CACHE = tempfile.mkdtemp(prefix="nt-transformers-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_CACHE,
    HF_DATASETS_CACHE=f"{_CACHE}/datasets",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

# The same examples in every run: what fails is a change's fault, not chance's. benchmarks/bad_input.py draws new ones.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

SUBJECTS = ("the farmer", "a small boat", "my neighbour", "the old clock", "every teacher", "a grey cat", "the river")
VERBS = ("watches", "repairs", "remembers", "crosses", "follows", "paints", "leaves behind")
OBJECTS = (
    "the wooden bridge",
    "three letters",
    "a bright window",
    "the winter market",
    "an open field",
    "the last train",
)
TAILS = ("before dawn", "without a word", "in the rain", "for many years", "near the station", "again and again")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def make_document(rng: random.Random) -> str:
    """One to eight sentences that look like English."""
    sentences = (
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(TAILS)}.".capitalize()
        for _ in range(rng.randint(1, 8))
    )
    return " ".join(sentences)


def write_shard(path: Path, texts: list[str]) -> Path:
    """Write a shard in C4's form (JSON lines, gzip if the name says so)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{number}"}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train/` (3 shards, 300 documents), `validation/` and `test/` (40 documents each) as `*.json.gz`."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for split, sizes in {"train": (130, 70, 100), "validation": (40,), "test": (40,)}.items():
        for shard, size in enumerate(sizes):
            name = f"{split}.{shard:05d}-of-{len(sizes):05d}.json.gz"
            write_shard(folder / split / name, [make_document(rng) for _ in range(size)])
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer with 320 tokens: `<|endoftext|>` is 0, `<|padding|>` is 1."""
    from nt_transformers.data.prepare import train_tokenizer

    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([make_document(rng) for _ in range(200)], 320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in ImageNet's layout: `train/` and `val/`, classes `n01`, `n02` and `n03` told apart by their brightness,
    12 and 4 images each of 40 to 60 pixels a side."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("images")
    for split, size in {"train": 12, "val": 4}.items():
        for label, name in enumerate(("n01", "n02", "n03")):
            (folder / split / name).mkdir(parents=True)
            for number in range(size):
                height, width = rng.integers(40, 61, 2)
                pixels = rng.integers(80 * label, 80 * label + 60, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:02d}.png")
    return folder
