# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains a NeuroTrails image classifier: CIFAR, Tiny-ImageNet, ImageNet, or images of one's own.

accelerate launch recipes/train_vision.py --config recipes/configs/cifar100_wrn28_10.yaml

A second --config overrides the first (recipes/configs/vision_variants/), any field can be given again as
--field value: ... --config recipes/configs/vision_variants/single.yaml --data.train FOLDER --output_dir runs/single
"""

from nt_transformers.training import run_recipe
from nt_transformers.training.vision import VisionTrainingConfig, train_image_classifier


def main() -> None:
    run_recipe(VisionTrainingConfig, train_image_classifier, __doc__)


if __name__ == "__main__":
    main()
