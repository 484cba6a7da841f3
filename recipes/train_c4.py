# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains a NeuroTrails LLaMA on C4 or on text of the same form.

accelerate launch recipes/train_c4.py --config recipes/configs/llama_130m.yaml --output_dir runs/llama_130m

A second --config overrides the first (recipes/configs/variants/), any field can be given again as --field value:
... --config recipes/configs/variants/single.yaml --data.train shards/train --data.validation shards/validation
"""

from nt_transformers.training import TextTrainingConfig, run_recipe, train_language_model


def main() -> None:
    run_recipe(TextTrainingConfig, train_language_model, __doc__)


if __name__ == "__main__":
    main()
