# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Studies of image classifiers: how good they are on clean test images and on corrupted ones.

The corrupted images are the same for all runs, made once.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from ..analysis import image_model_cost
from ..analysis.robustness import RobustnessTest
from ..data.corruptions import CORRUPTIONS, write_corrupted
from ..data.images import ImageDataConfig, LabelledImages
from ..sparsity import planned_nonzeros
from ..training import build_config
from ..training.vision import VisionTrainingConfig, train_image_classifier
from ..validation import check
from .config import ImageTest, StudyConfig
from .kind import Kind, Outline


# What of the figures at each severity the results hold.
SEVERITY_FIGURES = ("accuracy", "nll", "ece", "brier", "disagreement")


class VisionKind(Kind):
    """Runs of `train_image_classifier`, measured on the test images of their data."""

    config_class = VisionTrainingConfig
    curve = (
        "step",
        "images",
        "eval_nll",
        "eval_accuracy",
        "eval_disagreement",
        "eval_ambiguity",
        "density",
        "explored",
        "mask_overlap",
    )
    head_length = "num_head_blocks"
    loss = "eval_nll"

    def outline(self, training: VisionTrainingConfig) -> Outline:
        data = training.data
        with torch.device("meta"):
            network = training.model.build(data, data.class_names())
        config: Any = network.config
        blocks = ("num_head_blocks", "num_blocks")
        head_blocks, all_blocks = blocks if hasattr(config, "num_blocks") else ("num_head_layers", "num_hidden_layers")
        return Outline(
            cost=image_model_cost(
                network, data.image_size, data.num_channels, planned_nonzeros(network, training.sparsity)
            ),
            items_per_example=1,
            shape={
                "num_ensemble_heads": config.num_ensemble_heads,
                "num_head_layers": getattr(config, head_blocks),
                "num_hidden_layers": getattr(config, all_blocks),
                "model_type": config.model_type,
                **training.model.shape,
            },
        )

    def prepare(self, config: StudyConfig) -> dict[str, Any]:
        assert isinstance(config.test, ImageTest)
        data = build_config(ImageDataConfig, config.training["data"])
        remedy = "hold images out, by which learning rates are chosen"
        choices = len(config.learning_rates)
        check(choices == 1 or data.validation_size > 0, "training.data.validation_size", data.validation_size, remedy)
        images = data.load_test(data.class_names())
        corruptions = CORRUPTIONS if config.test.corruptions is None else config.test.corruptions
        identity = json.dumps([asdict(data), config.test.images, corruptions])
        folder = Path(config.output_dir) / f"corrupted-{hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()}"
        if corruptions and not folder.exists():
            print(f"making corrupted images in {folder}", flush=True)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_corrupted(sample(images, config.test.images), data, partial, corruptions, data.num_workers)
            partial.rename(folder)
        return {**asdict(config.test), "corruptions": corruptions, "folder": str(folder)}

    def train(self, training: VisionTrainingConfig, *, final: bool) -> dict[str, Any]:
        return train_image_classifier(training, test=final)

    def test(self, folder: Path, training: VisionTrainingConfig, test: dict[str, Any]) -> dict[str, Any]:
        """Figures under corruption; the summary of the training has those on all test images as they are.

        Returns:
            `test_corrupted_*`, means over corruptions and severities, and `test_severities`: figures on the images
            that were corrupted, as they are (severity 0) and at each severity.
        """
        if not test["corruptions"]:
            return {}
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        robustness = RobustnessTest(model, training.data, training.per_device_batch_size, training.data.num_workers)
        clean = sample(training.data.load_test(training.data.class_names()), test["images"])
        corrupted = robustness.on_corrupted(Path(test["folder"]), test["corruptions"], test["severities"])
        return {
            **{f"test_corrupted_{name}": value for name, value in corrupted["mean"].items()},
            "test_severities": [
                {"severity": severity, **{name: figures[name] for name in SEVERITY_FIGURES}}
                for severity, figures in {0: robustness.on(clean), **corrupted["by_severity"]}.items()
            ],
        }

    def headline(self, row: Mapping[str, Any]) -> str:
        return f"accuracy {row.get('test_accuracy', row.get('eval_accuracy')):.2%}"


def sample(images: LabelledImages, count: int | None) -> LabelledImages:
    """So many of the images, always the same, or all of them."""
    if count is None or count >= len(images):
        return images
    return images.select(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))
